"""One file of the label table against what the log says of it and what its rows must be.

Enters: a file as the log has it. Leaves: findings, counts, and the keys of its rows for the comparison with
other files. A file is read in batches, with the checksum of every page compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.care.findings import Findings
from jobs.care.rows import FLAT_COLUMNS, detection_faults, flat_faults
from jobs.lake.fragments import FILE_SCHEMA, PARTITION_COLUMN
from jobs.lake.labels_table import LabelsTable, first_line
from jobs.lake.storage import ObjectInfo, Storage

KEY_COLUMNS = ("image_id", "source", "shard", "status", "content_hash", "run_id", "labeled_at")
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class LoggedFile:
    """A file as the log has it; statistics that the log does not have are absent or None."""

    path: str
    model_id: str
    size_bytes: int
    num_rows: int | None
    minima: dict[str, Any]
    maxima: dict[str, Any]
    null_counts: dict[str, int]


@dataclass
class FileCheck:
    """What came of reading one file.

    keys: KEY_COLUMNS and model_id of its rows, as far as they could be read.
    """

    findings: Findings = field(default_factory=Findings)
    num_rows: int = 0
    num_masks: int = 0
    num_masks_checked: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    keys: pa.Table | None = None


def logged_files(table: LabelsTable) -> list[LoggedFile]:
    """Every file that the table's version names."""
    rows = pa.table(table.delta.get_add_actions(flatten=True)).to_pylist()
    return [_logged_file(row) for row in rows]


def check_file(table_uri: str, file: LoggedFile, storage: Storage, whole: bool) -> FileCheck:
    """Read a file and compare.

    Args:
        whole: with its detections; their masks are decoded and compared with image and area.
    """
    check = FileCheck()
    flat: list[pa.Table] = []
    try:
        info = ObjectInfo(f"{table_uri}/{file.path}", file.size_bytes, None, "")
        with closing(storage.open_unverified(info)) as stream:
            for rows in _batches(stream, whole):
                flat.append(rows.select(FLAT_COLUMNS))
                if whole:
                    _add_faults(check, detection_faults(rows), rows, file)
                    check.num_masks_checked += _sum(rows["num_detections"])
    except Exception as error:  # whatever a damaged file, or the store, makes the reader raise
        check.findings.add("a file that does not read", f"{file.path} ({first_line(error)})")
    if not flat:
        return check
    rows = pa.concat_tables(flat)
    check.num_rows = rows.num_rows
    check.num_masks = _sum(rows["num_detections"])
    for status, count in zip(*pc.value_counts(rows["status"]).flatten(), strict=True):
        check.statuses[str(status)] += count.as_py()
    check.keys = rows.select(KEY_COLUMNS).append_column(
        PARTITION_COLUMN, pa.repeat(pa.scalar(file.model_id), rows.num_rows)
    )
    _add_faults(check, flat_faults(rows), rows, file)
    _compare_statistics(check, rows, file)
    return check


def _batches(stream: Any, whole: bool) -> Iterator[pa.Table]:
    reader = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
    columns = list(FILE_SCHEMA.names if whole else FLAT_COLUMNS)
    schema = pa.schema([FILE_SCHEMA.field(name).with_nullable(True) for name in columns])
    for batch in reader.iter_batches(_BATCH_ROWS, columns=columns):
        yield pa.Table.from_batches([batch]).select(columns).cast(schema)


def _compare_statistics(check: FileCheck, rows: pa.Table, file: LoggedFile) -> None:
    if file.num_rows is not None and file.num_rows != rows.num_rows:
        problem = f"{file.path} has {rows.num_rows} rows, the log says {file.num_rows}"
        check.findings.add("a file with another number of rows than the log says", problem)
    for name in FLAT_COLUMNS:
        bounds = pc.min_max(rows[name]) if name in file.minima or name in file.maxima else None
        low, high = file.minima.get(name), file.maxima.get(name)
        holds = (
            bounds is None
            or bounds["min"].as_py() is None
            or (
                (low is None or low <= bounds["min"].as_py())
                and (high is None or bounds["max"].as_py() <= high)
            )
        )
        nulls = file.null_counts.get(name)
        if not holds or nulls not in (None, rows[name].null_count):
            check.findings.add("statistics in the log that do not hold", f"{name} of {file.path}")


def _add_faults(
    check: FileCheck, faults: Iterator[tuple[str, Any]], rows: pa.Table, file: LoggedFile
) -> None:
    for kind, places in faults:
        if len(places):
            example = f"image {rows['image_id'][int(places[0])].as_py()!r} in {file.path}"
            check.findings.add(kind, example, len(places))


def _logged_file(row: dict[str, Any]) -> LoggedFile:
    def statistics(prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value
            for name, value in row.items()
            if name.startswith(prefix) and value is not None
        }

    return LoggedFile(
        path=unquote(row["path"]),  # the log percent-encodes paths
        model_id=row[f"partition.{PARTITION_COLUMN}"],
        size_bytes=row["size_bytes"],
        num_rows=row.get("num_records"),
        minima=statistics("min."),
        maxima=statistics("max."),
        null_counts=statistics("null_count."),
    )


def _sum(column: pa.ChunkedArray[Any]) -> int:
    return int(pc.sum(column).as_py() or 0)
