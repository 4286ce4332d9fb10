"""Rows that need no network, jobs/relabel/upkeep.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.lake.commit import app_id
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.storage import Storage
from jobs.relabel.upkeep import Upkeep, Upkept
from jobs.relabel.worklist import RemovedImages
from schemas.errors import LeaseHeldError
from tests.lake.conftest import make_label_rows

MODEL, SOURCE = "lite-0123456789ab", "s3://photos/2026"

AddLabels = Callable[..., object]


@pytest.fixture
def upkeep(table: LabelsTable, storage: Storage, add_labels: AddLabels) -> Upkeep:
    ids = ["a", "b", "c"]
    other = make_label_rows(["a"], MODEL, source="s3://other")
    add_labels(table, storage, make_label_rows(ids, MODEL, object_version="v1"), other)
    return Upkeep(table.uri.removesuffix("/labels"), storage, SOURCE, MODEL, "relabel-1")


def test_nothing_to_do_commits_nothing(upkeep: Upkeep, table: LabelsTable) -> None:
    assert upkeep.apply([], {}) == Upkept(None, 0)
    table.refresh()
    assert table.version == 1


def test_what_is_gone_leaves_the_labels_and_stays_in_the_table(upkeep: Upkeep, table: LabelsTable) -> None:
    gone = [RemovedImages("shard-000.tar", ["a", "c"]), RemovedImages("other.tar", ["never-there"])]
    done = upkeep.apply(gone, {})
    table.refresh()
    assert (done, table.version) == (Upkept(2, 3), 2)
    left = table.to_current(MODEL).order("source, image_id").select("source, image_id, status").fetchall()
    assert left == [("s3://other", "a", "ok"), (SOURCE, "b", "ok")]
    assert table.dataset(MODEL).count_rows() == 7
    assert upkeep.apply([RemovedImages("shard-000.tar", ["b"])], {}) == Upkept(3, 1)


def test_an_image_that_was_found_in_another_shard_stays(
    upkeep: Upkeep, table: LabelsTable, storage: Storage, add_labels: AddLabels
) -> None:
    """As of a Parquet source with an id_column that was written anew under another name."""
    add_labels(
        table, storage, make_label_rows(["a", "b"], MODEL, shard="new.parquet", at_us=1_800_000_000_000_000)
    )
    gone = [RemovedImages("shard-000.tar", ["c", "b", "a"])]
    assert upkeep.apply(gone, {}).num_removed == 1
    table.refresh()
    left = table.to_current(MODEL).filter(f"source = '{SOURCE}'").order("image_id").select("image_id, shard")
    assert left.fetchall() == [("a", "new.parquet"), ("b", "new.parquet")]


def test_an_object_with_the_old_content_gets_the_old_labels_and_its_own_version(
    upkeep: Upkeep, table: LabelsTable
) -> None:
    before = table.to_current(MODEL).filter("source = 's3://photos/2026'").order("image_id").to_arrow_table()
    upkeep.apply([], {"a": "v2", "b": "v3", "unknown": "v9"})
    table.refresh()
    after = table.to_current(MODEL).filter("source = 's3://photos/2026'").order("image_id").to_arrow_table()
    assert after["object_version"].to_pylist() == ["v2", "v3", "v1"]
    assert after["run_id"].to_pylist() == ["relabel-1", "relabel-1", "run-1"]
    for name in ("image_id", "content_hash", "status", "detections", "shard", "width"):
        assert after[name].to_pylist() == before[name].to_pylist()
    assert after["labeled_at"][0].as_py() > before["labeled_at"][0].as_py()


def test_a_label_job_at_work_on_the_same_is_left_alone(upkeep: Upkeep, storage: Storage) -> None:
    with (
        Lease.acquire(storage, upkeep.lake_uri, app_id(SOURCE, MODEL), "infer-1", 60),
        pytest.raises(LeaseHeldError, match="infer-1"),
    ):
        upkeep.apply([RemovedImages("shard-000.tar", ["a"])], {})
