"""Drivers killed with SIGKILL, at failpoints and whenever, and started again: nothing lost, nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.lake.storage import Storage
from tests.chaos.conftest import Reference
from tests.chaos.harness import (
    NUM_SCHEDULES,
    SEED,
    Drivers,
    Job,
    Kill,
    Outcome,
    Schedule,
    make_source,
    run_schedule,
    write_source,
)
from tests.chaos.judge import read_table


def play(schedule: Schedule, drivers: Drivers, reference: Reference, folder: Path, disk: Storage) -> Outcome:
    """Run a schedule on a disk, judge the table, print one line of it."""
    images = reference.first(schedule.num_images)
    source = write_source(folder / "images", make_source(schedule.form, images))
    job = Job(source, str(folder / "lake"), schedule.max_images, schedule.every_images)
    outcome = run_schedule(
        drivers,
        job,
        schedule.kills,
        folder / "journal",
        lambda: read_table(job.lake, disk).ids(),
    )
    table = read_table(job.lake, disk)
    outcome.problems += reference.verdict(table, images)
    print(
        f"seed {schedule.seed}: {schedule.num_images} images as {schedule.form}, "
        f"units of {schedule.max_images}, commits of {schedule.every_images}; "
        f"killed {outcome.num_killed} at {', '.join(map(str, schedule.kills))}; {outcome.reruns} reruns, "
        f"{outcome.repeated} images repeated, {table.num_versions - 1} versions, "
        f"{len(table.orphan_rows)} orphaned rows"
    )
    return outcome


@pytest.mark.parametrize(
    ("failpoint", "num_repeated"),
    [
        # A fragment is written, and nobody knows of it.
        pytest.param("unit_finished#1", 2, marks=pytest.mark.chaos),
        ("unit_finished#5", 4),  # the fifth of a table that has the first three
        pytest.param("commit_send#1", 6, marks=pytest.mark.chaos),
        # The put went through: nothing is labelled again.
        ("commit_put#1", 0),
        pytest.param("commit_put#2", 0, marks=pytest.mark.chaos),
        pytest.param("commit_done#2", 0, marks=pytest.mark.chaos),
    ],
)
def test_a_driver_killed_at_a_failpoint_repeats_what_was_not_committed_and_no_more(
    failpoint: str,
    num_repeated: int,
    drivers: Drivers,
    reference: Reference,
    tmp_path: Path,
    disk: Storage,
) -> None:
    schedule = Schedule(0, "files", 14, 2, 6, (Kill(failpoint, 0),))
    outcome = play(schedule, drivers, reference, tmp_path, disk)
    assert outcome.problems == []
    assert (outcome.num_killed, outcome.repeated) == (1, num_repeated)


def test_a_random_schedule_of_kills(
    drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    outcome = play(Schedule.draw(2, reference.seconds), drivers, reference, tmp_path, disk)
    assert outcome.problems == []


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(SEED, SEED + NUM_SCHEDULES))
def test_random_schedules_of_kills(
    seed: int, drivers: Drivers, reference: Reference, tmp_path: Path, disk: Storage
) -> None:
    outcome = play(Schedule.draw(seed, reference.seconds), drivers, reference, tmp_path, disk)
    assert outcome.problems == []
