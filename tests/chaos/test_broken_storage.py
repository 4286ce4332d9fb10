"""An S3 server behind a proxy that throttles, cuts, damages and refuses: the labels are right, or not there.

The server keeps every object in order, so what is judged through it is what clients left there.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.chaos.conftest import Bucket, Reference
from tests.chaos.fault_proxy import Fault, Rule
from tests.chaos.harness import SEED, Drivers, Kill, run_schedule

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

FIRST_COMMIT = "/_delta_log/0+1\\.json"
SECOND_COMMIT = "/_delta_log/0+2\\.json"
NEW_TABLE = "/_delta_log/0+0\\.json"
FRAGMENTS = "/labels/model_id"
IMAGES = "/images/"
LEASES = "/leases/"


def finish(bucket: Bucket, drivers: Drivers, reference: Reference, num_images: int) -> None:
    """With the server in order again, a rerun completes the table."""
    bucket.proxy.set_rules()
    images = reference.first(num_images)
    assert drivers.run(bucket.job("tar", images), bucket.env).status == 0
    assert reference.verdict(bucket.table(), images) == []


@pytest.mark.parametrize("fault", ["lose_reply", "busy_after"])
@pytest.mark.parametrize(
    "path", [NEW_TABLE, FIRST_COMMIT, SECOND_COMMIT, FRAGMENTS, LEASES, "/_probe", "/runs/", "/shard_index/"]
)
def test_a_put_whose_reply_is_lost_is_done_once(
    path: str, fault: Fault, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(14)
    job = bucket.job("tar", images)
    bucket.proxy.set_rules(Rule(fault, "PUT", path, times=1))
    ended = drivers.run(job, bucket.env)
    assert ended.status == 0, ended.stderr
    assert len(bucket.proxy.broken) == 1
    assert reference.verdict(bucket.table(), images) == []
    assert ended.summary["images"] == 14


@pytest.mark.parametrize("form", ["files", "tar"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("refuse", probability=0.01),
        Rule("refuse", probability=0.2),
        Rule("refuse", probability=0.2, code="InternalError"),
        Rule("reset", probability=0.1),
        Rule("lose_reply", probability=0.1),
        Rule("truncate", "GET", IMAGES, probability=0.2),
        Rule("shorten", "GET", IMAGES, probability=0.2),
        Rule("flip", "GET", IMAGES + "[a-z]", probability=0.2),
        Rule("slow", "GET", IMAGES, times=2, seconds=5),
        Rule("stall", "GET", IMAGES + "[a-z]", times=1, seconds=60),
    ],
    ids=[
        "busy-1%",
        "busy-20%",
        "500",
        "reset",
        "lost",
        "truncated",
        "shortened",
        "flipped",
        "slow",
        "stall",
    ],
)
def test_what_passes_costs_time_and_nothing_else(
    rule: Rule, form: str, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(24)
    job = bucket.job(form, images)
    bucket.proxy.set_rules(rule)
    ended = drivers.run(job, bucket.env)
    print(f"{form}: {len(bucket.proxy.broken)} of {len(bucket.proxy.requests)} requests broken")
    assert ended.status == 0, ended.stderr
    assert reference.verdict(bucket.table(), images) == []


@pytest.mark.parametrize(
    "path",
    [
        "_delta_log/0+0.json",
        "_delta_log/0+1.json",
        "_delta_log/_last_checkpoint",
    ],
)
def test_a_log_that_is_cut_short_on_the_way_is_read_again(
    path: str, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(14)
    job = bucket.job("tar", images)
    killed = drivers.run(job, {**bucket.env, "MASKLAKE_FAILPOINTS": "commit_done#2"})
    assert killed.status == -signal.SIGKILL
    bucket.proxy.set_rules(Rule("truncate", "GET", path, times=1))
    ended = drivers.run(job, bucket.env)
    assert len(bucket.proxy.broken) == 1
    assert ended.status == 0, ended.stderr
    assert reference.verdict(bucket.table(), images) == []


@pytest.mark.parametrize(
    "path",
    ["", FRAGMENTS, "_delta_log"],
)
def test_a_minute_without_the_server_is_waited_for(
    path: str, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(14)
    job = bucket.job("tar", images)
    bucket.proxy.set_rules(
        Rule("pass", "PUT", FIRST_COMMIT, times=1), Rule("refuse", "", path, skip=40, until_s=60)
    )
    ended = drivers.run(job, bucket.env)
    assert ended.status == 0, ended.stderr
    assert reference.verdict(bucket.table(), images) == []


def test_a_server_that_stays_away_ends_the_run_with_one_line(
    bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    job = bucket.job("tar", reference.first(14))
    bucket.proxy.set_rules(Rule("refuse", "", skip=60))
    ended = drivers.start(job, bucket.env).wait(1200)
    ended.check_clear_end(1)
    finish(bucket, drivers, reference, 14)


@pytest.mark.parametrize("fault", ["flip", "shorten"])
def test_an_object_that_is_damaged_for_good_fails_alone_and_has_no_labels(
    fault: Fault, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    images = reference.first(14)
    job = bucket.job("files", images, "failures.budget=100%")
    bucket.proxy.set_rules(Rule(fault, "GET", IMAGES + "image-0003"))
    assert drivers.run(job, bucket.env).status == 0
    table = bucket.table()
    (failed,) = (row for row in table.rows if row["status"] != "ok")
    assert (failed["image_id"], failed["error_kind"]) == ("image-0003.jpg", "corrupt")
    assert (failed["detections"], failed["content_hash"]) == (None, None)
    table.rows.remove(failed)
    del images["image-0003.jpg"]
    assert reference.verdict(table, images) == []


@pytest.mark.parametrize("fault", ["flip", "shorten", "truncate"])
@pytest.mark.parametrize("seed", range(4))
def test_damage_on_the_way_of_labels_makes_no_plan_wrong(
    seed: int, fault: Fault, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    """The second run reads the fragments of the first, to know what is done."""
    images = reference.first(14)
    job = bucket.job("tar", images)
    bucket.proxy.seed = seed
    killed = drivers.run(job, {**bucket.env, "MASKLAKE_FAILPOINTS": "commit_done#2"})
    assert killed.status == -signal.SIGKILL
    bucket.proxy.set_rules(Rule(fault, "GET", FRAGMENTS, probability=0.5))
    ended = drivers.run(job, bucket.env)
    bucket.proxy.set_rules()
    if ended.status != 0:
        ended.check_clear_end(1)
        assert drivers.run(job, bucket.env).status == 0
    assert reference.verdict(bucket.table(), images) == []


@pytest.mark.parametrize("skip", [0, 5, 20, 40, 60, 70, 80, 90])
def test_credentials_that_expire_end_the_run_with_one_line(
    skip: int, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    job = bucket.job("tar", reference.first(14))
    bucket.proxy.set_rules(Rule("refuse", code="ExpiredToken", skip=skip))
    ended = drivers.run(job, bucket.env)
    assert bucket.proxy.broken, "it was done before they expired"
    ended.check_clear_end(1, 2)
    assert bucket.table().problems == []
    finish(bucket, drivers, reference, 14)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("", IMAGES + "shard-1"),
        ("PUT", FRAGMENTS),
        ("PUT", "_delta_log"),
        ("PUT", FIRST_COMMIT),
        ("", LEASES),
        ("", "/runs/"),
        ("", "/shard_index/"),
    ],
)
def test_one_prefix_that_is_denied_ends_the_run_with_one_line(
    method: str, path: str, bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    job = bucket.job("tar", reference.first(14))
    bucket.proxy.set_rules(Rule("refuse", method, path, code="AccessDenied"))
    ended = drivers.run(job, bucket.env)
    assert bucket.proxy.broken
    ended.check_clear_end(1, 2)
    assert bucket.table().problems == []
    finish(bucket, drivers, reference, 14)


def test_a_clock_that_is_wrong_is_told_before_any_work(
    bucket: Bucket, drivers: Drivers, reference: Reference
) -> None:
    job = bucket.job("tar", reference.first(14))
    bucket.proxy.set_rules(Rule("refuse", code="RequestTimeTooSkewed"))
    ended = drivers.run(job, bucket.env)
    ended.check_clear_end(2)
    assert "this machine's clock" in ended.last_line
    finish(bucket, drivers, reference, 14)


@pytest.mark.parametrize("seed", range(SEED, SEED + 8))
def test_kills_in_bad_weather(
    seed: int,
    bucket: Bucket,
    drivers: Drivers,
    reference: Reference,
    tmp_path: Path,
) -> None:
    """A few of all faults at once, and the driver killed three times."""
    images = reference.first(20)
    job = bucket.job(("tar", "files", "parquet")[seed % 3], images)
    bucket.proxy.seed = seed
    bucket.proxy.set_rules(
        Rule("refuse", probability=0.03),
        Rule("reset", probability=0.02),
        Rule("lose_reply", probability=0.03),
        Rule("flip", "GET", IMAGES + "[a-z]", probability=0.05),
        Rule("truncate", "GET", IMAGES, probability=0.05),
    )
    kills = (Kill("commit_put#1", 0), Kill("unit_finished#2", 0), Kill(None, 2.0 + seed % 5))
    outcome = run_schedule(
        drivers, job, kills, tmp_path / "journal", lambda: bucket.table().ids(), bucket.env
    )
    print(
        f"seed {seed}: killed {outcome.num_killed}, {outcome.repeated} images repeated, "
        f"{len(bucket.proxy.broken)} of {len(bucket.proxy.requests)} requests broken"
    )
    assert outcome.problems == []
    assert reference.verdict(bucket.table(), images) == []
