"""Where the encoded bytes of each image of a source are, and how one of them is read.

Enters: a SourceSpec. Leaves: locations in bounded batches, under the keys that jobs/lake/sources.py gives as
image ids; and from a location, the bytes of that one image, or a StorageError.

An image in a tar is read as a range of bytes; to locate it the tar is read from end to end once. A row of a
Parquet file comes with its row group.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from jobs.lake.parquet_source import check_columns, check_plain, open_parquet
from jobs.lake.shards import MAX_IMAGE_BYTES, ImageIds, Shard, image_name, is_image_name
from jobs.lake.sources import list_shards
from jobs.lake.storage import CorruptObjectError, MissingObjectError, ObjectInfo, Storage
from jobs.lake.tar import BLOCK_BYTES, TarError, TarReader
from jobs.train.records import Problem, Problems, to_batch
from schemas.errors import UsageError
from schemas.specs import SourceSpec

DEFAULT_CACHE_BYTES = 1 << 30
_SHARDS_AT_ONCE = 8  # indexing waits for storage, not for the processor
_BATCH_ROWS = 4096
_GZIP_MAGIC = b"\x1f\x8b"

# uri as bytes, for a file's name on a disk need not be text. start, row_group: -1 where it is none such.
_COLUMNS: dict[str, pa.DataType] = {
    "source": pa.string(),
    "shard": pa.string(),
    "key": pa.string(),
    "name": pa.string(),
    "uri": pa.binary(),
    "object_bytes": pa.int64(),
    "etag": pa.string(),
    "version": pa.string(),
    "start": pa.int64(),
    "num_bytes": pa.int64(),
    "row_group": pa.int32(),
    "row": pa.int32(),
    "column": pa.string(),
}
LOCATIONS: pa.Schema = pa.schema(_COLUMNS)
LOCATION_COLUMNS = LOCATIONS.names[4:]


@dataclass(frozen=True)
class ImageLocation:
    """The whole of an object, or num_bytes of it from `start`, or `column` of a row of a Parquet row group.

    info: the object as it was when the location was made; another version is refused. start and row_group are
    -1 where they do not apply; `row` counts within its row group.
    """

    info: ObjectInfo
    start: int = -1
    num_bytes: int = -1
    row_group: int = -1
    row: int = -1
    column: str = ""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ImageLocation:
        """From the values of LOCATION_COLUMNS."""
        info = ObjectInfo(
            row["uri"].decode(errors="surrogateescape"), row["object_bytes"], row["etag"], row["version"]
        )
        return cls(info, row["start"], row["num_bytes"], row["row_group"], row["row"], row["column"])


def locate_images(spec: SourceSpec, storage: Storage, problems: Problems) -> Iterator[pa.RecordBatch]:
    """Every image of a source, as LOCATIONS.

    Left out are those that `masklake infer` gives no labels for what they are: the second image with one key,
    links in a tar, and all that follows the damage in a damaged shard, which is counted.

    Raises:
        UsageError: the source holds nothing we read, or gzipped tars, of which no part can be read alone.
        StorageError: it cannot be reached.
    """
    source = storage.normalize(spec.uri)
    rows: list[tuple[Any, ...]] = []
    for found in _ahead(partial(_locate, spec, storage), list_shards(spec, storage)):
        if found.damage:
            problems.add(Problem.DAMAGED_SHARD, found.damage)
        for key, location in found.images:
            info = location.info
            uri = info.uri.encode(errors="surrogateescape")
            version = info.size, info.etag, info.version
            part = location.start, location.num_bytes, location.row_group, location.row, location.column
            rows.append((source, found.shard, key, image_name(key), uri, *version, *part))
            if len(rows) == _BATCH_ROWS:
                yield to_batch(rows, LOCATIONS)
                rows.clear()
    yield to_batch(rows, LOCATIONS)


class ImageReader:
    """Reads encoded images. Thread-safe.

    Args:
        cache_bytes: row groups of Parquet files that are kept; the one in use is, whatever its size.
    """

    def __init__(self, storage: Storage, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._storage = storage
        self._row_groups = _RowGroups(storage, cache_bytes)

    def read(self, location: ImageLocation) -> bytes:
        """The image's encoded bytes.

        Raises:
            ChangedObjectError: the object is another than when it was located.
            MissingObjectError, CorruptObjectError: it is gone, or damaged.
            StorageError: it could not be reached, after retries.
        """
        info = location.info
        if location.row_group >= 0:
            return self._row_groups.read(location)
        if location.start >= 0:
            return _read_range(self._storage, info, location.start, location.num_bytes)
        if info.size < 0:  # named by a list, which says nothing else
            info = self._storage.stat(info.uri)
        if info.size > MAX_IMAGE_BYTES:
            raise CorruptObjectError(f"{info.uri} has {info.size} bytes, at most {MAX_IMAGE_BYTES} are read")
        return self._storage.read_bytes(info)


@dataclass(frozen=True)
class _Located:
    """The images of one shard in its order; damage: why there may be more, or ""."""

    shard: str
    images: list[tuple[str, ImageLocation]]
    damage: str = ""


def _ahead(locate: Callable[[Shard], _Located], shards: Iterator[Shard]) -> Iterator[_Located]:
    """In the order of the shards, some at once."""
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, thread_name_prefix="locate-images") as pool:
        running: deque[Future[_Located]] = deque()
        try:
            for shard in shards:
                running.append(pool.submit(locate, shard))
                if len(running) == _SHARDS_AT_ONCE:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _locate(spec: SourceSpec, storage: Storage, shard: Shard) -> _Located:
    if shard.info is None:
        images = [(key, ImageLocation(info)) for key, info in shard.objects if info is not None]
        return _Located(shard.name, images)
    if shard.format == "tar":
        return _locate_in_tar(shard, shard.info, storage)
    return _locate_in_parquet(shard, shard.info, spec, storage)


def _locate_in_tar(shard: Shard, info: ObjectInfo, storage: Storage) -> _Located:
    """Keys as jobs/lake/tar_source.py gives them."""
    images: list[tuple[str, ImageLocation]] = []
    ids = ImageIds(skip=())
    with storage.open_unverified(info) as stream:
        if stream.read(2) == _GZIP_MAGIC:
            raise UsageError(
                f"{info.uri} is a gzipped tar, of which no image can be read alone, as training does; "
                f"unpack it (gunzip) and train on the plain tar"
            )
        stream.seek(0)
        try:
            for member in TarReader(stream, info.size):
                name = "/".join(part for part in member.name.split("/") if part not in (".", ".."))
                if not is_image_name(name):
                    continue
                claimed = ids.claim(f"{shard.name}/{member.name.rpartition('.')[0]}")
                if claimed.repeated or member.not_a_file or member.size_bytes > MAX_IMAGE_BYTES:
                    continue
                start = member.offset_bytes + BLOCK_BYTES
                images.append((claimed.image_id, ImageLocation(info, start, member.size_bytes)))
        except TarError as error:
            return _Located(shard.name, images, f"{info.uri}: {error}")
    return _Located(shard.name, images)


def _locate_in_parquet(shard: Shard, info: ObjectInfo, spec: SourceSpec, storage: Storage) -> _Located:
    """Keys as jobs/lake/parquet_source.py gives them."""
    images: list[tuple[str, ImageLocation]] = []
    ids = ImageIds(skip=())
    first_row = 0
    with storage.open_unverified(info) as stream:
        try:
            file = open_parquet(stream)
            check_columns(file.schema_arrow, spec, info.uri)
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                keys: list[Any] = [f"{shard.name}/{first_row + row:09d}" for row in range(num_rows)]
                if spec.id_column is not None:
                    keys = file.read_row_group(group, columns=[spec.id_column]).column(0).to_pylist()
                for row, key in enumerate(keys):
                    claimed = None if key is None else ids.claim(str(key))
                    if claimed is not None and not claimed.repeated:
                        place = ImageLocation(info, row_group=group, row=row, column=spec.image_column)
                        images.append((claimed.image_id, place))
                first_row += num_rows
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the data
                raise
            return _Located(shard.name, images, f"{info.uri}: not read as Parquet: {error}")
    return _Located(shard.name, images)


def _read_range(storage: Storage, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
    """Without the megabytes that a buffer would read ahead."""
    buffered = storage.open_unverified(info)
    assert isinstance(buffered, io.BufferedReader)
    stream = buffered.detach()
    stream.seek(start)
    parts = []
    while num_bytes and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


class _RowGroups:
    """The image columns of row groups, the last used ones kept within a bound."""

    def __init__(self, storage: Storage, cache_bytes: int) -> None:
        self._storage = storage
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[tuple[str, str, int], pa.ChunkedArray[Any]] = OrderedDict()
        self._reading: dict[tuple[str, str, int], threading.Lock] = {}
        self._lock = threading.Lock()

    def read(self, location: ImageLocation) -> bytes:
        value = self._column(location)[location.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise MissingObjectError(
                f"{location.info.uri}: row {location.row} of row group {location.row_group} holds no image"
            )
        return bytes(data)

    def _column(self, location: ImageLocation) -> pa.ChunkedArray[Any]:
        key = location.info.uri, location.info.version, location.row_group
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # whoever else wants the same group waits for it
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            column = self._fetch(location)
            with self._lock:
                self._kept[key] = column
                while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > self._cache_bytes:
                    dropped, _ = self._kept.popitem(last=False)
                    self._reading.pop(dropped, None)
            return column

    def _fetch(self, location: ImageLocation) -> pa.ChunkedArray[Any]:
        info = location.info
        try:
            with self._storage.open_unverified(info) as stream:
                file = open_parquet(stream)
                check_plain(file.schema_arrow, location.column, info.uri)
                return file.read_row_group(location.row_group, [location.column]).column(0)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CorruptObjectError(
                f"{info.uri}: row group {location.row_group} is damaged: {error}"
            ) from error
