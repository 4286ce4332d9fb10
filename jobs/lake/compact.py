"""Compaction: many small files of labels become few large ones with the same rows.

Enters: the label table. Leaves: groups of neighbouring small files; one file for each group, which any
process may write; a version that names it in their place (rewrite.py). No row is dropped, older rows of an
image included, and readers of earlier versions find their files as before: vacuum removes those later.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.lake.done_images import LabelFile
from jobs.lake.fragments import FILE_SCHEMA, STATS_COLUMNS, delta_stats, labels_uri, partition_folder
from jobs.lake.labels_table import LabelsTable, first_line
from jobs.lake.rewrite import MergedFile, OldFile, Rewrite, replace_files
from jobs.lake.storage import CorruptObjectError, ObjectInfo, Storage
from schemas.labels import PARQUET_OPTIONS

# Delta readers open a file a task: smaller ones cost round trips, larger ones cannot be shared out.
TARGET_BYTES = 256 << 20
MIN_BYTES = TARGET_BYTES // 2
# So many small files are worth merging whatever their sizes.
_MANY_FILES = 32
# In memory: what a reader of all columns holds at a time, and some thousand rows of labels.
_ROW_GROUP_BYTES = 64 << 20
_READ_THREADS = 8
_MERGE_THREADS = 2  # each holds a merged file's bytes and some row groups
_GROUPS_PER_COMMIT = 8


@dataclass(frozen=True)
class Group:
    """Small files of one model, neighbours in the order of shard and image_id, to become one file."""

    model_id: str
    files: tuple[LabelFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def plan_compaction(
    table: LabelsTable, model_id: str | None = None, target_bytes: int = TARGET_BYTES
) -> list[Group]:
    """What to merge in the table's version, of one model or of all; [] where nothing is worth it."""
    files = sorted(table.files(model_id), key=lambda file: file.model_id)
    return [
        Group(model, group)
        for model, its_files in groupby(files, key=lambda file: file.model_id)
        for group in group_files(list(its_files), target_bytes)
    ]


