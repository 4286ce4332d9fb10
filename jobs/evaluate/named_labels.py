"""The labels of the images that have certain names, out of a table that may hold millions of others.

Enters: a version of the label table, a model_id, names. Leaves: those images' newest rows. Read are the image
ids of all of the model's files, then the rows of the files and row groups that may hold one of the images; in
memory are a few row groups.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from jobs.lake.done_images import LabelFile
from jobs.lake.labels_table import LabelsTable, first_line
from jobs.lake.newest_rows import create_newest_view, split_files
from jobs.lake.shards import image_name
from schemas.errors import StorageError

_BATCH_ROWS = 2048
_OBJECT_ROWS = 100  # rows at a time as Python objects, about a KiB a detection
_READERS = 16  # they wait for storage


def rows_of(
    table: LabelsTable, model_id: str, source: str | None, names: Container[str]
) -> Iterator[dict[str, Any]]:
    """Of each image with one of the names the newest row, unless that is a `removed` one, in no order.

    Args:
        source: as the rows have it; None: whatever the model labelled.
        names: as image_name() gives them.

    Returns:
        source, image_id, status, width, height, detections.

    Raises:
        StorageError: the store refused, or a file is damaged.
    """
    files = table.files(model_id)
    is_meant = pads.scalar(True)
    if source is not None:
        files = [file for file in files if file.sources.may_hold(source, source)]
        is_meant = pads.field("source") == pads.scalar(source)
    try:
        keys = table.dataset_of(files).to_batches(columns=["image_id"], filter=is_meant)
        all_ids = (str(image_id) for batch in keys for image_id in batch["image_id"].to_pylist())
        ids = sorted({image_id for image_id in all_ids if image_name(image_id) in names})
        is_meant &= pads.field("image_id").isin(pa.array(ids, pa.string()))
        files = [file for file in files if _may_hold(file.image_ids.low, file.image_ids.high, ids)]
        alone, others = (_dataset(table, part, ids).filter(is_meant) for part in split_files(files))
        connection = duckdb.connect()
        create_newest_view(connection, "labels", alone, others)
        query = "SELECT source, image_id, status, width, height, detections FROM labels"
        for batch in connection.sql(query).to_arrow_reader(_BATCH_ROWS):
            for start in range(0, len(batch), _OBJECT_ROWS):
                yield from batch.slice(start, _OBJECT_ROWS).to_pylist()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise StorageError(
            f"reading the labels of {model_id} at {table.uri} failed: {first_line(error)}; "
            "`masklake lake doctor` says whether they are damaged."
        ) from error


def _dataset(table: LabelsTable, files: Sequence[LabelFile], ids: Sequence[str]) -> pads.Dataset:
    """The row groups that may hold one of the ids, which are sorted.

    A scan filtered by a set passes over files and row groups by itself only while the set has at most 50
    values (pyarrow 26), and by a join not at all.
    """
    whole = table.dataset_of(files)
    assert isinstance(whole, pads.FileSystemDataset)
    fragments: list[pads.ParquetFileFragment] = list(whole.get_fragments())
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-footers") as pool:
        wanted = list(pool.map(lambda fragment: _row_groups(fragment, ids), fragments))
    parts: list[Any] = [  # the stubs of subset() are wrong
        fragment.subset(row_group_ids=numbers)
        for fragment, numbers in zip(fragments, wanted, strict=True)
        if numbers
    ]
    return pads.FileSystemDataset(parts, whole.schema, whole.format, whole.filesystem)


def _row_groups(fragment: pads.ParquetFileFragment, ids: Sequence[str]) -> list[int]:
    numbers = []
    for group in fragment.row_groups:
        bounds = (group.statistics or {}).get("image_id", {"min": None, "max": None})
        if _may_hold(bounds["min"], bounds["max"], ids):
            numbers.append(group.id)
    return numbers


def _may_hold(low: str | None, high: str | None, ids: Sequence[str]) -> bool:
    """Whether one of the sorted ids is between the bounds; None: not known."""
    place = 0 if low is None else bisect_left(ids, low)
    return place < len(ids) and (high is None or ids[place] <= high)
