"""Files and objects by URI, wherever they are: file (or a plain path), s3, gs, memory.

Enters: a StorageSpec, and credentials from the environment or a role. Leaves: bytes that were compared with
the size and, where there is one, the MD5 that the store gave for them; listings page by page; objects made by
at most one of many writers. What fails in a way that may pass is tried again for PATIENCE_S; then, or at
once otherwise, a StorageError says what, where and what to do. No message holds a credential. A URI that the
operator's policy (uri_policy.py) does not allow is touched by no method: that is a UsageError.
"""

import errno
import fnmatch
import hashlib
import io
import random
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from jobs.lake.range_stream import CHUNK_BYTES, RangeStream
from jobs.lake.store import (
    AccessDeniedError,
    ChangedObjectError,
    CorruptObjectError,
    MissingObjectError,
    ObjectInfo,
    Store,
    TransientStorageError,
)
from jobs.lake.stores import Stores, normalize
from schemas.errors import StorageError, UsageError
from schemas.specs import StorageSpec

__all__ = [
    "AccessDeniedError",
    "ChangedObjectError",
    "CorruptObjectError",
    "MissingObjectError",
    "ObjectInfo",
    "Storage",
    "TransientStorageError",
]

T = TypeVar("T")

# A store that throttles or fails over is back within a minute, as a rule. Pauses of 0.2, 0.4, ... 20, 20 s,
# each half to one and a half times that: some 105 s, over which a thousand workers spread out. Where each try
# itself takes long (a server that accepts and says nothing), PATIENCE_S ends it.
TRIES = 12
FIRST_DELAY_S = 0.2
PATIENCE_S = 120.0
_MAX_DELAYS = 100  # the longest pause, in first ones
# Damage on the way is gone at the next try; damage in the object stays.
CORRUPT_TRIES = 4
_CHECK_PATIENCE_S = 3.0  # somebody waits at a terminal
_PROBE_WRITERS = 8
# A disk has no round trips to save.
_NEAR_BUFFER_BYTES = 1 << 20


