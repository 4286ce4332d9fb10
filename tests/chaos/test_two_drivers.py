"""Two drivers on one lake: one works, the other says who does; one that slept past its lease stops."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from tests.chaos.conftest import Reference
from tests.chaos.harness import SEED, Driver, Drivers, Job, make_source, write_source
from tests.chaos.judge import judge, read_table

NUM_IMAGES = 14
TTL_S = 3.0


def make_job(reference: Reference, folder: Path, *settings: str) -> Job:
    source = write_source(folder / "images", make_source("tar", reference.first(NUM_IMAGES)))
    return Job(source, str(folder / "lake"), settings=settings)


def test_of_two_drivers_one_works_and_the_other_names_it(
    drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    job = make_job(reference, tmp_path)
    ended = [driver.wait() for driver in [drivers.start(job) for _ in range(2)]]
    ended.sort(key=lambda end: end.status)
    assert [end.status for end in ended] == [0, 5], [end.stderr for end in ended]
    ended[1].check_clear_end(5)
    assert ended[0].summary["run_id"] in ended[1].last_line
    assert reference.verdict(read_table(job.lake, disk), reference.first(NUM_IMAGES)) == []


@pytest.mark.chaos
def test_of_many_drivers_one_works(
    drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    job = make_job(reference, tmp_path)
    ended = [driver.wait() for driver in [drivers.start(job) for _ in range(8)]]
    assert sorted(end.status for end in ended) == [0] + 7 * [5], [end.stderr for end in ended]
    assert reference.verdict(read_table(job.lake, disk), reference.first(NUM_IMAGES)) == []


def sleep_and_wake(
    drivers: Drivers, job: Job, stop_at: str, wake: Callable[[Driver, Driver], None]
) -> list[tuple[int, str]]:
    """A driver stops at a failpoint until its lease has expired and another started; then `wake` lets it go
    on. Gives how both ended."""
    sleeper = drivers.start(job, {"MASKLAKE_CHAOS_TTL_S": str(TTL_S), "MASKLAKE_CHAOS_STOP": stop_at})
    sleeper.wait_stopped()
    time.sleep(TTL_S + 0.1)
    other = drivers.start(job)
    wake(sleeper, other)
    ended = [sleeper.wait(), other.wait()]
    print(stop_at, [(end.status, end.last_line[:150]) for end in ended])
    for end in ended:
        if end.status != 0:
            end.check_clear_end(1)
    return [(end.status, end.last_line) for end in ended]


def after_the_other(sleeper: Driver, other: Driver) -> None:
    other.wait()
    sleeper.signal(signal.SIGCONT)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("stop_at", "reason"),
    [
        ("unit_finished#2", "another run took the lease over"),
        ("commit_send#2", "another run committed labels of the same source and model"),
        ("commit_put#1", "another run took the lease over"),
        ("commit_done#1", "another run took the lease over"),
    ],
)
def test_a_driver_that_slept_past_its_lease_stops_and_says_why(
    stop_at: str, reason: str, drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    job = make_job(reference, tmp_path)
    sleeper, other = sleep_and_wake(drivers, job, stop_at, after_the_other)
    assert sleeper[0] == 1
    assert reason in sleeper[1]
    assert other[0] == 0
    assert reference.verdict(read_table(job.lake, disk), reference.first(NUM_IMAGES)) == []


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_a_driver_that_wakes_while_another_is_at_work_does_no_harm(
    seed: int, drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    """Both may then stop, each taking the other for the younger; what counts is the table, and the rerun."""
    rng = random.Random(seed)
    job = make_job(reference, tmp_path)
    name = rng.choice(["unit_finished", "commit_send", "commit_put", "commit_done"])

    def some_time_later(sleeper: Driver, other: Driver) -> None:
        time.sleep(rng.uniform(0, 1.5 * reference.seconds))
        sleeper.signal(signal.SIGCONT)

    sleep_and_wake(drivers, job, f"{name}#{rng.randint(1, 2)}", some_time_later)
    table = read_table(job.lake, disk)
    assert table.problems == []
    assert len(set(table.ids())) == len(table.ids())
    drivers.run(job)
    assert reference.verdict(read_table(job.lake, disk), reference.first(NUM_IMAGES)) == []


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(SEED, SEED + 3))
def test_two_models_label_one_table_at_once_each_for_itself(
    seed: int, drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    """From the first commit on, which also makes the table; one of them is killed and started again."""
    rng = random.Random(seed)
    images = reference.first(NUM_IMAGES)
    job = make_job(reference, tmp_path)
    other = Job(job.source, job.lake, every_images=4, settings=("model.score_threshold=0.9",))
    running = [drivers.start(job), drivers.start(other)]
    time.sleep(rng.uniform(0, reference.seconds))
    running[seed % 2].signal(signal.SIGKILL)
    assert [driver.wait().status for driver in running].count(0) >= 1
    assert [drivers.run(each).status for each in (job, other)] == [0, 0]
    table = read_table(job.lake, disk)
    assert judge(table, list(images.values()), num_models=2) == []