def group_files(files: Sequence[LabelFile], target_bytes: int) -> list[tuple[LabelFile, ...]]:
    """Share out the files that are smaller than half the target into groups of about the target.

    A group has between half and twice the target. One of less than half is made where the largest of its
    files grows by half at least, or where it has 32 files: so a row is written anew a few times in its life,
    not at each run's end. Files of different sources are not mixed.

    Args:
        files: of one model, in any order.
    """
    small = sorted((file for file in files if file.size_bytes < target_bytes // 2), key=_place)
    groups = []
    for _, its_files in groupby(small, key=lambda file: file.sources):
        packed = list(_pack(its_files, target_bytes))
        if len(packed) > 1 and _size(packed[-1]) < target_bytes // 2:
            packed[-2:] = [packed[-2] + packed[-1]]
        groups += [group for group in packed if _is_worth_it(group, target_bytes)]
    return groups


def merge_group(group: Group, lake_uri: str, storage: Storage) -> MergedFile:
    """Write the rows of a group's files as one file, sorted by image_id; an orphan until it is committed.

    Memory holds about one row group, the files whose image_ids interlock, and the new file's bytes.

    Args:
        lake_uri: normalized.

    Raises:
        CorruptObjectError: a file has another number of rows than the log says, or is damaged. Nothing was
            written.
        StorageError: the store refused.
    """
    statistics: list[pa.Table] = []
    with tempfile.TemporaryFile(prefix="masklake-") as file:
        with pq.ParquetWriter(file, FILE_SCHEMA, **PARQUET_OPTIONS) as writer:
            for rows in _sorted_row_groups(group, lake_uri, storage):
                writer.write_table(rows, row_group_size=rows.num_rows)
                statistics.append(rows.select(STATS_COLUMNS))
        data = _content(file)
    flat = pa.concat_tables(statistics)
    path = f"{partition_folder(group.model_id)}/merged-{uuid.uuid4().hex}.parquet"
    storage.write_bytes(f"{labels_uri(lake_uri)}/{path}", data)
    return MergedFile(
        path=path,
        model_id=group.model_id,
        size_bytes=len(data),
        num_rows=flat.num_rows,
        written_at_ms=time.time_ns() // 1_000_000,
        stats_json=json.dumps(delta_stats(flat), allow_nan=False),
        replaces=tuple(OldFile(file.path, file.size_bytes) for file in group.files),
    )


def commit_compaction(
    table: LabelsTable, merged: Sequence[MergedFile], metadata: Mapping[str, str | int] | None = None
) -> Rewrite:
    """Make merged files visible in place of those they replace, in one version; see replace_files."""
    return replace_files(table, merged, {"purpose": "compaction", **(metadata or {})})


@dataclass(frozen=True)
class CompactionRun:
    """What run_compaction did. version: the table's, afterwards."""

    version: int
    num_old_files: int
    num_new_files: int
    num_rows: int
    num_bytes: int
    num_given_up: int
    seconds: float


Merge = Callable[[Sequence[Group], str, Storage], Sequence[MergedFile]]


def merge_on_threads(groups: Sequence[Group], lake_uri: str, storage: Storage) -> list[MergedFile]:
    """merge_group for each, in this process."""
    with ThreadPoolExecutor(_MERGE_THREADS) as pool:
        return list(pool.map(lambda group: merge_group(group, lake_uri, storage), groups))


def run_compaction(
    table: LabelsTable,
    lake_uri: str,
    storage: Storage,
    model_id: str | None = None,
    target_bytes: int = TARGET_BYTES,
    merge: Merge = merge_on_threads,
) -> CompactionRun:
    """Plan, merge and commit, a version for every _GROUPS_PER_COMMIT groups.

    Args:
        merge: how the groups of one version are merged.

    Raises:
        CorruptObjectError: a file is damaged; what was committed before stays.
        StorageError, CommitStateUnknownError: as merge_group and replace_files do.
    """
    started = time.monotonic()
    groups = plan_compaction(table, model_id, target_bytes)
    done: list[MergedFile] = []
    num_given_up = 0
    for start in range(0, len(groups), _GROUPS_PER_COMMIT):
        rewrite = commit_compaction(
            table, merge(groups[start : start + _GROUPS_PER_COMMIT], lake_uri, storage)
        )
        done += rewrite.done
        num_given_up += len(rewrite.given_up)
    return CompactionRun(
        version=table.version,
        num_old_files=sum(len(file.replaces) for file in done),
        num_new_files=len(done),
        num_rows=sum(file.num_rows for file in done),
        num_bytes=sum(file.size_bytes for file in done),
        num_given_up=num_given_up,
        seconds=time.monotonic() - started,
    )


def _place(file: LabelFile) -> tuple[str, ...]:
    """Shards first: of a Parquet source, whose ids say nothing of their shard, a plan asks shard by shard."""
    sources, shards, image_ids = file.sources, file.shards, file.image_ids
    return (sources.low or "", sources.high or "", shards.low or "", image_ids.low or "", file.path)


def _pack(files: Iterator[LabelFile], target_bytes: int) -> Iterator[tuple[LabelFile, ...]]:
    group: list[LabelFile] = []
    for file in files:
        group.append(file)
        if _size(group) >= target_bytes:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _size(files: Sequence[LabelFile]) -> int:
    return sum(file.size_bytes for file in files)


def _is_worth_it(group: Sequence[LabelFile], target_bytes: int) -> bool:
    if len(group) < 2:
        return False
    total = _size(group)
    largest = max(file.size_bytes for file in group)
    return total >= target_bytes // 2 or 3 * largest <= 2 * total or len(group) >= _MANY_FILES


def _sorted_row_groups(group: Group, lake_uri: str, storage: Storage) -> Iterator[pa.Table]:
    """All rows of a group in the order of image_id, older rows of an image first, a row group at a time.

    Files are read in the order of their first image_id. Rows below that of the next file can be given away,
    for nothing comes before them any more.
    """
    files = sorted(group.files, key=lambda file: file.image_ids.low or "")
    lows = [file.image_ids.low or "" for file in files]
    held: list[pa.Table] = []
    held_bytes, enough_bytes = 0, _ROW_GROUP_BYTES
    for number, rows in enumerate(_read_files(files, lake_uri, storage), 1):
        held.append(rows)
        held_bytes += rows.nbytes
        is_last = number == len(files)
        if held_bytes < enough_bytes and not is_last:
            continue
        table = pa.concat_tables(held)
        order = pc.sort_indices(table, [("image_id", "ascending"), ("labeled_at", "ascending")])
        sorted_ids = table["image_id"].take(order)
        end = len(table) if is_last else _num_below(sorted_ids, lows[number])
        rows_at_once = max(1, len(table) * _ROW_GROUP_BYTES // max(held_bytes, _ROW_GROUP_BYTES))
        num_given = end if is_last else end - end % rows_at_once
        for start in range(0, num_given, rows_at_once):
            yield table.take(order[start : min(start + rows_at_once, num_given)])
        held = [table.take(order[num_given:])] if num_given < len(table) else []
        held_bytes = sum(rows.nbytes for rows in held)
        enough_bytes = held_bytes + _ROW_GROUP_BYTES


def _read_files(files: Sequence[LabelFile], lake_uri: str, storage: Storage) -> Iterator[pa.Table]:
    """Each file's rows as FILE_SCHEMA, in the order given, read a little ahead."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for some in _pack(iter(files), _ROW_GROUP_BYTES):
            yield from pool.map(lambda file: _read_file(file, lake_uri, storage), some)


def _read_file(file: LabelFile, lake_uri: str, storage: Storage) -> pa.Table:
    uri = f"{labels_uri(lake_uri)}/{file.path}"
    data = storage.read_bytes(ObjectInfo(uri, file.size_bytes, None, ""))
    try:
        rows = pq.read_table(
            pa.BufferReader(data), schema=FILE_SCHEMA, partitioning=None, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise CorruptObjectError(f"{uri} does not read: {first_line(error)}; it was not merged") from error
    if file.num_rows not in (None, rows.num_rows):
        raise CorruptObjectError(
            f"{uri} has {rows.num_rows} rows, the table's log says {file.num_rows}; it was not merged"
        )
    return rows


def _num_below(sorted_ids: pa.ChunkedArray[Any], low: str) -> int:
    return bisect_left(range(len(sorted_ids)), low, key=lambda place: str(sorted_ids[place]))


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
