"""Which images of a source the label table already has, asked shard by shard.

Enters: the statistics of the files that the Delta log names, and a way to read a file's keys. Leaves: counts
and sets of image ids. Most questions are answered from the statistics alone; a file is read only where they
leave room for doubt, so that resuming a job costs as much as its log, not as much as its labels.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake.fragments import is_fragment
from schemas.labels import ErrorKind, Status

KEY_COLUMNS = ("image_id", "source", "shard", "status", "error_kind", "labeled_at")
# A fragment's keys are some 512 short strings, those of a merged file a hundred thousand; reading ahead hides
# the store's latency, the caps keep memory flat: some 100 bytes a row.
_READ_AHEAD_FILES = 32
_MAX_CACHED_FILES = 512
_MAX_CACHED_ROWS = 1_000_000
_READ_THREADS = 16


@dataclass(frozen=True)
class Range:
    """Bounds of a column's values in a file, both included; null values are outside. None: not known."""

    low: str | None
    high: str | None

    def may_hold(self, low: str, high: str) -> bool:
        """Whether a value between low and high could be there."""
        return (self.low is None or self.low <= high) and (self.high is None or low <= self.high)

    @property
    def only(self) -> str | None:
        """The one value that the column has, if the bounds say so."""
        return self.low if self.low == self.high else None


@dataclass(frozen=True)
class LabelFile:
    """One file of the table, as the Delta log knows it.

    num_rows and num_errors (rows with an error_kind) are None where the log does not say.
    """

    path: str
    model_id: str
    size_bytes: int
    num_rows: int | None
    num_errors: int | None
    image_ids: Range
    sources: Range
    shards: Range
    statuses: Range
    error_kinds: Range


@dataclass(frozen=True)
class ShardState:
    """Of one shard: images whose newest row counts as done, and those that are to be done again."""

    num_done: int
    num_open: int


