"""The labels of two models side by side: of each image the newest row of either, in the order of image_id.

Enters: a version of the label table, a source, two model_ids. Leaves: the rows, a range of image_ids at a
time. Memory holds the ranges that are being read and the files that reach beyond them, whatever the table's
size.

A range ends where a file begins, so that files in the order of image_id, as runs and compaction leave them,
are read once. Where files interlock too much for that (a shuffled list of images), ranges are cut by the ids
of a sample, and large files are read again for each range.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import ceil
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from jobs.lake.done_images import LabelFile
from jobs.lake.labels_table import LabelsTable, first_line
from jobs.lake.storage import CORRUPT_TRIES, CorruptObjectError
from schemas.labels import DETECTION_TYPE, LABEL_SCHEMA, Status

# A range has about so much of both models: with masks some hundred megabytes as Arrow, and a second's work. A
# file larger than that is read a row group at a time.
_RANGE_BYTES = 32 << 20
_RANGE_ROWS = 50_000
# Where files of more than so many ranges interlock, ranges are cut by sampled ids.
_MAX_LOAD = 8.0
_SAMPLED_PARTS = 64
_SAMPLED_ROWS = 16  # each so manieth
# What reaches over more ranges than this is read again for each, but for the small files, which stay in
# memory as long as together they are no more than _MAX_LOAD ranges.
_FEW_RANGES = 4
_READERS = 16  # they wait for storage

_KEYS = ("image_id", "source", "labeled_at", "status", "content_hash")
_LAST = "\U0010ffff"


@dataclass(frozen=True)
class RowsOfBoth:
    """The newest rows of one range, each image once, in the order of image_id, `removed` left out.

    old, new: image_id, status, content_hash and detections (null unless ok; without rle unless asked for).
    """

    old: pa.Table
    new: pa.Table


@dataclass(frozen=True, eq=False)
class _Part:
    """What is read at once: a file of one model, or one row group of it; low, high: its image_ids.

    load: how many ranges' worth it is.
    """

    model_id: str
    fragment: pads.ParquetFileFragment
    file: LabelFile
    row_group: int | None
    low: str
    high: str
    load: float


class PairedLabels:
    """The labels of one source by two models. A context manager; read() may be called by several threads.

    Args:
        table: at the version that is to be read.
        masks: whether detections come with their rle.
    """

    def __init__(
        self, table: LabelsTable, source: str, old_model_id: str, new_model_id: str, *, masks: bool
    ) -> None:
        self._source = source
        self._models = (old_model_id, new_model_id)
        self._schema = _row_schema(masks)
        self._columns = [*_KEYS, *_leaf_columns(masks)]
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-labels")
        self._parts = sorted(self._find_parts(table), key=lambda part: part.low)
        self._cuts = _cuts_at_files(self._parts)
        if max(_loads(self._parts, self._cuts), default=0) > _MAX_LOAD:
            self._cuts = self._cuts_at_samples()
        spans = [_span(part, self._cuts) for part in self._parts]
        self._ranges: list[list[_Part]] = [[] for _ in self._cuts]
        for part, span in zip(self._parts, spans, strict=True):
            for number in span:
                self._ranges[number].append(part)
        self._lock = threading.Lock()
        self._num_wanted = dict(_kept(self._parts, spans))  # by how many ranges yet, those that are kept
        self._reads: dict[_Part, Future[pa.Table]] = {}

    def __enter__(self) -> PairedLabels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def num_ranges(self) -> int:
        return len(self._cuts)

    def read(self, number: int) -> RowsOfBoth:
        """The rows of one range. Ask for each range once, and for neighbours at about one time.

        Raises:
            CorruptObjectError: a file is damaged. StorageError: the store refused.
        """
        low = self._cuts[number]
        high = self._cuts[number + 1] if number + 1 < len(self._cuts) else None
        reads = [(part.model_id, self._start(part)) for part in self._ranges[number]]
        rows: dict[str, list[pa.Table]] = {
            model_id: [self._schema.empty_table()] for model_id in self._models
        }
        for model_id, read in reads:
            rows[model_id].append(_between(read.result(), low, high))
        old, new = (_newest(pa.concat_tables(rows[model_id])) for model_id in self._models)
        return RowsOfBoth(old, new)

    def _start(self, part: _Part) -> Future[pa.Table]:
        with self._lock:
            if part not in self._num_wanted:
                return self._pool.submit(self._read, part)
            read = self._reads.pop(part, None) or self._pool.submit(self._read, part)
            self._num_wanted[part] -= 1
            if self._num_wanted[part]:
                self._reads[part] = read
            return read

    def _read(self, part: _Part) -> pa.Table:
        """The rows of the source, in the order of image_id."""
        rows = _read_columns(part, self._columns)
        if part.file.sources.only != self._source:
            rows = rows.filter(pc.equal(rows["source"], pa.scalar(self._source)))
        if not _is_ascending(rows["image_id"]):  # not a file of ours
            rows = rows.sort_by("image_id")
        return rows.select(self._schema.names).cast(self._schema)

    def _find_parts(self, table: LabelsTable) -> Iterator[_Part]:
        for model_id in dict.fromkeys(self._models):
            files = table.files(model_id)
            fragments = list(table.dataset(model_id).get_fragments())
            mine = [
                (model_id, fragment, file)
                for fragment, file in zip(fragments, files, strict=True)
                if file.sources.may_hold(self._source, self._source)
            ]
            for parts in self._pool.map(lambda args: list(_parts_of(*args)), mine):
                yield from parts

    def _cuts_at_samples(self) -> list[str]:
        sampled = self._parts[:: -(-len(self._parts) // _SAMPLED_PARTS)]
        ids = sorted(chain.from_iterable(self._pool.map(_sample_ids, sampled)))
        num_ranges = ceil(sum(part.load for part in self._parts))
        return sorted({"", *(ids[number * len(ids) // num_ranges] for number in range(1, num_ranges))})


def _row_schema(masks: bool) -> pa.Schema:
    fields = [field for field in DETECTION_TYPE if masks or field.name != "rle"]
    detections = pa.list_(pa.field("element", pa.struct(fields), nullable=False))
    names = [name for name in _KEYS if name != "source"]
    return pa.schema(
        [*(LABEL_SCHEMA.field(name) for name in names), pa.field("detections", detections)],
    )


def _leaf_columns(masks: bool) -> list[str]:
    fields = ["category_id", "score", "box.x0", "box.y0", "box.x1", "box.y1", "area", *["rle"] * masks]
    return [f"detections.list.element.{name}" for name in fields]


def _parts_of(model_id: str, fragment: pads.ParquetFileFragment, file: LabelFile) -> Iterator[_Part]:
    assert fragment.path.endswith(file.path), f"{fragment.path} is not {file.path}"
    low, high = bounds = file.image_ids.low or "", file.image_ids.high or _LAST
    if file.size_bytes <= _RANGE_BYTES:
        yield _Part(model_id, fragment, file, None, low, high, _load(file.size_bytes, file.num_rows or 0))
        return
    with pq.ParquetFile(fragment.path, filesystem=fragment.filesystem) as parquet:
        metadata = parquet.metadata
        column = metadata.schema.names.index("image_id")
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            low, high = bounds
            statistics = group.column(column).statistics
            if statistics is not None and statistics.has_min_max:
                low, high = str(statistics.min), str(statistics.max)
            num_bytes = file.size_bytes * group.num_rows // max(1, metadata.num_rows)
            yield _Part(model_id, fragment, file, number, low, high, _load(num_bytes, group.num_rows))


def _load(num_bytes: int, num_rows: int) -> float:
    return max(num_bytes / _RANGE_BYTES, num_rows / _RANGE_ROWS)


def _cuts_at_files(parts: Sequence[_Part]) -> list[str]:
    """Where each range begins; the first holds all that comes before it, too."""
    cuts, load = [""], 0.0
    for part in parts:
        if load >= 1 and part.low > cuts[-1]:
            cuts.append(part.low)
            load = 0.0
        load += part.load
    return cuts


def _span(part: _Part, cuts: Sequence[str]) -> range:
    """The ranges that have rows of a part."""
    return range(bisect_right(cuts, part.low) - 1, bisect_right(cuts, part.high))


def _loads(parts: Sequence[_Part], cuts: Sequence[str]) -> list[float]:
    loads = [0.0] * len(cuts)
    for part in parts:
        for number in _span(part, cuts):
            loads[number] += part.load
    return loads


def _kept(parts: Sequence[_Part], spans: Sequence[range]) -> Iterator[tuple[_Part, int]]:
    """The parts that stay in memory from the first of their ranges to the last, and how many those are."""
    load = 0.0
    for part, span in sorted(zip(parts, spans, strict=True), key=lambda pair: pair[0].load):
        if len(span) <= _FEW_RANGES:
            yield part, len(span)
        elif load + part.load <= _MAX_LOAD:
            load += part.load
            yield part, len(span)


def _read_columns(part: _Part, columns: list[str]) -> pa.Table:
    """Read again where the file's checksums say that it was damaged on the way."""
    problem = ""
    for _ in range(CORRUPT_TRIES):
        try:
            with pq.ParquetFile(
                part.fragment.path, filesystem=part.fragment.filesystem, page_checksum_verification=True
            ) as parquet:
                if part.row_group is None:
                    return parquet.read(columns, use_threads=False)
                return parquet.read_row_group(part.row_group, columns, use_threads=False)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            problem = first_line(error)
    raise CorruptObjectError(
        f"label file {part.fragment.path} is damaged: {problem}; `masklake lake doctor` says what else is"
    )


