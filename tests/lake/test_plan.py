"""The plan, jobs/lake/plan.py, and the shard index, jobs/lake/shard_index.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.lake import plan as plan_module
from jobs.lake.done_images import Known, ShardState, Standing
from jobs.lake.labels_table import LabelsTable
from jobs.lake.object_table import ObjectTable
from jobs.lake.plan import ShardTask, plan_failed, plan_shards
from jobs.lake.shard_index import load_shard_index, save_shard_index
from jobs.lake.sources import Shard, list_shards
from jobs.lake.storage import ObjectInfo, Storage
from schemas.specs import SourceSpec

MODEL = "lite-0123456789ab"
SOURCE = "s3://photos/2026"


class KnownImages:
    """Answers the plan's questions from a dict: shard -> image id -> whether it is done.

    changed: content_hash of images that were read from a version "v0".
    """

    def __init__(self, shards: dict[str, dict[str, bool]], changed: dict[str, bytes] | None = None) -> None:
        self._shards = shards
        self._changed = changed or {}

    def state(self, shard: str) -> ShardState:
        images = self._shards.get(shard, {})
        return ShardState(sum(images.values()), len(images) - sum(images.values()))

    def ids(self, shard: str, version: str) -> frozenset[str]:
        images = self._shards.get(shard, {}).items()
        return frozenset(i for i, done in images if done and not (version and i in self._changed))

    def contents(self, shard: str, version: str) -> dict[str, bytes]:
        return {
            i: h for i, h in self._changed.items() if i in self._shards.get(shard, {}) and version != "v0"
        }

    def open_ids(self, shard: str) -> frozenset[str]:
        return frozenset(image_id for image_id, done in self._shards.get(shard, {}).items() if not done)

    def known(self, objects: ObjectTable) -> Known:
        images = {image_id: done for shard in self._shards.values() for image_id, done in shard.items()}
        code = {None: Standing.NEW, True: Standing.DONE, False: Standing.RETRY}
        ids = [image_id for image_id, _ in objects]
        standing = [Standing.CHANGED if i in self._changed else code[images.get(i)] for i in ids]
        hashes = pa.array([self._changed.get(i) for i in ids], pa.binary(16))
        return Known(np.array(standing, np.int8), pa.chunked_array([hashes]))


def tar(name: str, version: str = "v1") -> Shard:
    uri = f"{SOURCE}/{name}"
    return Shard(uri, name, "tar", ObjectInfo(uri, 10, None, version))


def slice_of(*image_ids: str) -> Shard:
    objects = ObjectTable.of((i, ObjectInfo(f"{SOURCE}/{i}", 10, None, "v1")) for i in image_ids)
    return Shard(f"{SOURCE}/{image_ids[0]}", ".", "files", None, objects)


def test_no_shards_no_plan() -> None:
    assert list(plan_shards([], KnownImages({}), {})) == []


def test_a_new_source_is_planned_whole() -> None:
    shards = [tar("a.tar"), slice_of("1.jpg", "2.jpg")]
    assert list(plan_shards(shards, KnownImages({}), {})) == [ShardTask(shard) for shard in shards]


def test_to_try_failures_again_only_they_are_planned() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/2": False}, ".": {"1.jpg": False, "2.jpg": True}})
    shards = [tar("a.tar"), tar("b.tar"), slice_of("1.jpg", "2.jpg", "3.jpg")]
    (a_tar, single) = plan_failed(shards, done)
    assert (a_tar.shard.name, [image_id for image_id, _ in single.shard.objects]) == ("a.tar", ["1.jpg"])
    assert [image_id in a_tar.skip for image_id in ("a.tar/1", "a.tar/2", "a.tar/new")] == [True, False, True]


def test_the_unread_rest_of_a_shard_is_tried_again_with_all_that_may_be_in_it() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/#tail": False}})
    (task,) = plan_failed([tar("a.tar")], done)
    assert [image_id in task.skip for image_id in ("a.tar/1", "a.tar/#tail", "a.tar/2")] == [
        True,
        False,
        False,
    ]


def test_a_shard_is_left_out_once_a_run_read_it_to_its_end_and_committed_it() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/2": True}})
    assert list(plan_shards([tar("a.tar")], done, {("a.tar", "v1"): 2})) == []


def test_a_shard_whose_size_is_not_known_is_read_again_skipping_what_is_done() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/2": True}})
    skip = frozenset({"a.tar/1", "a.tar/2"})
    assert list(plan_shards([tar("a.tar")], done, {})) == [ShardTask(tar("a.tar"), skip)]


def test_a_shard_that_was_replaced_is_read_again() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/2": True}}, changed={"a.tar/1": b"1" * 16})
    plan = list(plan_shards([tar("a.tar", "v2")], done, {("a.tar", "v0"): 2}))
    assert plan == [ShardTask(tar("a.tar", "v2"), frozenset({"a.tar/2"}), {"a.tar/1": b"1" * 16})]


def test_a_complete_shard_with_images_to_retry_is_read_again_for_them() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True, "a.tar/2": False}})
    plan = list(plan_shards([tar("a.tar")], done, {("a.tar", "v1"): 2}))
    assert plan == [ShardTask(tar("a.tar"), frozenset({"a.tar/1"}))]


def test_rows_of_an_earlier_version_do_not_hide_images_to_retry() -> None:
    images = {"a.tar/old": True, "a.tar/1": True, "a.tar/2": False}
    plan = list(plan_shards([tar("a.tar")], KnownImages({"a.tar": images}), {("a.tar", "v1"): 2}))
    assert plan == [ShardTask(tar("a.tar"), frozenset({"a.tar/old", "a.tar/1"}))]


def test_a_table_that_lost_rows_wins_over_the_index() -> None:
    done = KnownImages({"a.tar": {"a.tar/1": True}})
    plan = list(plan_shards([tar("a.tar")], done, {("a.tar", "v1"): 2}))
    assert plan == [ShardTask(tar("a.tar"), frozenset({"a.tar/1"}))]


def test_an_empty_shard_is_read_once() -> None:
    assert list(plan_shards([tar("a.tar")], KnownImages({}), {("a.tar", "v1"): 0})) == []


def test_a_slice_comes_back_without_the_objects_that_are_done() -> None:
    done = KnownImages({".": {"1.jpg": True, "2.jpg": False, "4.jpg": True}})
    shards = [slice_of("1.jpg", "2.jpg", "3.jpg"), slice_of("4.jpg")]
    (left,) = plan_shards(shards, done, {})
    assert [image_id for image_id, _ in left.shard.objects] == ["2.jpg", "3.jpg"]
    assert (left.shard.name, left.skip) == (".", frozenset())


def test_objects_that_changed_travel_with_what_was_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "SLICE_IMAGES", 2)
    ids = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    done = KnownImages({".": dict.fromkeys(ids, True)}, changed={i: i.encode() * 3 + b"0" for i in ids[1:]})
    tasks = list(plan_shards([slice_of(*ids)], done, {}))
    assert [[*task.contents.items()] for task in tasks] == [
        [("2.jpg", b"2.jpg2.jpg2.jpg0"), ("3.jpg", b"3.jpg3.jpg3.jpg0")],
        [("4.jpg", b"4.jpg4.jpg4.jpg0")],
    ]


def test_what_is_left_of_many_slices_is_gathered_into_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "SLICE_IMAGES", 3)
    ids = [f"{number:02d}.jpg" for number in range(20)]
    done = KnownImages({".": {image_id: True for image_id in ids if int(image_id[:2]) % 2}})
    slices = [slice_of(*ids[:9]), slice_of(*ids[9:11]), slice_of(*ids[11:])]
    planned = [[image_id for image_id, _ in left.shard.objects] for left in plan_shards(slices, done, {})]
    assert [len(part) for part in planned] == [3, 3, 3, 1]
    assert [image_id for part in planned for image_id in part] == ids[::2]


def test_a_plan_is_lazy() -> None:
    def listing() -> Iterator[Shard]:
        yield tar("a.tar")
        raise AssertionError("the listing was read further than the plan was asked")

    plan = plan_shards(listing(), KnownImages({}), {})
    assert next(plan).shard == tar("a.tar")


def test_a_folder_that_grew_is_planned_for_its_new_images_only(
    storage: Storage,
    lake: str,
    tmp_path: Path,
    make_rows: Callable[..., pa.Table],
    add_labels: Callable[..., object],
) -> None:
    for number in range(1100):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number:04d}.jpg").touch()
    spec = SourceSpec(uri=f"file://{tmp_path}/photos")
    ids = [f"{number:04d}.jpg" for number in range(1100)]
    table = LabelsTable.open_or_create(lake, storage)
    rows = [make_rows(ids[i : i + 300], MODEL, source=spec.uri, shard=".") for i in range(0, 1100, 300)]
    add_labels(table, storage, *rows)
    assert list(plan_shards(list_shards(spec, storage), table.done_images(spec.uri, MODEL), {})) == []

    # New keys shift every slice of the listing after them.
    for name in ("0000a.jpg", "0600a.jpg", "zzz.jpg"):
        (tmp_path / "photos" / name).touch()
    plan = plan_shards(list_shards(spec, storage), table.done_images(spec.uri, MODEL), {})
    assert [i for task in plan for i, _ in task.shard.objects] == ["0000a.jpg", "0600a.jpg", "zzz.jpg"]


def test_the_shard_index_of_all_runs_is_read_back(storage: Storage, lake: str) -> None:
    assert load_shard_index(storage, lake, SOURCE, MODEL) == {}
    save_shard_index(storage, lake, SOURCE, MODEL, "run-1", {("a.tar", "v1"): 3})
    save_shard_index(storage, lake, SOURCE, MODEL, "run-1", {("a.tar", "v1"): 3, ("b.tar", "v1"): 0})
    save_shard_index(storage, lake, SOURCE, MODEL, "run-2", {("a.tar", "v2"): 4})
    save_shard_index(storage, lake, SOURCE, "other", "run-1", {("c.tar", "v1"): 5})
    save_shard_index(storage, lake, "s3://other", MODEL, "run-1", {("d.tar", "v1"): 6})
    assert load_shard_index(storage, lake, SOURCE, MODEL) == {
        ("a.tar", "v1"): 3,
        ("b.tar", "v1"): 0,
        ("a.tar", "v2"): 4,
    }


def test_a_damaged_shard_index_costs_a_warning_and_nothing_else(
    storage: Storage, lake: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_shard_index(storage, lake, SOURCE, MODEL, "run-1", {("a.tar", "v1"): 3})
    save_shard_index(storage, lake, SOURCE, MODEL, "run-2", {("b.tar", "v1"): 4})
    (damaged,) = (tmp_path / "lake" / "shard_index").glob("*/run-1.parquet")
    damaged.write_bytes(b"PAR1 not any more")
    with caplog.at_level(logging.WARNING):
        assert load_shard_index(storage, lake, SOURCE, MODEL) == {("b.tar", "v1"): 4}
    assert "run-1.parquet is damaged" in caplog.text


def test_the_shard_index_works_on_s3(s3_lake: tuple[str, Storage]) -> None:
    lake, storage = s3_lake
    assert load_shard_index(storage, lake, SOURCE, MODEL) == {}
    save_shard_index(storage, lake, SOURCE, MODEL, "run-1", {("a.tar", "v1"): 3})
    assert load_shard_index(storage, lake, SOURCE, MODEL) == {("a.tar", "v1"): 3}
