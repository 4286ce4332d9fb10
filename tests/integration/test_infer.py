"""The main job, whole: sources of every form, from disk and over the wire, into a committed table."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Generator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from jobs.infer.job import prepare
from jobs.infer.label import Labeler
from jobs.infer.pipeline import FinishedUnit, Pipeline
from jobs.infer.progress import JsonWatcher
from jobs.infer.run import run_infer
from jobs.infer.summary import Summary
from jobs.infer.units import UnitReport
from jobs.lake.commit import app_id
from jobs.lake.compact import merge_on_threads
from jobs.lake.fragments import Fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.lease import Lease
from jobs.lake.storage import Storage
from schemas.errors import FailureBudgetExceeded, LeaseHeldError, StorageError, UsageError
from schemas.spec_loader import load_spec
from schemas.specs import InferSpec, StorageSpec

if TYPE_CHECKING:
    from tests.integration.conftest import S3Bucket

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own stages in this process, one after another: Ray's actors take 8 s to start."""

    def run_straight(pipeline: Pipeline) -> Generator[FinishedUnit, None, None]:
        read, write = pipeline.reader(), pipeline.writer()
        label = Labeler(pipeline.checkpoint, pipeline.replica, pipeline.lineage)
        for task in pipeline.tasks:
            for row in read.read_units(task):
                (written,) = write(label(row)).to_pylist()
                fragment = written["fragment"] and Fragment.from_row(json.loads(written["fragment"]))
                yield FinishedUnit(UnitReport.from_json(written["report"]), fragment)

    monkeypatch.setattr("jobs.infer.run.run_pipeline", run_straight)
    monkeypatch.setattr("jobs.infer.run.merge_on_ray", merge_on_threads)


FORMS = ("tar", "parquet", "files")


Place = tuple[Callable[[Path], str], StorageSpec]


def label(source: str, lake: str, *overrides: str, storage: StorageSpec | None = None) -> Summary:
    endpoint = [f"storage.endpoint_url={storage.endpoint_url}"] if storage and storage.endpoint_url else []
    spec = load_spec(
        InferSpec,
        None,
        # The demo's model has never seen a photograph: a low threshold lets it find something there.
        ["model.score_threshold=0.01", "model.max_detections=20", *endpoint, *overrides],
        **{"source.uri": source, "model.uri": "demo", "lake.uri": lake},
    )
    return run_infer(spec, JsonWatcher())


def rows(lake: str, storage: StorageSpec | None = None) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = (
        LabelsTable.open(lake, Storage(storage or StorageSpec())).dataset().to_table().to_pylist()
    )
    return table


def by_content(found: list[dict[str, Any]]) -> dict[bytes, Any]:
    """What the labels are, whatever the image is called and whenever it was labelled."""
    return {
        row["content_hash"]: (row["status"], row["width"], row["height"], row["max_score"], row["detections"])
        for row in found
    }


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_source(form: str, folder: Path, files: dict[str, bytes]) -> None:
    """The same images as two tars, two Parquet files, or single files."""
    folder.mkdir(parents=True)
    names = list(files)
    if form == "files":
        for name in names:
            (folder / name).write_bytes(files[name])
        return
    for shard in range(2):
        part = {name: files[name] for name in names[shard::2]}
        if form == "tar":
            write_tar(folder / f"shard-{shard}.tar", part)
        else:
            images = [{"bytes": data, "path": name} for name, data in part.items()]
            pq.write_table(pa.table({"image": images}), folder / f"part-{shard}.parquet")


def scene_files(num: int, first: int = 0) -> dict[str, bytes]:
    """Small JPEGs of blocks of colour, all different."""
    files = {}
    for index in range(first, first + num):
        blocks = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(data, "JPEG")
        files[f"image-{index:04d}.jpg"] = data.getvalue()
    return files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("straight")
def test_every_image_becomes_one_row_and_a_second_run_commits_nothing(form: str, tmp_path: Path) -> None:
    files = scene_files(9)
    write_source(form, tmp_path / "images", files)
    lake = str(tmp_path / "lake")
    summary = label(str(tmp_path / "images"), lake, "unit.max_images=2")
    assert (summary.status, summary.images, summary.ok, summary.failed) == ("done", 9, 9, 0)
    found = rows(lake)
    assert len({row["image_id"] for row in found}) == len(found) == 9
    assert {row["model_id"] for row in found} == {summary.model_id}
    again = label(str(tmp_path / "images"), lake)
    assert (again.status, again.images) == ("nothing_to_do", 0)
    assert again.committed_version == summary.committed_version