class DoneImages:
    """The images of one source that one model has labelled.

    An image counts as done by its newest row: `ok`, or `failed` for a kind that is not to be retried. A
    `removed` image is not done; if the source has it again, it is labelled again.

    Args:
        files: of one model_id; files of other sources are passed over.
        source: as the rows have it.
        retry: kinds of failure that are to be labelled again.
        read_keys: gives KEY_COLUMNS of one file; called from several threads.
    """

    def __init__(
        self,
        files: Iterable[LabelFile],
        source: str,
        retry: Collection[ErrorKind],
        read_keys: Callable[[LabelFile], pa.Table],
    ) -> None:
        self._source = source
        self._retry = frozenset(kind.value for kind in retry)
        self._read_keys = read_keys
        self._files = sorted(
            (file for file in files if file.sources.may_hold(source, source)),
            key=lambda file: file.image_ids.low or "",
        )
        self._lows = [file.image_ids.low or "" for file in self._files]
        # What no file up to here goes beyond; unknown bounds go beyond everything.
        self._highs = list(accumulate((file.image_ids.high or "\U0010ffff" for file in self._files), max))
        self._pure: dict[str, list[LabelFile]] = {}
        self._mixed: list[LabelFile] = []
        for file in self._files:
            if file.shards.only is None:
                self._mixed.append(file)
            else:
                self._pure.setdefault(file.shards.only, []).append(file)
        self._cache: dict[str, _FileKeys] = {}  # the file that was asked last comes last

    def state(self, shard: str) -> ShardState:
        """How many images of a shard are done and how many are to be done again."""
        files = self._files_of(shard)
        if all(self._is_settled(file) for file in files) and _are_disjoint(files):
            return ShardState(sum(file.num_rows or 0 for file in files), 0)
        rows = pa.concat_tables([*self._rows_of(files, shard), _NO_ROWS])
        if pc.all(rows["done"], min_count=0).as_py() and len(pc.unique(rows["image_id"])) == len(rows):
            return ShardState(len(rows), 0)  # each image once: nothing to compare
        done = _newest([rows])
        num_done = sum(done.values())
        return ShardState(num_done, len(done) - num_done)

    def ids(self, shard: str) -> frozenset[str]:
        """The image ids of a shard that are done."""
        done = _newest(self._rows_of(self._files_of(shard), shard))
        return frozenset(image_id for image_id, is_done in done.items() if is_done)

    def open_ids(self, shard: str) -> frozenset[str]:
        """The image ids of a shard that have a row and are to be done again."""
        done = _newest(self._rows_of(self._files_of(shard), shard))
        return frozenset(image_id for image_id, is_done in done.items() if not is_done)

    def known(self, image_ids: pa.ChunkedArray[Any]) -> pa.ChunkedArray[pa.BooleanScalar]:
        """Of each image id, whichever shard it was in: true, done; false, to be done again; null, no row.

        Ask in the order of the ids, in groups: files are read a little ahead, and forgotten.
        """
        if not len(image_ids):
            return pa.chunked_array([], pa.bool_())
        low, high = str(pc.min(image_ids)), str(pc.max(image_ids))
        first, last = bisect_left(self._highs, low), bisect_right(self._lows, high)
        wanted = [file for file in self._files[first:last] if file.image_ids.may_hold(low, high)]
        if len(wanted) > _MAX_CACHED_FILES or _num_rows(wanted) > _MAX_CACHED_ROWS:
            known = [self._everything.get(str(image_id)) for image_id in image_ids.to_pylist()]
            return pa.chunked_array([known], pa.bool_())
        if any(file.path not in self._cache for file in wanted):
            self._load(self._with_next(wanted, last))
        rows = pa.concat_tables([*(keys.between(low, high) for keys in self._keys(wanted)), _NO_ROWS])
        if len(pc.unique(rows["image_id"])) < len(rows):
            rows = rows.sort_by([("time_us", "descending")])  # the first that is found is the newest
        places = pc.index_in(image_ids, value_set=rows["image_id"].combine_chunks())
        return rows["done"].take(places)

    @cached_property
    def _everything(self) -> dict[str, bool]:
        """All images of the source, for one in no order, such as a shuffled list: some 300 bytes an image."""
        return _newest(keys.by_id for keys in self._keys(self._files))

    def _files_of(self, shard: str) -> list[LabelFile]:
        return [*self._pure.get(shard, ()), *(f for f in self._mixed if f.shards.may_hold(shard, shard))]

    def _is_settled(self, file: LabelFile) -> bool:
        """Whether the log alone says: all rows are of this source, of one shard, done, and of different
        images, which a merged file with a retry among its rows has not.
        """
        kinds = file.error_kinds
        may_retry = file.num_errors != 0 and any(kinds.may_hold(kind, kind) for kind in self._retry)
        return (
            file.num_rows is not None
            and is_fragment(file.path)
            and file.sources.only == self._source
            and file.shards.only is not None
            and not file.statuses.may_hold(Status.REMOVED, Status.REMOVED)
            and not may_retry
        )

    def _rows_of(self, files: Sequence[LabelFile], shard: str) -> Iterator[pa.Table]:
        for keys in self._keys(files):
            yield keys.of_shard(shard)

    def _keys(self, files: Sequence[LabelFile]) -> Iterator[_FileKeys]:
        """The keys of each file in turn, however many; those not asked for the longest time are forgotten."""
        for some in _batches(files):
            self._load(some)
            for file in some:
                keys = self._cache[file.path] = self._cache.pop(file.path)
                yield keys

    def _with_next(self, wanted: Sequence[LabelFile], last: int) -> list[LabelFile]:
        """The wanted files and those that will be asked for next, as far as they fit in the cache."""
        files = [*wanted, *self._files[last : last + _READ_AHEAD_FILES]]
        return files[: max(len(wanted), len(next(_batches(files))))]

    def _load(self, files: Sequence[LabelFile]) -> None:
        missing = [file for file in files if file.path not in self._cache]
        if len(missing) == 1:
            self._cache[missing[0].path] = self._read(missing[0])
        elif missing:
            with ThreadPoolExecutor(min(_READ_THREADS, len(missing))) as pool:
                for file, keys in zip(missing, pool.map(self._read, missing), strict=True):
                    self._cache[file.path] = keys
        needed = {file.path for file in files}
        num_rows = sum(keys.num_rows for keys in self._cache.values())
        for path in list(self._cache):
            if len(self._cache) <= _MAX_CACHED_FILES and num_rows <= _MAX_CACHED_ROWS:
                break
            if path not in needed:
                num_rows -= self._cache.pop(path).num_rows

    def _read(self, file: LabelFile) -> _FileKeys:
        keys = self._read_keys(file)
        is_retried = pc.is_in(keys["error_kind"], value_set=pa.array(sorted(self._retry), pa.string()))
        is_removed = pc.equal(keys["status"], pa.scalar(str(Status.REMOVED)))
        rows = pa.table(
            {
                "image_id": keys["image_id"],
                "shard": keys["shard"],
                "time_us": keys["labeled_at"].cast(pa.int64()),
                "done": pc.and_not(pc.invert(is_removed), is_retried),
            }
        )
        if file.sources.only != self._source:
            rows = rows.filter(pc.equal(keys["source"], pa.scalar(self._source)))
        return _FileKeys(rows)


