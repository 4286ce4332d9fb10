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
from enum import IntEnum
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.lake.fragments import is_fragment
from jobs.lake.object_table import ObjectTable
from schemas.labels import ErrorKind, Status

KEY_COLUMNS = (
    "image_id",
    "source",
    "shard",
    "object_version",
    "content_hash",
    "status",
    "error_kind",
    "labeled_at",
)
# A fragment's keys are some 512 short rows, those of a merged file a hundred thousand; reading ahead hides
# the store's latency, the caps keep memory flat: some 150 bytes a row.
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


class Standing(IntEnum):
    """What the table says of an image of the source, by its newest row."""

    NEW = 0  # no row, or it was removed
    DONE = 1
    FAILED = 2  # and is not to be tried again
    RETRY = 3  # failed, and is to be tried again
    CHANGED = 4  # done or failed, but its object is another than the one that the row was made from


TO_DO = (Standing.NEW, Standing.RETRY, Standing.CHANGED)


@dataclass(frozen=True)
class Known:
    """Of objects, in their order: each one's Standing (N,), and the content_hash of its row (N,), where that
    is there and not to be tried again.
    """

    standing: NDArray[np.int8]
    content_hash: pa.ChunkedArray[Any]


@dataclass(frozen=True)
class ShardState:
    """Of one shard: images whose newest row counts as done, and those that are to be done again."""

    num_done: int
    num_open: int


