"""Which images of a source the label table already has, asked shard by shard.

Enters: the statistics of the files that the Delta log names, and a way to read a file's keys. Leaves: counts
and sets of image ids. Most questions are answered from the statistics alone; a file is read only where they
leave room for doubt, so that resuming a job costs as much as its log, not as much as its labels.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import pyarrow as pa

from schemas.labels import ErrorKind, Status

KEY_COLUMNS = ("image_id", "source", "shard", "status", "error_kind", "labeled_at")
# A file's keys are some 512 short strings; reading ahead hides the store's latency, the cap keeps memory
# flat.
_READ_AHEAD_FILES = 32
_MAX_CACHED_FILES = 512
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
        self._cache: dict[str, pa.Table] = {}

    def state(self, shard: str) -> ShardState:
        """How many images of a shard are done and how many are to be done again."""
        files = self._files_of(shard)
        if all(self._is_settled(file) for file in files) and _are_disjoint(files):
            return ShardState(sum(file.num_rows or 0 for file in files), 0)
        done = self._newest(self._keys(files), shard)
        num_done = sum(done.values())
        return ShardState(num_done, len(done) - num_done)

    def ids(self, shard: str) -> frozenset[str]:
        """The image ids of a shard that are done."""
        done = self._newest(self._keys(self._files_of(shard)), shard)
        return frozenset(image_id for image_id, is_done in done.items() if is_done)

    def among(self, image_ids: Sequence[str]) -> frozenset[str]:
        """Those of the given image ids that are done, whichever shard they were in.

        Ask in the order of the ids, in groups: files are read a little ahead, and forgotten.
        """
        if not image_ids:
            return frozenset()
        low, high = min(image_ids), max(image_ids)
        first, last = bisect_left(self._highs, low), bisect_right(self._lows, high)
        wanted = [file for file in self._files[first:last] if file.image_ids.may_hold(low, high)]
        if len(wanted) > _MAX_CACHED_FILES:
            done = self._everything
        else:
            if any(file.path not in self._cache for file in wanted):
                self._load([*wanted, *self._files[last : last + _READ_AHEAD_FILES]])
            done = self._newest(self._keys(wanted), None)
        return frozenset(image_id for image_id in image_ids if done.get(image_id, False))

    @cached_property
    def _everything(self) -> dict[str, bool]:
        """All images of the source, for one in no order, such as a shuffled list: some 300 bytes an image."""
        groups = range(0, len(self._files), _MAX_CACHED_FILES)
        keys = (self._keys(self._files[start : start + _MAX_CACHED_FILES]) for start in groups)
        return self._newest(chain.from_iterable(keys), None)

    def _files_of(self, shard: str) -> list[LabelFile]:
        return [*self._pure.get(shard, ()), *(f for f in self._mixed if f.shards.may_hold(shard, shard))]

    def _is_settled(self, file: LabelFile) -> bool:
        """Whether the statistics alone say: all rows are of this source, of one shard, and done."""
        kinds = file.error_kinds
        may_retry = file.num_errors != 0 and any(kinds.may_hold(kind, kind) for kind in self._retry)
        return (
            file.num_rows is not None
            and file.sources.only == self._source
            and file.shards.only is not None
            and not file.statuses.may_hold(Status.REMOVED, Status.REMOVED)
            and not may_retry
        )

    def _newest(self, keys: Iterable[pa.Table], shard: str | None) -> dict[str, bool]:
        """image_id -> whether it is done, by its newest row. shard None: of any shard."""
        newest: dict[str, tuple[int, bool]] = {}
        for table in keys:
            columns = [table[name].to_pylist() for name in KEY_COLUMNS[:-1]]
            times = table["labeled_at"].cast(pa.int64()).to_pylist()
            for image_id, source, row_shard, status, kind, time_us in zip(*columns, times, strict=True):
                if source != self._source or (shard is not None and row_shard != shard):
                    continue
                if image_id not in newest or newest[image_id][0] <= time_us:
                    is_done = status != Status.REMOVED and kind not in self._retry
                    newest[image_id] = (time_us, is_done)
        return {image_id: is_done for image_id, (_, is_done) in newest.items()}

    def _keys(self, files: Sequence[LabelFile]) -> list[pa.Table]:
        self._load(files)
        keys = [self._cache[file.path] for file in files]
        for path in list(self._cache)[:-_MAX_CACHED_FILES]:
            del self._cache[path]
        return keys

    def _load(self, files: Iterable[LabelFile]) -> None:
        missing = [file for file in files if file.path not in self._cache]
        if not missing:
            return
        with ThreadPoolExecutor(min(_READ_THREADS, len(missing))) as pool:
            for file, table in zip(missing, pool.map(self._read_keys, missing), strict=True):
                self._cache[file.path] = table


def _are_disjoint(files: Sequence[LabelFile]) -> bool:
    """Whether no image can stand in two of the files."""
    ranges = [file.image_ids for file in files]
    known = [(r.low, r.high) for r in ranges if r.low is not None and r.high is not None]
    return len(known) == len(ranges) and all(a[1] < b[0] for a, b in pairwise(sorted(known)))
