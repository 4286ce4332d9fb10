"""The rows of some images out of many, jobs/evaluate/named_labels.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.evaluate.named_labels import rows_of
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.errors import StorageError
from schemas.labels import PARQUET_OPTIONS
from tests.relabel.two_models import NEW, SOURCE, add_rows, found, label_rows

CAR = found(1, (4, 4, 40, 40), score=0.5)


def names(*numbers: int) -> set[str]:
    return {f"{number:03}" for number in numbers}


def damage_detections(path: Path, row_groups: set[int]) -> None:
    """Zeros for the detections of some row groups: who reads them fails."""
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for number in row_groups:
        for column in map(metadata.row_group(number).column, range(metadata.num_columns)):
            if column.path_in_schema.startswith("detections."):
                start = column.dictionary_page_offset or column.data_page_offset
                content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)


@pytest.mark.parametrize("source", [None, SOURCE])
def test_labels_of_other_images_are_not_read(
    table: LabelsTable,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
) -> None:
    """Two files with 120 images each in row groups of 30; 60 are wanted, more than pyarrow looks out for."""
    monkeypatch.setitem(PARQUET_OPTIONS, "row_group_size", 30)
    for first in (0, 120):
        add_rows(table, storage, label_rows({f"{n:03}.png": [CAR] for n in range(first, first + 120)}, NEW))
    files = sorted(table.files(), key=lambda file: file.image_ids.low or "")
    for file, row_groups in zip(files, ({1, 2}, {0, 1, 2, 3}), strict=True):
        damage_detections(tmp_path / "lake" / "labels" / file.path, row_groups)
    wanted = [*range(30), *range(90, 120)]
    rows = list(rows_of(table, NEW, source, names(*wanted)))
    assert sorted(row["image_id"] for row in rows) == [f"{number:03}.png" for number in wanted]
    assert all(row["detections"] == [CAR] for row in rows)
    with pytest.raises(StorageError, match=f"reading the labels of {NEW} at .*masklake lake doctor"):
        list(rows_of(table, NEW, source, names(45)))


def test_of_many_rows_of_an_image_the_newest_counts_wherever_it_is(
    table: LabelsTable, storage: Storage
) -> None:
    old: dict[str, Any] = {"001.png": [CAR], "002.png": [CAR], "003.png": [CAR], "004.png": None}
    for rows in (
        label_rows(old, NEW),
        label_rows({"001.png": [CAR, CAR], "003.png": None}, NEW, removed=["003.png"], at_s=2),
        label_rows({"001.png": []}, NEW, at_s=1),
    ):
        add_rows(table, storage, rows)
    rows_now = sorted(rows_of(table, NEW, SOURCE, names(1, 3, 4, 5)), key=lambda row: str(row["image_id"]))
    assert [(row["image_id"], row["status"], row["detections"]) for row in rows_now] == [
        ("001.png", "ok", [CAR, CAR]),
        ("004.png", "failed", None),
    ]


def test_a_name_that_nobody_has_and_none_at_all(table: LabelsTable, storage: Storage) -> None:
    assert list(rows_of(table, NEW, None, names(1))) == []
    add_rows(table, storage, label_rows({"001.png": [], "003.png": []}, NEW))
    assert list(rows_of(table, NEW, None, names(2))) == []
    assert list(rows_of(table, NEW, "s3://elsewhere", names(1))) == []
    assert list(rows_of(table, NEW, SOURCE, set())) == []
