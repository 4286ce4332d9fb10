"""A source's shards, listed once and gone through as often as a plan wants.

Up to _MAX_HELD objects stay in memory, more go to an unnamed temporary file (TMPDIR), some 60 bytes each. A
large listing is also kept in the lake, as Parquet: <lake>/listings/<hash of the source>/<id>/<n>.parquet, and
listing.json beside it, which names the id that counts. A job whose source.listing_max_age_s allows it takes
such a listing instead of making its own.
"""

import hashlib
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake.object_table import OBJECT_SCHEMA, ObjectTable
from jobs.lake.shard_listing import list_shards
from jobs.lake.shards import Shard
from jobs.lake.storage import CorruptObjectError, MissingObjectError, Storage
from schemas.specs import SourceSpec

SLICE_OBJECTS = 65_536  # what a plan compares with the table in one go
_MAX_HELD = 4 * SLICE_OBJECTS
_PART_OBJECTS = 16 * SLICE_OBJECTS  # of one file: some 60 MB, which are held when they are sent
_logger = logging.getLogger(__name__)


class Listing(Iterable[Shard]):
    """The shards of a source as they were at one time, in order; iterate it any number of times.

    As a context manager it gives its temporary files back. listed_at_s: seconds since 1970.
    """

    def __init__(self, shards: Iterable[Shard], listed_at_s: float) -> None:
        self.listed_at_s = listed_at_s
        self.num_objects = 0
        self._held: list[Shard] = []
        self._parts: list[IO[bytes]] = []
        self._like: Shard | None = None  # of the slices in files: all alike but for their objects
        try:
            self._take(iter(shards))
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(
        cls, spec: SourceSpec, storage: Storage, lake_uri: str, clock: Callable[[], float] = time.time
    ) -> "Listing":
        """List a source, or take the listing that the lake has, where the spec allows its age.

        Raises:
            UsageError: as list_shards.
        """
        if spec.listing_max_age_s > 0 and (kept := _load(spec, storage, lake_uri, clock())) is not None:
            return kept
        return cls(list_shards(spec, storage, SLICE_OBJECTS), clock())

    def __iter__(self) -> Iterator[Shard]:
        yield from self._held
        for part in self._parts:
            file = pq.ParquetFile(part)
            for group in range(file.num_row_groups):
                yield self._slice(file.read_row_group(group))

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the temporary files back; nothing can be gone through after."""
        for part in self._parts:
            part.close()

    def keep(self, spec: SourceSpec, storage: Storage, lake_uri: str) -> None:
        """Put a large listing into the lake; a small one costs less to make anew."""
        if not self._parts or self._like is None:
            return
        folder, listing_id = _folder(spec, storage, lake_uri), uuid.uuid4().hex
        for number, part in enumerate(self._parts):
            part.seek(0)
            storage.write_bytes(f"{folder}/{listing_id}/{number:05d}.parquet", part.read())
        previous = _read_pointer(storage, folder)
        pointer = {
            "source": storage.normalize(spec.uri),
            "include": spec.include,
            "listed_at_s": self.listed_at_s,
            "id": listing_id,
            "num_parts": len(self._parts),
            "num_objects": self.num_objects,
            "name": self._like.name,
        }
        storage.write_bytes(f"{folder}/listing.json", json.dumps(pointer, indent=1).encode())
        for number in range(previous.get("num_parts", 0)):
            storage.delete(f"{folder}/{previous['id']}/{number:05d}.parquet")

    def _take(self, shards: Iterator[Shard]) -> None:
        for shard in shards:
            self._held.append(shard)
            self.num_objects += len(shard.objects) if shard.format == "files" else 1
            if shard.format == "files" and self.num_objects > _MAX_HELD:
                self._spool(chain(self._held, shards))
                self._held = []

    def _spool(self, slices: Iterator[Shard]) -> None:
        self.num_objects = 0
        while (first := next(slices, None)) is not None:
            self._like = first
            self._parts.append(tempfile.TemporaryFile(prefix="masklake-listing-"))  # noqa: SIM115 - kept
            num_in_part = 0
            with pq.ParquetWriter(self._parts[-1], OBJECT_SCHEMA, compression="zstd") as writer:
                for shard in chain([first], slices):
                    writer.write_table(shard.objects.columns, row_group_size=len(shard.objects))
                    num_in_part += len(shard.objects)
                    if num_in_part >= _PART_OBJECTS:
                        break
            self.num_objects += num_in_part

    def _slice(self, columns: pa.Table) -> Shard:
        assert self._like is not None, "a part was written of slices"
        return Shard(self._like.uri, self._like.name, "files", None, ObjectTable(columns))


def _load(spec: SourceSpec, storage: Storage, lake_uri: str, now_s: float) -> Listing | None:
    """The listing that the lake keeps, if it is young enough and whole."""
    folder = _folder(spec, storage, lake_uri)
    pointer = _read_pointer(storage, folder)
    if not pointer or now_s - pointer["listed_at_s"] > spec.listing_max_age_s:
        return None

    def slices() -> Iterator[Shard]:
        for number in range(pointer["num_parts"]):
            info = storage.stat(f"{folder}/{pointer['id']}/{number:05d}.parquet")
            with storage.open_verified(info) as stream:
                file = pq.ParquetFile(stream)
                if not file.schema_arrow.equals(OBJECT_SCHEMA):  # also a type whose values would be run
                    raise pa.ArrowInvalid(f"{info.uri} has other columns than a listing")
                for group in range(file.num_row_groups):
                    objects = ObjectTable(file.read_row_group(group))
                    yield Shard(pointer["source"], pointer["name"], "files", None, objects)

    try:
        return Listing(slices(), pointer["listed_at_s"])
    except (MissingObjectError, CorruptObjectError, pa.ArrowException, OSError) as error:
        _logger.warning("the listing kept at %s cannot be read, listing anew: %s", folder, error)
        return None


def _read_pointer(storage: Storage, folder: str) -> dict[str, Any]:
    with suppress(MissingObjectError, ValueError):
        pointer: dict[str, Any] = json.loads(storage.read_bytes(storage.stat(f"{folder}/listing.json")))
        return pointer
    return {}


def _folder(spec: SourceSpec, storage: Storage, lake_uri: str) -> str:
    text = f"{storage.normalize(spec.uri)}\0{spec.format}\0{spec.include}"
    return f"{lake_uri}/listings/{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