class Storage:
    """Picklable: each process makes its own clients, with its own environment's credentials. Thread-safe."""

    def __init__(self, spec: StorageSpec) -> None:
        self._stores = Stores(spec)

    def normalize(self, uri: str) -> str:
        """The one spelling of a URI: with its scheme, absolute, without a trailing slash."""
        return normalize(uri)

    def filesystem(self, uri: str) -> tuple[Any, str]:
        """The fsspec filesystem for a URI and its path there. Its errors and retries are the client's own."""
        store, path = self._stores.locate(uri)
        return store.filesystem, path

    def delta_options(self, uri: str) -> dict[str, str]:
        """The `storage_options` that bring deltalake to the same place; credentials it finds by itself."""
        return self._stores.delta_options(uri)

    def stat(self, uri: str) -> ObjectInfo:
        """Raises MissingObjectError for what is not an object: nothing there, or a folder."""
        store, path = self._stores.locate(uri)
        info: ObjectInfo = self._attempt(store, uri, partial(store.stat, path))
        return info

    def list(self, uri: str, include: str = "*") -> Iterator[ObjectInfo]:
        """Objects below a folder or prefix, at any depth, in order of their keys, streamed.

        Left out are hidden ones: any part of the key below `uri` starts with "_" or ".".

        Args:
            uri: the folder or prefix; a bucket has no folders, so an absent one is empty there.
            include: glob on the key below `uri`; "*" also crosses "/".
        """
        uri = normalize(uri)
        store, path = self._stores.locate(uri)
        wanted = re.compile(fnmatch.translate(include))
        hidden = re.compile(r"(?:^|/)[_.]")
        has_links = uri.startswith("file://")
        for page in store.pages(path, partial(self._attempt, store, uri)):
            for info in page:
                if has_links:
                    self._stores.locate(info.uri)  # refuses one that leads out of what is allowed
                key = info.uri[len(uri) + 1 :]
                if not key.endswith("/") and not hidden.search(key) and wanted.match(key):
                    yield info

    def read_bytes(self, info: ObjectInfo) -> bytes:
        """The whole object, compared with its size and MD5 as `info` has them.

        Raises:
            CorruptObjectError: they still differ when read again: damaged or cut short.
            ChangedObjectError: the object is no longer the one that `info` describes.
            MissingObjectError: there is none any more.
        """
        store, path = self._stores.locate(info.uri)
        if info.size == 0:
            return b""

        def read() -> bytes:
            data = store.read(path, 0, info.size + 1, info.version)  # one byte more shows an object that grew
            _compare(store, path, info, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())
            return data

        return self._attempt(store, info.uri, read)

    @contextmanager
    def open_verified(self, info: ObjectInfo) -> Iterator[BinaryIO]:
        """A seekable stream of an object whose bytes are right, or an error instead of wrong ones.

        With an MD5 to compare, the object is first copied to an unnamed temporary file (TMPDIR) and compared
        there; memory stays at one chunk. Without one (large multipart uploads, local files) it is read in
        place, as it is asked for, and must be the same version after the last read as it was in `info`.

        Raises:
            CorruptObjectError: on entry, where the MD5 differs.
            ChangedObjectError: on entry or on leaving, where the object was replaced.
            MissingObjectError: likewise, where it was deleted.
        """
        store, path = self._stores.locate(info.uri)
        if info.etag is None:
            check = partial(self._attempt, store, info.uri, partial(_check_unchanged, store, path, info))
            with self.open_unverified(info) as stream:
                try:
                    yield stream
                except Exception:
                    check()  # what made no sense may be half of another object
                    raise
            check()
            return
        with tempfile.TemporaryFile(prefix="masklake-") as file:
            spool = partial(self._spool, store, path, info, file)
            self._attempt(store, info.uri, spool, again=CorruptObjectError)  # each read is patient by itself
            file.seek(0)
            yield file

    def open_unverified(self, info: ObjectInfo) -> BinaryIO:
        """Random access to a part of an object, a Parquet footer say, without reading the whole of it."""
        store, path = self._stores.locate(info.uri)
        stream = RangeStream(partial(self._read_range, store, path, info), info.size)
        is_near = info.uri.startswith("file://")
        return io.BufferedReader(stream, _NEAR_BUFFER_BYTES if is_near else CHUNK_BYTES)

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Make or replace an object, whole or not at all; folders above it are made."""
        store, path = self._stores.locate(uri)
        self._attempt(store, uri, partial(store.write, path, data))

    def write_file(self, uri: str, file: Path) -> None:
        """Like write_bytes, of a file on this machine of any size, which is not read into memory as a whole.

        On S3 a large one goes up in parts, and then has no MD5 to compare when it is read.
        """
        store, path = self._stores.locate(uri)
        store.write_file(path, file, partial(self._attempt, store, uri))

    def create_exclusive(self, uri: str, data: bytes) -> bool:
        """Make an object that must not exist yet: of many callers at once, exactly one gets True.

        True stands even where the reply to the successful put got lost and the put was tried again.

        Raises:
            TransientStorageError: no answer after all tries; the object may have been made.
        """
        store, path = self._stores.locate(uri)
        made: bool = self._attempt(store, uri, partial(store.create, path, data, uuid.uuid4().hex))
        return made

    def exists(self, uri: str) -> bool:
        try:
            self.stat(uri)
        except MissingObjectError:
            return False
        return True

    def delete(self, uri: str) -> None:
        """Delete an object; nothing happens where there is none."""
        store, path = self._stores.locate(uri)
        self._attempt(store, uri, partial(store.delete, path))

    def check_reachable(self, uri: str, what: str) -> None:
        """Before any work: does the bucket exist, and does it let us in? An absent folder or prefix passes.

        Args:
            what: whose URI it is, for the message: "source", "lake".

        Raises:
            UsageError: missing bucket, wrong or no credentials, nobody at the endpoint; and the remedy.
        """
        store, path = self._stores.locate(uri)
        try:
            self._attempt(store, uri, partial(store.check_reachable, path), _CHECK_PATIENCE_S)
        except StorageError as error:
            raise UsageError(f"{what} {error}") from error

    def probe_conditional_put(self, lake_uri: str) -> None:
        """Let several writers race for one new object, and one more come late. Before the first commit.

        Commits and leases stand on a put that fails where the object exists. Not every S3 server has it: some
        ignore the condition, and the last writer wins without a word.

        Raises:
            UsageError: other than exactly one writer won, or the store refuses the condition.
        """
        uri = f"{normalize(lake_uri)}/_probe-{uuid.uuid4().hex}"
        start = threading.Barrier(_PROBE_WRITERS)

        def race(writer: int) -> bool:
            start.wait()
            return self.create_exclusive(uri, f"writer {writer}".encode())

        try:
            with ThreadPoolExecutor(_PROBE_WRITERS) as pool:
                num_winners = sum(pool.map(race, range(_PROBE_WRITERS)))
            num_late_winners = int(self.create_exclusive(uri, b"late"))
            self.delete(uri)
        except TransientStorageError:
            raise
        except StorageError as error:
            raise UsageError(f"lake {error}") from error
        if num_winners != 1 or num_late_winners:
            raise UsageError(
                f"lake {lake_uri}: the store does not honour conditional puts ({num_winners} of "
                f"{_PROBE_WRITERS} racing writers and {num_late_winners} of 1 late one made the same object; "
                f"wanted 1 and 0), so commits could overwrite each other; use a store that does, such as "
                f"AWS S3, Google Cloud Storage, Ceph RGW or a local disk. Nothing was committed."
            )

    def _read_range(self, store: Store, path: str, info: ObjectInfo, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = store.read(path, start, end, info.version)
            if len(data) != end - start:
                _check_unchanged(store, path, info)
                raise CorruptObjectError(
                    f"{info.uri}: got {len(data)} of the {end - start} bytes from byte {start}: it is short"
                )
            return data

        return self._attempt(store, info.uri, read)

    def _spool(self, store: Store, path: str, info: ObjectInfo, file: BinaryIO) -> None:
        file.seek(0)
        digest = hashlib.md5(usedforsecurity=False)
        for start in range(0, info.size, CHUNK_BYTES):
            chunk = self._read_range(store, path, info, start, min(start + CHUNK_BYTES, info.size))
            digest.update(chunk)
            file.write(chunk)
        _compare(store, path, info, info.size, digest.hexdigest())

    def _attempt(
        self,
        store: Store,
        uri: str,
        action: Callable[[], T],
        patience_s: float = PATIENCE_S,
        again: type[StorageError] = StorageError,
    ) -> T:
        """The action's result; tried again after what may pass, with growing, randomized pauses."""
        started = time.monotonic()
        for attempt in count(1):
            try:
                return action()
            except Exception as error:  # whatever this store's client raises; sorted here
                failure = _classify(store, uri, error)
                pause_s = FIRST_DELAY_S * min(2 ** (attempt - 1), _MAX_DELAYS) * random.uniform(0.5, 1.5)
                waited_s = time.monotonic() - started
                is_last = attempt >= _tries(failure) or waited_s + pause_s > patience_s
                if is_last or not isinstance(failure, again):
                    raise failure from error
            time.sleep(pause_s)
        raise AssertionError("count() has no end")


