"""Leases, jobs/lake/lease.py."""

import json
import multiprocessing
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.lake.lease import Lease
from jobs.lake.storage import Storage, TransientStorageError
from schemas.errors import LeaseHeldError


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take(storage: Storage, lake: str, clock: Clock, holder: str) -> Lease:
    return Lease.acquire(storage, lake, "infer-1", holder, ttl_s=60, clock=clock)


def test_the_second_runner_is_told_who_is_at_work(storage: Storage, lake: str, clock: Clock) -> None:
    take(storage, lake, clock, "run-1")
    clock.now_s += 10
    with pytest.raises(
        LeaseHeldError, match=rf"run run-1 .* process {os.getpid()}, since 2027-01-15 08:00:00 UTC"
    ) as e:
        take(storage, lake, clock, "run-2")
    assert "expires at 2027-01-15 08:01:00 UTC, in 50 s" in str(e.value)
    assert e.value.exit_code == 5


def test_other_keys_are_other_leases(storage: Storage, lake: str, clock: Clock) -> None:
    take(storage, lake, clock, "run-1")
    Lease.acquire(storage, lake, "infer-2", "run-2", 60, clock)


def test_a_released_lease_is_free_at_once(storage: Storage, lake: str, clock: Clock) -> None:
    first = take(storage, lake, clock, "run-1")
    first.release()
    assert first.lost
    second = take(storage, lake, clock, "run-2")
    assert not second.lost


def test_an_expired_lease_is_taken_over_and_its_holder_finds_out(
    storage: Storage, lake: str, clock: Clock
) -> None:
    first = take(storage, lake, clock, "run-1")
    clock.now_s += 59
    before = first.lost
    clock.now_s += 1
    assert (before, first.lost) == (False, True)
    second = take(storage, lake, clock, "run-2")
    first.renew()
    first.release()
    assert first.lost
    assert not second.lost
    with pytest.raises(LeaseHeldError, match="run-2"):
        take(storage, lake, clock, "run-3")


def test_a_holder_whose_clock_is_slow_finds_the_successors_object(
    storage: Storage, lake: str, clock: Clock
) -> None:
    first = take(storage, lake, clock, "run-1")
    ahead = Clock()
    ahead.now_s += 1000
    take(storage, lake, ahead, "run-2")
    assert not first.lost
    first.renew()
    assert first.lost


def test_a_renewed_lease_does_not_expire(storage: Storage, lake: str, clock: Clock) -> None:
    first = take(storage, lake, clock, "run-1")
    for _ in range(5):
        clock.now_s += 45
        first.renew()
    assert not first.lost
    with pytest.raises(LeaseHeldError, match="in 60 s"):
        take(storage, lake, clock, "run-2")


def test_as_a_context_manager_it_renews_itself_and_gives_itself_back(
    storage: Storage, lake: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = wait_for_writes(storage, monkeypatch, fail_first=False)
    with Lease.acquire(storage, lake, "infer-1", "run-1", ttl_s=0.2, clock=clock) as lease:
        assert renewed.wait(30)
        meanwhile = lease.lost
    assert (meanwhile, lease.lost) == (False, True)
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="our own"), Lease.acquire(storage, lake, "infer-1", "run-2"):
        raise RuntimeError("our own")
    Lease.acquire(storage, lake, "infer-1", "run-3")