def test_a_job_over_the_wire_finds_and_leaves_everything_in_the_bucket(
    s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    write_source("tar", tmp_path / "images", scene_files(9))
    s3_bucket.upload(tmp_path / "images", prefix="images/")
    storage = StorageSpec(endpoint_url=s3_bucket.endpoint_url)
    source, lake = f"{s3_bucket.uri}/images/", f"{s3_bucket.uri}/lake"
    summary = label(source, lake, "unit.max_images=2", storage=storage)
    assert (summary.ok, len(rows(lake, storage))) == (9, 9)
    merged = LabelsTable.open(lake, Storage(storage))
    assert (summary.merged_files, len(merged.files()), merged.version) == (5, 1, summary.committed_version)
    assert label(source, lake, storage=storage).status == "nothing_to_do"
    kept = {key.split("/")[1] for key in s3_bucket.list_keys("lake/")}
    assert kept == {"labels", "runs", "shard_index", "leases", "models"}


@pytest.mark.usefixtures("straight")
def test_small_files_that_cannot_be_merged_are_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("no room for large files")

    write_source("tar", tmp_path / "images", scene_files(4))
    lake = str(tmp_path / "lake")
    monkeypatch.setattr("jobs.infer.run.merge_on_ray", fail)
    assert label(str(tmp_path / "images"), lake).status == "done"
    assert "small files were not merged (no room for large files)" in capsys.readouterr().err
    assert len(rows(lake)) == 4
    left = LabelsTable.open(lake, Storage(StorageSpec())).files()
    assert len(left) == 2
    (tmp_path / "images" / "third.tar").write_bytes((tmp_path / "images" / "shard-0.tar").read_bytes())
    assert label(str(tmp_path / "images"), lake, "commit.compact=false").merged_files == 0


@pytest.mark.usefixtures("straight")
def test_a_shard_that_was_copied_anew_is_read_and_found_done(tmp_path: Path) -> None:
    write_source("tar", tmp_path / "images", scene_files(4))
    lake = str(tmp_path / "lake")
    version = label(str(tmp_path / "images"), lake).committed_version
    for shard in (tmp_path / "images").iterdir():
        os.utime(shard, (1, 1))
    again = label(str(tmp_path / "images"), lake)
    assert (again.status, again.images, again.committed_version) == ("nothing_to_do", 0, version)


@pytest.mark.usefixtures("straight")
def test_only_new_images_are_labelled_the_next_time(tmp_path: Path) -> None:
    write_source("files", tmp_path / "images", scene_files(4))
    lake = str(tmp_path / "lake")
    label(str(tmp_path / "images"), lake)
    for name, data in scene_files(3, first=4).items():
        (tmp_path / "images" / name).write_bytes(data)
    assert label(str(tmp_path / "images"), lake).images == 3
    assert len(rows(lake)) == 7


@pytest.mark.usefixtures("straight")
def test_the_run_leaves_its_summary_and_its_spec_in_the_lake(tmp_path: Path) -> None:
    write_source("tar", tmp_path / "images", scene_files(3))
    summary = label(str(tmp_path / "images"), str(tmp_path / "lake"))
    record = tmp_path / "lake" / "runs" / summary.run_id
    stored = json.loads((record / "summary.json").read_text())
    assert stored["images"] == 3
    assert stored["versions"]["ray"].startswith("2.")
    assert stored["stage_seconds"]["label"] > 0
    respec = load_spec(InferSpec, str(record / "spec.yaml"))
    assert respec.model.score_threshold == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["coco_photos", "facades/val"])
