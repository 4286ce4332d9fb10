"""Nights of `masklake relabel` over a source on S3 that grows, changes and shrinks, while models come, are
refused, promoted and rolled back, and nights are killed: thirty over single objects, some over shards.

After each night the test says by itself, from the source alone, whose labels of which content must be
current; they are, exactly.
"""

from __future__ import annotations

import signal

import pytest

from jobs.lake.current import read_current, rollback
from jobs.lake.failpoints import VARIABLE as FAILPOINTS
from tests.chaos.harness import SEED, Drivers, Ended
from tests.chaos.judge import read_table
from tests.chaos.month import FilesOracle, Month, Night, ShardOracle, digest
from tests.integration.conftest import S3Server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

NIGHTS = 30
BUDGET = 14  # images a night
CHAMPIONS = {0: "m1", 8: "m2", 14: "m3", 18: "m2", 20: "m4", 25: "m2"}
KILLED_NIGHTS = {5: "commit_put#1", 11: "unit_finished#1", 21: "commit_send#2"}
TWO_AT_ONCE = 13

SHARD_NIGHTS = 10
SHARD_BUDGET = 9
SHARD_CHAMPIONS = {0: "m1", 3: "m2", 6: "m3", 9: "m2"}
SHARD_KILL = {4: "commit_put#1"}


def live_on(month: Month, source: dict[str, bytes], night: int) -> None:
    """A day passes: images come, change and go."""
    there = sorted(source)
    came: dict[str, bytes] = {}
    for number in range(12 if night == 0 else month.rng.randint(0, 3)):
        came[f"{night:02d}-{number}.jpg"] = next(month.fresh)
    gone: list[str] = []
    if night:
        for key in month.rng.sample(there, month.rng.randint(0, 2)):
            came[key] = next(month.fresh)
        gone = month.rng.sample(there, month.rng.randint(0, 2))
    if night == 3:
        came["broken.jpg"] = b"no image at all"
    if night == 6:
        came["moved.jpg"] = source[there[-1]]  # the same content under another key
    for key, data in came.items():
        month.put(key, data)
        source[key] = data
    for key in gone:
        month.delete(key)
        del source[key]


def kill_one(drivers: Drivers, month: Month, night: Night, failpoint: str) -> None:
    killed = drivers.run(night, month.env | {FAILPOINTS: failpoint})
    assert killed.status in (-signal.SIGKILL, 0), killed.stderr
    print(f"killed at {failpoint}: {killed.status == -signal.SIGKILL}")
    assert read_table(month.lake, month.storage).problems == []


def check_end(ended: Ended, wanted: str) -> None:
    assert ended.status == (4 if wanted == "refused" else 0), ended.stderr
    if wanted == "refused":
        ended.check_clear_end(4)
        assert "max_lost" in ended.last_line
    else:
        assert ended.summary["status"] == wanted, ended.summary


def test_a_month_of_nights(drivers: Drivers, moto_server: S3Server) -> None:
    month = Month(moto_server, SEED)
    command = Night(month.uri, BUDGET)
    oracle = FilesOracle(BUDGET, refused=frozenset({"m3"}))
    statuses: list[str] = []
    for night in range(NIGHTS):
        live_on(month, oracle.source, night)
        if night in CHAMPIONS:
            month.choose(CHAMPIONS[night])
        if night == 25:  # m4 turned out to be no good: back to m2 at once, whose labels are there
            rollback(month.table, [f"{month.uri}/images"], "the test", "m4 is no good")
            oracle.current = "m2"
        if night in KILLED_NIGHTS:
            kill_one(drivers, month, command, KILLED_NIGHTS[night])
            # What it did before counts: nights after it may have less to do than the oracle thinks.
            oracle.labelled = month.done_by_table({digest(data): data for data in oracle.source.values()})
        if night == TWO_AT_ONCE:
            both = [driver.wait() for driver in [drivers.start(command, month.env) for _ in range(2)]]
            both.sort(key=lambda end: end.status)
            assert [end.status for end in both] == [0, 5], [end.stderr for end in both]
            assert both[0].summary["run_id"] in both[1].last_line
            ended = both[0]
        else:
            ended = drivers.run(command, month.env)
        statuses.append(oracle.night(month.target))
        print(
            f"night {night}: {month.target} {statuses[-1]}, {len(oracle.source)} images: "
            f"{ended.last_line[:200]}"
        )
        check_end(ended, statuses[-1])
        month.check(oracle)
    assert {"limited", "promoted", "refused", "up_to_date"} <= set(statuses)
    (current,) = read_current(month.table).values()
    assert current.model == "m2@1"


def live_on_in_shards(month: Month, form: str, packed: dict[str, dict[str, bytes]], night: int) -> list[str]:
    """A day passes: shards come, are written again, and go. packed: shard -> member -> content.

    Returns:
        the shards that were written; what went is no more in packed.
    """
    came = [f"{night:02d}.{form}"] if night in (0, 2, 4, 6) else []
    for name in came:
        packed[name] = {
            f"{name}-{number}.jpg": next(month.fresh) for number in range(11 if night == 0 else 3)
        }
    if night == 2:
        packed[came[0]]["broken.jpg"] = b"no image at all"
    if night in (1, 3, 4, 6):  # one image changes, one goes, one comes, and the others stay
        name = min(packed)
        members = packed[name]
        changed, gone = month.rng.sample(sorted(members), 2)
        members[changed] = next(month.fresh)
        del members[gone]
        members[f"late-{night}.jpg"] = next(month.fresh)
        came.append(name)
    if night == 5:
        name = sorted(packed)[1]
        del packed[name]
        month.delete(name)
    if night == 7:  # nothing comes and one image goes
        name = sorted(packed)[-1]
        del packed[name][min(packed[name])]
        came.append(name)
    return came


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_nights_over_shards(form: str, drivers: Drivers, moto_server: S3Server) -> None:
    month = Month(moto_server, SEED)
    order = ", ".join(f'"{night:02d}*"' for night in range(SHARD_NIGHTS))
    command = Night(month.uri, SHARD_BUDGET, (f"order.first=[{order}]",))
    oracle = ShardOracle(SHARD_BUDGET, refused=frozenset({"m3"}))
    packed: dict[str, dict[str, bytes]] = {}
    statuses: list[str] = []
    for night in range(SHARD_NIGHTS):
        for name in live_on_in_shards(month, form, packed, night):
            oracle.shards[name] = month.put_shard(form, name, packed[name])
        oracle.shards = {name: oracle.shards[name] for name in packed}
        if night in SHARD_CHAMPIONS:
            month.choose(SHARD_CHAMPIONS[night])
        if night in SHARD_KILL:
            kill_one(drivers, month, command, SHARD_KILL[night])
            there = [data for images in oracle.shards.values() for data in images.values()]
            oracle.labelled = month.done_by_table({digest(data): data for data in there})
        ended = drivers.run(command, month.env)
        statuses.append(oracle.night(month.target))
        num_images = sum(len(images) for images in oracle.shards.values())
        print(
            f"night {night}: {month.target} {statuses[-1]}, {num_images} images: {ended.last_line[:200]}"
            f"{ended.stdout[-700:]}"
        )
        check_end(ended, statuses[-1])
        month.check(oracle)
    assert {"limited", "promoted", "refused", "up_to_date"} <= set(statuses)
    run = drivers.run(command, month.env).summary
    assert (run["status"], sum(part["images"] for part in run["passes"])) == ("up_to_date", 0)
