"""Fragments: Parquet files of labels that no reader sees until a commit names them.

Enters: the rows of one or a few work units. Leaves: one file under a name that nobody else uses, and the
Fragment that says all a commit needs to know about it, so that the driver never opens the file.
"""

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.lake.storage import Storage
from schemas.errors import UsageError
from schemas.labels import LABEL_SCHEMA, PARQUET_OPTIONS, Status, check_labels

PARTITION_COLUMN = "model_id"
FILE_SCHEMA: pa.Schema = LABEL_SCHEMA.remove(LABEL_SCHEMA.get_field_index(PARTITION_COLUMN))

# Flat columns that a plan or a query prunes files by. Nested columns have no minimum in Delta; hashes prune
# nothing.
STATS_COLUMNS = (
    "image_id",
    "source",
    "shard",
    "width",
    "height",
    "status",
    "error_kind",
    "run_id",
    "labeled_at",
    "num_detections",
    "max_score",
)
_FRAGMENT_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.parquet")
_MAX_STATS_CHARS = 255
_LAST_CHAR = "\U0010ffff"


@dataclass(frozen=True)
class Fragment:
    """A written file, as a commit will name it.

    path: relative to the table, as the store has it (the partition value is percent-encoded in it once).
    unit_ids: the work units whose rows it holds, all of them whole.
    stats_json: statistics as the Delta protocol wants them in an Add action.
    """

    path: str
    model_id: str
    unit_ids: tuple[str, ...]
    size_bytes: int
    num_rows: int
    num_ok: int
    num_failed: int
    written_at_ms: int
    stats_json: str

    def to_row(self) -> dict[str, Any]:
        """One row of FRAGMENT_SCHEMA, to travel between tasks."""
        return {**vars(self), "unit_ids": list(self.unit_ids)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Fragment":
        """Undo to_row, also where the journey made NumPy values of the row's."""
        return cls(
            path=str(row["path"]),
            model_id=str(row["model_id"]),
            unit_ids=tuple(str(unit_id) for unit_id in row["unit_ids"]),
            size_bytes=int(row["size_bytes"]),
            num_rows=int(row["num_rows"]),
            num_ok=int(row["num_ok"]),
            num_failed=int(row["num_failed"]),
            written_at_ms=int(row["written_at_ms"]),
            stats_json=str(row["stats_json"]),
        )


FRAGMENT_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("unit_ids", pa.list_(pa.string()), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_ok", pa.int64(), nullable=False),
        pa.field("num_failed", pa.int64(), nullable=False),
        pa.field("written_at_ms", pa.int64(), nullable=False),
        pa.field("stats_json", pa.string(), nullable=False),
    ]
)


def labels_uri(lake_uri: str) -> str:
    """Where the label table of a lake stands."""
    return f"{lake_uri}/labels"


def write_fragment(
    rows: pa.Table, unit_ids: Sequence[str], lake_uri: str, model_id: str, storage: Storage
) -> Fragment:
    """Write the rows of whole work units as one Parquet file, sorted by image_id.

    Args:
        rows: LABEL_SCHEMA, columns in any order, at least one row; every row's model_id is `model_id`.
        unit_ids: the units that the rows are the whole of, at least one.
        lake_uri: normalized.

    Returns:
        The fragment. Until it is committed the file is an orphan that readers do not see; writing the same
        rows again makes another file.

    Raises:
        SchemaMismatchError: the rows are not labels. Nothing was written.
        UsageError: the model_id cannot be a partition.
        StorageError: the store refused.
    """
    check_labels(rows.schema, f"a fragment of unit {unit_ids[0]}")
    check_model_id(model_id)
    assert rows.num_rows > 0, f"unit {unit_ids[0]} has no rows"
    assert pc.unique(rows["model_id"]).to_pylist() == [model_id], (
        f"rows of unit {unit_ids[0]}: other model_id"
    )
    table = rows.select(FILE_SCHEMA.names).cast(FILE_SCHEMA).sort_by("image_id")
    assert len(pc.unique(table["image_id"])) == len(table), f"unit {unit_ids[0]} holds an image twice"

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, **PARQUET_OPTIONS)
    data = buffer.getvalue().to_pybytes()
    path = f"{partition_folder(model_id)}/{_unit_hash(unit_ids)}-{uuid.uuid4().hex}.parquet"
    storage.write_bytes(f"{labels_uri(lake_uri)}/{path}", data)
    return Fragment(
        path=path,
        model_id=model_id,
        unit_ids=tuple(unit_ids),
        size_bytes=len(data),
        num_rows=table.num_rows,
        num_ok=_count(table, Status.OK),
        num_failed=_count(table, Status.FAILED),
        written_at_ms=time.time_ns() // 1_000_000,
        stats_json=json.dumps(delta_stats(table), allow_nan=False),
    )


def is_fragment(path: str) -> bool:
    """Whether a file of the table is called as write_fragment calls them: such a one has each image once."""
    return _FRAGMENT_NAME.fullmatch(path.rpartition("/")[2]) is not None


def check_model_id(model_id: str) -> None:
    """Raise UsageError where a model_id cannot be the name of a partition; most characters can."""
    # An empty partition value reads back as null, and stores take keys up to 1024 bytes, disks names up to
    # 255.
    if not model_id or not model_id.isprintable() or len(partition_folder(model_id)) > 255:
        raise UsageError(
            f"model_id {model_id!r} cannot name a partition of the label table: it must be printable, not "
            f"empty and, percent-encoded, at most 246 characters long. Give the checkpoint a plainer name."
        )


def delta_stats(table: pa.Table) -> dict[str, Any]:
    """Statistics of one file for its Add action: numRecords, and minValues, maxValues, nullCount of flat
    columns.

    A column without any value, or without a finite one, has no minimum and maximum. Strings compare as UTF-8
    bytes.

    Source: Delta protocol, "Per-file Statistics" (which also asks for milliseconds in timestamps).
    """
    minima: dict[str, Any] = {}
    maxima: dict[str, Any] = {}
    for name in STATS_COLUMNS:
        bounds = pc.min_max(table[name])
        low = _bound(bounds["min"].as_py(), upper=False)
        high = _bound(bounds["max"].as_py(), upper=True)
        if low is not None:
            minima[name] = low
        if high is not None:
            maxima[name] = high
    nulls = {name: table[name].null_count for name in STATS_COLUMNS}
    return {"numRecords": table.num_rows, "minValues": minima, "maxValues": maxima, "nullCount": nulls}


def _bound(value: Any, upper: bool) -> str | float | None:
    """A value that nothing in the file is below, or above, as JSON has it; None where none can be given."""
    if isinstance(value, datetime):
        up_to_ms = timedelta(microseconds=999 if upper else 0)
        return (value + up_to_ms).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    if isinstance(value, str) and len(value) > _MAX_STATS_CHARS:
        prefix, next_char = value[:_MAX_STATS_CHARS], value[_MAX_STATS_CHARS]
        if not upper:
            return prefix
        return None if next_char == _LAST_CHAR else prefix + _LAST_CHAR  # the prefix alone would be too low
    if isinstance(value, float) and not math.isfinite(value):
        return None
    bound: str | float | None = value
    return bound


def _count(table: pa.Table, status: Status) -> int:
    return table["status"].to_pylist().count(status)


def partition_folder(model_id: str) -> str:
    """As Hive names it: readers that look at paths only (DuckDB, pyarrow) undo the percent-encoding."""
    return f"{PARTITION_COLUMN}={quote(model_id, safe='')}"


def _unit_hash(unit_ids: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(unit_ids).encode(), digest_size=8).hexdigest()