def test_photographs_have_the_same_labels_whichever_way_they_come_in(
    folder: str, shared_data: Path, tmp_path: Path, photo_storage: Place
) -> None:
    place, storage = photo_storage
    photographs = {path.name: path.read_bytes() for path in sorted((shared_data / folder).rglob("*.jpg"))}
    assert len(photographs) in (99, 68)
    labels = {}
    for form in FORMS:
        write_source(form, tmp_path / form, photographs)
        source, lake = place(tmp_path / form), place(tmp_path / f"{form}-lake")
        summary = label(source, lake, storage=storage)
        found = rows(lake, storage)
        assert summary.ok == len(found) == len(photographs)
        labels[form] = by_content(found)
        assert len(labels[form]) == len(photographs)
        assert label(source, lake, storage=storage).status == "nothing_to_do"
    assert labels["tar"] == labels["parquet"] == labels["files"]
    detections = 0
    for _, width, height, _, found_here in labels["tar"].values():
        for detection in found_here:
            mask = coco_mask.decode({"size": [height, width], "counts": detection["rle"]})
            assert mask.shape == (height, width)
            assert mask.sum() == detection["area"]
            detections += 1
    assert detections > 100


def png_bomb() -> bytes:
    """A valid header that promises 100,000 x 100,000 pixels."""
    data = io.BytesIO()
    Image.new("RGB", (10, 10)).save(data, "PNG")
    header = bytearray(data.getvalue())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    return bytes(header)


def test_bad_images_become_failed_rows_and_the_good_ones_are_labelled(tmp_path: Path) -> None:
    good = scene_files(5)
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images" / "bad.tar", "w") as tar:
        for name, data in [
            *good.items(),
            ("zero.jpg", b""),
            ("cut.jpg", good["image-0000.jpg"][:600]),
            ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
            ("bomb.png", png_bomb()),
            ("image-0003.jpg", good["image-0004.jpg"]),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    lake = str(tmp_path / "lake")
    summary = label(str(tmp_path / "images"), lake, "failures.budget=100%")
    assert (summary.status, summary.ok, summary.failed) == ("done", 5, 5)
    failed = {row["image_id"].split("/")[-1]: row for row in rows(lake) if row["status"] == "failed"}
    assert {name: row["error_kind"] for name, row in failed.items()} == {
        "zero": "empty",
        "cut": "truncated",
        "page": "unsupported",
        "bomb": "too_large",
        "image-0003#2": "duplicate_key",
    }
    assert all(len(row["error"]) > 10 and row["detections"] is None for row in failed.values())
    assert summary.failed_by_kind == {
        "empty": 1,
        "truncated": 1,
        "unsupported": 1,
        "too_large": 1,
        "duplicate_key": 1,
    }


@pytest.mark.usefixtures("straight")
def test_a_failure_budget_that_is_exceeded_ends_the_run_with_everything_committed(tmp_path: Path) -> None:
    write_source("files", tmp_path / "images", {**scene_files(3), "zero.jpg": b""})
    lake = str(tmp_path / "lake")
    with pytest.raises(FailureBudgetExceeded, match=r"1 of 4 images failed \(1 empty\)"):
        label(str(tmp_path / "images"), lake)
    assert len(rows(lake)) == 4


@pytest.mark.usefixtures("straight")
def test_a_budget_in_images_ends_a_run_as_soon_as_it_is_passed(tmp_path: Path) -> None:
    bad = {f"bad-{number}.jpg": b"" for number in range(6)}
    write_source("files", tmp_path / "images", {**bad, **scene_files(6)})
    lake = str(tmp_path / "lake")
    with pytest.raises(FailureBudgetExceeded, match=r"over failures.budget 1; all are committed"):
        label(str(tmp_path / "images"), lake, "failures.budget=1", "unit.max_images=2")
    assert [row["status"] for row in rows(lake)] == ["failed"] * 2
    label(str(tmp_path / "images"), lake, "failures.budget=6")
    assert len(rows(lake)) == 12


@pytest.mark.usefixtures("straight")
def test_only_failures_are_tried_again_when_only_they_are_asked_for(tmp_path: Path) -> None:
    for form in ("files", "tar"):
        source, lake = tmp_path / form, str(tmp_path / f"{form}-lake")
        write_source(form, source, {"bad-1.jpg": b"", "bad-2.jpg": b"<html>", **scene_files(2)})
        label(str(source), lake, "failures.budget=100%")
        shutil.rmtree(source)
        write_source(form, source, {"bad-1.jpg": b"", "bad-2.jpg": b"<html>", **scene_files(3)})
        only_empty = ("failures.retry=[empty]", "failures.retry_only=true", "failures.budget=100%")
        assert label(str(source), lake, *only_empty).failed_by_kind == {"empty": 1}
        assert len(rows(lake)) == 5
        none = ("failures.retry=[timeout]", "failures.retry_only=true")
        assert label(str(source), lake, *none).status == "nothing_to_do"


@pytest.mark.usefixtures("straight")
def test_failures_are_tried_again_when_asked_or_when_their_object_is_another(tmp_path: Path) -> None:
    write_source("files", tmp_path / "images", {**scene_files(2), "late.jpg": b""})
    lake = str(tmp_path / "lake")
    label(str(tmp_path / "images"), lake, "failures.budget=100%")
    assert label(str(tmp_path / "images"), lake).status == "nothing_to_do"
    retried = label(str(tmp_path / "images"), lake, "failures.retry=[empty]", "failures.budget=100%")
    assert (retried.images, retried.failed) == (1, 1)
    (tmp_path / "images" / "late.jpg").write_bytes(scene_files(1, first=50)["image-0050.jpg"])
    changed = label(str(tmp_path / "images"), lake)
    assert (changed.images, changed.ok) == (1, 1)
    current = LabelsTable.open(lake, Storage(StorageSpec())).to_current(changed.model_id).to_arrow_table()
    assert current["status"].to_pylist() == ["ok"] * 3


@pytest.mark.usefixtures("straight")
def test_an_object_written_again_is_read_and_labelled_only_if_its_content_is_another(tmp_path: Path) -> None:
    images = scene_files(4)
    for form in ("files", "tar"):
        source, lake = tmp_path / form, str(tmp_path / f"{form}-lake")
        write_source(form, source, images)
        assert label(str(source), lake).images == 4
        shutil.rmtree(source)
        changed = {**images, "image-0001.jpg": scene_files(1, first=50)["image-0050.jpg"]}
        write_source(form, source, changed)
        again = label(str(source), lake)
        assert (again.images, again.unchanged) == (1, 3)
        (row,) = (row for row in rows(lake) if row["run_id"] == again.run_id)
        assert row["content_hash"] == blake2b(changed["image-0001.jpg"], digest_size=16).digest()


@pytest.mark.usefixtures("straight")
def test_another_threshold_is_another_model_beside_the_first(tmp_path: Path) -> None:
    write_source("tar", tmp_path / "images", scene_files(3))
    lake = str(tmp_path / "lake")
    first = label(str(tmp_path / "images"), lake)
    second = label(str(tmp_path / "images"), lake, "model.score_threshold=0.9")
    assert first.model_id != second.model_id
    assert len(rows(lake)) == 6


def test_a_source_that_is_not_there_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="source"):
        label(str(tmp_path / "nowhere"), str(tmp_path / "lake"))
    assert not (tmp_path / "lake").exists()