def _sample_ids(part: _Part) -> list[str]:
    ids = _read_columns(part, ["image_id"])["image_id"]
    return [str(image_id) for image_id in ids.take(np.arange(0, len(ids), _SAMPLED_ROWS))]


def _is_ascending(ids: pa.ChunkedArray[pa.StringScalar], strictly: bool = False) -> bool:
    compare = pc.less if strictly else pc.less_equal
    return bool(pc.all(compare(ids[:-1], ids[1:]), min_count=0).as_py())


def _between(rows: pa.Table, low: str, high: str | None) -> pa.Table:
    """Rows with an image_id from low on and below high."""
    ids, places = rows["image_id"], range(len(rows))
    start = bisect_left(places, low, key=lambda place: str(ids[place]))
    end = len(rows) if high is None else bisect_left(places, high, key=lambda place: str(ids[place]))
    return rows[start:end]


def _newest(rows: pa.Table) -> pa.Table:
    """Of each image the newest row, unless that is a `removed` one."""
    if not _is_ascending(rows["image_id"], strictly=True):
        rows = rows.take(pc.sort_indices(rows, [("image_id", "ascending"), ("labeled_at", "ascending")]))
        ids = rows["image_id"]
        is_older = np.append(pc.equal(ids[:-1], ids[1:]).to_numpy(), False)
        rows = rows.filter(pa.array(~is_older))
    is_there = pc.not_equal(rows["status"], pa.scalar(str(Status.REMOVED)))
    return rows if pc.all(is_there, min_count=0).as_py() else rows.filter(is_there)
