"""Whether the images of a set can be read, jobs/train/readable_images.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.train.coco_json import CocoJson
from jobs.train.image_locations import ImageReader
from jobs.train.readable_images import check_images, told_of_row_groups
from jobs.train.training_set import TrainingSet, build
from schemas.errors import UsageError
from schemas.specs import SourceSpec
from tests.train.coco_files import (
    CATEGORIES,
    annotation,
    image,
    make_set,
    picture,
    storage,
    write_files,
    write_json,
)


def set_of(folder: Path, contents: list[bytes]) -> TrainingSet:
    write_files(folder / "images", {f"{n:02d}.png": content for n, content in enumerate(contents)})
    images = [image(n, f"{n:02d}.png") for n in range(len(contents))]
    return make_set(folder, images, [annotation(0)])


def check(data: TrainingSet, *, strict: bool = False) -> None:
    check_images("people", data, ImageReader(storage()), strict=strict)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"no picture", "unsupported"), (picture(0, 10, 10), "another_size .it has 10×10 pixels, its annotati")],
)
def test_a_set_of_which_no_image_can_be_read_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    data = set_of(tmp_path, [content] * 40)
    with pytest.raises(UsageError, match=f"people: 16 of 16 images that were tried .* 00.png: {problem}"):
        check(data)


def test_one_bad_image_is_refused_if_strict_only(tmp_path: Path) -> None:
    data = set_of(tmp_path, [picture(n) for n in range(5)] + [b"no picture"])
    check(data)
    with pytest.raises(UsageError, match=r"1 of 6 images that were tried cannot be read, first 05\.png"):
        check(data, strict=True)


@pytest.mark.parametrize(("rows_a_group", "is_told"), [(3, True), (1, False)])
def test_row_groups_that_would_be_read_for_each_of_their_images_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_a_group: int, is_told: bool
) -> None:
    table = pa.table({"id": [f"{n}.png" for n in range(6)], "image": [picture(n) for n in range(6)]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=rows_a_group)
    path = write_json(tmp_path, [image(n) for n in range(6)], [annotation(n) for n in range(6)])
    source = SourceSpec(uri=str(tmp_path / "images.parquet"), id_column="id")
    data = build(tmp_path / "set.arrow", CocoJson(str(path), source, storage()), CATEGORIES, storage())
    assert data.row_groups() == (6, 6 // rows_a_group, (tmp_path / "images.parquet").stat().st_size)
    assert list(told_of_row_groups("people", data)) == []
    monkeypatch.setattr("jobs.train.readable_images.DEFAULT_CACHE_BYTES", 1000)
    assert len(list(told_of_row_groups("people", data))) == is_told


def test_images_that_are_files_have_no_row_groups(tmp_path: Path) -> None:
    assert set_of(tmp_path, [picture(0)]).row_groups() == (0, 0, 0)