def _tries(failure: StorageError) -> int:
    if isinstance(failure, TransientStorageError):
        return TRIES
    return CORRUPT_TRIES if isinstance(failure, CorruptObjectError) else 1


def _classify(store: Store, uri: str, error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(
            f"{uri}: no space left on the disk; make room, or set TMPDIR if it was read, not written"
        )
    return store.classify(error, uri)


def _compare(store: Store, path: str, info: ObjectInfo, size: int, md5: str) -> None:
    """Are size and MD5 of what was read those of the object that was listed?"""
    if size == info.size and info.etag in (None, md5):
        return
    _check_unchanged(store, path, info)
    if size != info.size:
        raise CorruptObjectError(
            f"{info.uri}: read {size} bytes, listed with {info.size}; it was cut short on the way"
        )
    if store.etag_is_md5(path):
        raise CorruptObjectError(
            f"{info.uri}: its MD5 is {md5}, the store says {info.etag}; it is damaged, or was on the way"
        )


def _check_unchanged(store: Store, path: str, info: ObjectInfo) -> None:
    now = store.stat(path)
    if info.version not in ("", now.version):  # "": only its size was known
        raise ChangedObjectError(
            f"{info.uri} was replaced since it was listed (version {info.version}, now {now.version}); "
            f"run again for the new one"
        )
