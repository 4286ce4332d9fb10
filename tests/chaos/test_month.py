"""Nights of `masklake relabel` over a source on S3 that grows, changes and shrinks, while models come, are
refused, promoted and rolled back, and nights are killed: thirty over single objects, some over shards.

After each night the test says by itself, from the source alone, whose labels of which content must be
current; they are, exactly.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.lake.current import read_current
from tests.chaos.harness import SEED, Drivers
from tests.chaos.month import BROKEN, Calendar, Kill, Month
from tests.chaos.night_oracle import FilesOracle, ShardOracle
from tests.integration.conftest import S3Server

BUDGET = 14  # images a night
MONTH = Calendar(
    nights=30,
    champions={0: "m1", 8: "m2", 14: "m3", 18: "m2", 20: "m4", 25: "m2"},
    kills=(
        Kill(5, "commit_put#1", images=1),
        Kill(8, "current_send", status="promoted"),
        Kill(11, "unit_finished#1", images=1),
        Kill(14, "gate_compared", status="refused"),
        Kill(20, "commit_send#2", images=7),
        Kill(20, "current_put", status="promoted"),
    ),
    two_at_once=13,
    rolled_back=24,  # m4 turned out to be no good, and for a night nobody moves the alias
)
WEEK = Calendar(
    nights=7,
    champions={0: "m1", 1: "m2", 3: "m3", 5: "m4"},
    kills=(
        Kill(1, "commit_put#1", images=7),
        Kill(3, "gate_compared", status="refused"),
        Kill(5, "current_put", status="promoted"),
    ),
    two_at_once=0,
)
SHARD_BUDGET = 9
SHARD_NIGHTS = Calendar(
    nights=10,
    champions={0: "m1", 3: "m2", 6: "m3", 9: "m2"},
    kills=(Kill(3, "current_send", status="promoted"), Kill(4, "commit_put#1", images=1)),
)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_month_of_nights(drivers: Drivers, moto_server: S3Server, tmp_path: Path) -> None:
    month = Month(moto_server, drivers, tmp_path, SEED, BUDGET)
    oracle = FilesOracle(BUDGET, frozenset({"m3"}))
    statuses = month.live(MONTH, oracle, lambda night: live_on(month, oracle.source, night))
    assert {"limited", "promoted", "refused", "up_to_date", "rolled back"} == set(statuses)
    (current,) = read_current(month.table).values()
    assert current.model == "m2@1"


@pytest.mark.s3
@pytest.mark.timeout(1800)
def test_a_week_of_nights_on_another_s3(drivers: Drivers, rgw_server: S3Server, tmp_path: Path) -> None:
    month = Month(rgw_server, drivers, tmp_path, SEED, BUDGET, num_images=40)
    oracle = FilesOracle(BUDGET, frozenset({"m3"}))
    statuses = month.live(WEEK, oracle, lambda night: live_on(month, oracle.source, night))
    assert {"limited", "promoted", "refused"} <= set(statuses)


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
        came["broken.jpg"] = BROKEN
    if night == 6:
        came["moved.jpg"] = source[there[-1]]  # the same content under another key
    for key, data in came.items():
        month.put(key, data)
        source[key] = data
    for key in gone:
        month.delete(key)
        del source[key]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_nights_over_shards(form: str, drivers: Drivers, moto_server: S3Server, tmp_path: Path) -> None:
    order = ", ".join(f'"{night:02d}*"' for night in range(SHARD_NIGHTS.nights))
    settings = (f"order.first=[{order}]",)
    month = Month(moto_server, drivers, tmp_path, SEED, SHARD_BUDGET, num_images=60, settings=settings)
    oracle = ShardOracle(SHARD_BUDGET, frozenset({"m3"}))
    packed: dict[str, dict[str, bytes]] = {}

    def day(night: int) -> None:
        for name in live_on_in_shards(month, form, packed, night):
            oracle.shards[name] = month.put_shard(form, name, packed[name])
        oracle.shards = {name: oracle.shards[name] for name in packed}

    statuses = month.live(SHARD_NIGHTS, oracle, day)
    assert {"limited", "promoted", "refused", "up_to_date"} <= set(statuses)
    run = drivers.run(month.night, month.env).summary
    assert (run["status"], sum(part["images"] for part in run["passes"])) == ("up_to_date", 0)


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
        packed[came[0]]["broken.jpg"] = BROKEN
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