class _FileKeys:
    """The keys of one file's rows of one source, to be asked by shard or by image_id.

    Args:
        rows: image_id, shard, time_us (when it was labelled), done (whether it is done by this row).
    """

    def __init__(self, rows: pa.Table) -> None:
        self.num_rows = rows.num_rows
        self._rows = rows

    @cached_property
    def by_id(self) -> pa.Table:
        """The rows in the order of image_id, as a file of ours has them."""
        ids = self._rows["image_id"]
        if pc.all(pc.less_equal(ids[:-1], ids[1:]), min_count=0).as_py():
            return self._rows
        return self._rows.sort_by("image_id")

    def between(self, low: str, high: str) -> pa.Table:
        """Rows with an image_id from low to high."""
        ids = self.by_id["image_id"]
        start = bisect_left(range(len(ids)), low, key=lambda place: str(ids[place]))
        end = bisect_right(range(len(ids)), high, key=lambda place: str(ids[place]))
        return self.by_id[start:end]

    def of_shard(self, shard: str) -> pa.Table:
        """Rows of one shard."""
        start, num_rows = self._shards.get(shard, (0, 0))
        return self._by_shard.slice(start, num_rows)

    @cached_property
    def _by_shard(self) -> pa.Table:
        return self._rows.sort_by("shard").combine_chunks()

    @cached_property
    def _shards(self) -> dict[str, tuple[int, int]]:
        """shard -> where its rows start in _by_shard, and how many they are."""
        names, counts = pc.value_counts(self._by_shard["shard"]).flatten()
        num_rows = [int(count) for count in counts.to_numpy()]
        starts = accumulate(num_rows, initial=0)
        return {str(name): (start, num) for name, start, num in zip(names, starts, num_rows, strict=False)}


_ROW_TYPES: dict[str, pa.DataType] = {
    "image_id": pa.string(),
    "shard": pa.string(),
    "time_us": pa.int64(),
    "done": pa.bool_(),
}
_NO_ROWS: pa.Table = pa.schema(_ROW_TYPES).empty_table()


def _newest(parts: Iterable[pa.Table]) -> dict[str, bool]:
    """image_id -> whether it is done, by its newest row."""
    newest: dict[str, tuple[int, bool]] = {}
    for rows in parts:
        columns = (rows[name].to_pylist() for name in ("image_id", "time_us", "done"))
        for image_id, time_us, is_done in zip(*columns, strict=True):
            if image_id not in newest or newest[image_id][0] <= time_us:
                newest[image_id] = (time_us, is_done)
    return {image_id: is_done for image_id, (_, is_done) in newest.items()}


def _num_rows(files: Iterable[LabelFile]) -> int:
    return sum(file.num_rows or 0 for file in files)


def _batches(files: Sequence[LabelFile]) -> Iterator[list[LabelFile]]:
    """The files in turn, at least one at a time and as many as the cache takes."""
    batch: list[LabelFile] = []
    num_rows = 0
    for file in files:
        num_rows += file.num_rows or 0
        if batch and (len(batch) == _MAX_CACHED_FILES or num_rows > _MAX_CACHED_ROWS):
            yield batch
            batch, num_rows = [], file.num_rows or 0
        batch.append(file)
    if batch:
        yield batch


def _are_disjoint(files: Sequence[LabelFile]) -> bool:
    """Whether no image can stand in two of the files."""
    ranges = [file.image_ids for file in files]
    known = [(r.low, r.high) for r in ranges if r.low is not None and r.high is not None]
    return len(known) == len(ranges) and all(a[1] < b[0] for a, b in pairwise(sorted(known)))