def test_a_store_that_is_away_for_a_moment_costs_nothing(
    storage: Storage,
    lake: str,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    renewed = wait_for_writes(storage, monkeypatch, fail_first=True)
    with Lease.acquire(storage, lake, "infer-1", "run-1", ttl_s=0.2, clock=clock) as lease:
        assert renewed.wait(30)
        assert not lease.lost
    assert "could not be renewed" in caplog.text


def wait_for_writes(storage: Storage, monkeypatch: pytest.MonkeyPatch, fail_first: bool) -> threading.Event:
    """Is set once write_bytes was called three times; the first call may fail."""
    write = storage.write_bytes
    third = threading.Event()
    calls: list[str] = []

    def write_bytes(uri: str, data: bytes) -> None:
        calls.append(uri)
        if fail_first and len(calls) == 1:
            raise TransientStorageError(f"{uri}: no answer")
        write(uri, data)
        if len(calls) == 3:
            third.set()

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    return third


def test_a_lease_that_cannot_be_given_back_does_not_fail_the_run(
    storage: Storage, lake: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_bytes(uri: str, data: bytes) -> None:
        raise TransientStorageError(f"{uri}: no answer")

    with Lease.acquire(storage, lake, "infer-1", "run-1"):
        monkeypatch.setattr(storage, "write_bytes", write_bytes)
    assert "expires by itself" in caplog.text


def test_of_many_runners_at_once_one_gets_it(storage: Storage, lake: str, clock: Clock) -> None:
    def race(number: int) -> bool:
        try:
            take(storage, lake, clock, f"run-{number}")
        except LeaseHeldError:
            return False
        return True

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(race, range(8))) == 1
        clock.now_s += 61


def test_old_objects_are_cleared_away(storage: Storage, lake: str, clock: Clock, tmp_path: Path) -> None:
    for number in range(3):
        take(storage, lake, clock, f"run-{number}").release()
    (left,) = (tmp_path / "lake" / "leases" / "infer-1").iterdir()
    assert left.name == "00000003.json"
    assert json.loads(left.read_text())["released"]


def test_a_runner_that_read_long_ago_does_not_get_a_number_that_was_used_up(
    storage: Storage, lake: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(storage, lake, clock, "run-1").release()
    create = storage.create_exclusive

    def paused_create(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create_exclusive", create)
        take(storage, lake, clock, "run-2").release()  # number 2, which the next one deletes
        take(storage, lake, clock, "run-3")
        return create(uri, data)

    monkeypatch.setattr(storage, "create_exclusive", paused_create)
    with pytest.raises(LeaseHeldError, match="run-3"):
        take(storage, lake, clock, "run-4")


def _take_and_die(lake: str) -> None:
    from schemas.specs import StorageSpec

    Lease.acquire(Storage(StorageSpec()), lake, "infer-1", "run-killed", ttl_s=3600)
    os._exit(9)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/ns/pid"), reason="only Linux tells whether a process is dead"
)
def test_a_killed_holder_on_this_machine_need_not_be_waited_for(storage: Storage, lake: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(lake,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not Lease.acquire(storage, lake, "infer-1", "run-2").lost


def test_a_dead_looking_holder_on_another_machine_is_waited_for(
    storage: Storage, lake: str, clock: Clock, tmp_path: Path
) -> None:
    take(storage, lake, clock, "run-1")
    (held,) = (tmp_path / "lake" / "leases" / "infer-1").iterdir()
    claim = json.loads(held.read_text())
    process = f"another-boot {claim['process'].partition(' ')[2]}"
    held.write_text(json.dumps(claim | {"host": "elsewhere", "pid": 2**22 + 1, "process": process}))
    with pytest.raises(LeaseHeldError, match="host elsewhere"):
        take(storage, lake, clock, "run-2")


def test_leases_work_on_s3(s3_lake: tuple[str, Storage], clock: Clock) -> None:
    lake, storage = s3_lake
    first = take(storage, lake, clock, "run-1")
    with pytest.raises(LeaseHeldError, match="run-1"):
        take(storage, lake, clock, "run-2")
    clock.now_s += 30
    first.renew()
    first.release()
    take(storage, lake, clock, "run-2")


def test_never_two_holders_at_once_whatever_the_order(storage: Storage, lake: str, clock: Clock) -> None:
    rng = random.Random(7)
    held: list[Lease] = []
    for number in range(150):
        action = rng.random()
        if action < 0.4:
            try:
                held.append(take(storage, lake, clock, f"run-{number}"))
            except LeaseHeldError:
                assert any(not lease.lost for lease in held)
        elif action < 0.6 and held:
            rng.choice(held).renew()
        elif action < 0.7 and held:
            rng.choice(held).release()
        else:
            clock.now_s += rng.choice([5, 30, 61])
        assert sum(not lease.lost for lease in held) <= 1