def test_a_second_run_at_the_same_time_is_told_who_is_at_work(tmp_path: Path) -> None:
    write_source("tar", tmp_path / "images", scene_files(2))
    spec = load_spec(
        InferSpec,
        None,
        **{"source.uri": str(tmp_path / "images"), "model.uri": "demo", "lake.uri": str(tmp_path / "lake")},
    )
    job = prepare(spec)
    with (
        Lease.acquire(job.storage, job.lake_uri, app_id(job.source_uri, job.model_id), "the night shift", 60),
        pytest.raises(LeaseHeldError, match="the night shift"),
    ):
        run_infer(spec, JsonWatcher())


def test_a_worker_that_cannot_write_ends_the_run_with_one_line(tmp_path: Path) -> None:
    write_source("tar", tmp_path / "images", scene_files(2))
    spec = load_spec(
        InferSpec,
        None,
        **{"source.uri": str(tmp_path / "images"), "model.uri": "demo", "lake.uri": str(tmp_path / "lake")},
    )
    partition = tmp_path / "lake" / "labels" / f"model_id={prepare(spec).model_id}"
    partition.parent.mkdir(parents=True)
    partition.write_text("a file where the partition's folder would stand")
    with pytest.raises(StorageError) as failure:
        run_infer(spec, JsonWatcher())
    assert len(str(failure.value).splitlines()) == 1
    assert "a worker could not write labels" in str(failure.value)
    assert partition.name in str(failure.value)
    (record,) = (tmp_path / "lake" / "runs").glob("*/summary.json")
    assert json.loads(record.read_text())["status"] == "failed"