class DoneImages:
    """The images of one source that one model has labelled.

    An image counts as done by its newest row: `ok`, or `failed` for a kind that is not to be retried. A
    `removed` image is not done; if the source has it again, it is labelled again. So is an image whose object
    changed since; a row that does not say its object's version counts as made from what is there now.

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
        rows = _newest(rows)
        num_done = int(pc.sum(rows["done"]).as_py() or 0)
        return ShardState(num_done, len(rows) - num_done)

    def ids(self, shard: str, version: str = "") -> frozenset[str]:
        """The image ids of a shard that are done; with a version, those that were read from that one."""
        rows = self._newest_of(shard)
        is_done = pc.and_not(rows["done"], _is_other(rows["version"], version))
        return frozenset(map(str, rows["image_id"].filter(is_done).to_pylist()))

    def contents(self, shard: str, version: str) -> dict[str, bytes]:
        """Of the images of a shard that are done, and were read from another version of it, what was in them:
        image_id -> content_hash.
        """
        rows = self._newest_of(shard)
        rows = rows.filter(pc.and_(rows["done"], _is_other(rows["version"], version)))
        found = zip(rows["image_id"].to_pylist(), rows["hash"].to_pylist(), strict=True)
        return {str(image_id): content_hash for image_id, content_hash in found if content_hash is not None}

    def open_ids(self, shard: str) -> frozenset[str]:
        """The image ids of a shard that have a row and are to be done again."""
        rows = self._newest_of(shard)
        return frozenset(map(str, rows["image_id"].filter(pc.invert(rows["done"])).to_pylist()))

    def known(self, objects: ObjectTable) -> Known:
        """What the table says of each object, whichever shard it was in.

        Ask in the order of the ids, in groups: files are read a little ahead, and forgotten.
        """
        image_ids = objects.image_ids
        if not len(image_ids):
            return Known(np.zeros(0, np.int8), _NO_ROWS["hash"])
        low, high = str(pc.min(image_ids)), str(pc.max(image_ids))
        first, last = bisect_left(self._highs, low), bisect_right(self._lows, high)
        wanted = [file for file in self._files[first:last] if file.image_ids.may_hold(low, high)]
        if len(wanted) > _MAX_CACHED_FILES or _num_rows(wanted) > _MAX_CACHED_ROWS:
            rows, places_by_id = self._everything
            found = [places_by_id.get(str(image_id)) for image_id in image_ids.to_pylist()]
            return _known(rows, pa.array(found, pa.int64()), objects)
        if any(file.path not in self._cache for file in wanted):
            self._load(self._with_next(wanted, last))
        rows = pa.concat_tables([*(keys.between(low, high) for keys in self._keys(wanted)), _NO_ROWS])
        if len(pc.unique(rows["image_id"])) < len(rows):
            rows = rows.sort_by([("time_us", "descending")])  # the first that is found is the newest
        places = pc.index_in(image_ids, value_set=rows["image_id"].combine_chunks())
        return _known(rows, places, objects)

    @cached_property
    def _everything(self) -> tuple[pa.Table, dict[str, int]]:
        """All images of the source, for one in no order, such as a shuffled list: some 300 bytes an image."""
        rows = _newest(pa.concat_tables([*(keys.by_id for keys in self._keys(self._files)), _NO_ROWS]))
        return rows, {str(image_id): place for place, image_id in enumerate(rows["image_id"].to_pylist())}

    def _newest_of(self, shard: str) -> pa.Table:
        """The newest row of each image of a shard."""
        return _newest(pa.concat_tables([*self._rows_of(self._files_of(shard), shard), _NO_ROWS]))

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
        is_failed = pc.equal(keys["status"], pa.scalar(str(Status.FAILED)))
        standing = pc.case_when(
            pc.make_struct(is_removed, is_retried, is_failed),
            *(pa.scalar(int(s), pa.int8()) for s in (Standing.NEW, Standing.RETRY, Standing.FAILED)),
            pa.scalar(int(Standing.DONE), pa.int8()),
        )
        rows = pa.table(
            {
                "image_id": keys["image_id"],
                "shard": keys["shard"],
                "version": keys["object_version"],
                "hash": keys["content_hash"],
                "time_us": keys["labeled_at"].cast(pa.int64()),
                "standing": standing,
                "done": pc.and_not(pc.invert(is_removed), is_retried),
            }
        )
        if file.sources.only != self._source:
            rows = rows.filter(pc.equal(keys["source"], pa.scalar(self._source)))
        return _FileKeys(rows)


class _FileKeys:
    """The keys of one file's rows of one source, to be asked by shard or by image_id.

    Args:
        rows: image_id, shard, version and hash (of the object and its content), time_us (when it was
            labelled), standing, done (whether it is done by this row).
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
    "version": pa.string(),
    "hash": pa.binary(16),
    "time_us": pa.int64(),
    "standing": pa.int8(),
    "done": pa.bool_(),
}
_NO_ROWS: pa.Table = pa.schema(_ROW_TYPES).empty_table()


def _newest(rows: pa.Table) -> pa.Table:
    """The newest row of each image."""
    ids = pc.unique(rows["image_id"])
    if len(ids) == len(rows):
        return rows
    rows = rows.sort_by([("time_us", "descending")])
    return rows.take(pc.index_in(ids, value_set=rows["image_id"].combine_chunks()))  # the first of each


def _is_other(versions: Any, version: Any) -> Any:
    """Whether a row was made from another version, given one or one for each; not where either is unknown."""
    is_other: Any = pc.and_(pc.not_equal(versions, version), pc.not_equal(version, ""))  # type: ignore[call-overload]
    return is_other.fill_null(False)


def _known(rows: pa.Table, places: Any, objects: ObjectTable) -> Known:
    """
    Args:
        places: of each object's row, null where it has none.
    """
    of_rows: Any = rows["standing"].take(places)
    standing = of_rows.fill_null(pa.scalar(int(Standing.NEW), pa.int8())).to_numpy().copy()
    is_other = _is_other(rows["version"].take(places), objects.columns["version"]).to_numpy()
    standing[is_other & np.isin(standing, (Standing.DONE, Standing.FAILED))] = Standing.CHANGED
    of_done: Any = pc.if_else(rows["done"], rows["hash"], pa.scalar(None, pa.binary(16)))
    return Known(standing, of_done.take(places))


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
