"""Files on a disk.

A path is absolute. Hidden temporary files (".masklake-…") stand beside what is being written for a moment.
"""

import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import fsspec

from jobs.lake.store import (
    PAGE_KEYS,
    AccessDeniedError,
    Attempt,
    ChangedObjectError,
    MissingObjectError,
    ObjectInfo,
    TransientStorageError,
)
from schemas.errors import StorageError

_COPIED_BYTES = 1 << 20  # at once
# What network disks answer while their server is away.
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EIO,
        errno.EINTR,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)


class LocalStore:
    """Files on a local or network disk. Links to files and folders are followed."""

    def __init__(self) -> None:
        self.filesystem = fsspec.filesystem("file")

    def stat(self, path: str) -> ObjectInfo:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", path)
        return _file_info(path, status)

    def pages(self, path: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        page = []
        for info in _walk(path, attempt, frozenset()):
            page.append(info)
            if len(page) == PAGE_KEYS:
                yield page
                page = []
        yield page

    def read(self, path: str, start: int, end: int, version: str) -> bytes:
        with open(path, "rb") as file:
            before = _file_info(path, os.fstat(file.fileno())).version
            file.seek(start)
            data = file.read(end - start)
            after = _file_info(path, os.fstat(file.fileno())).version
        if after != (version or before):  # another file, or this one written over: half of each, perhaps
            raise ChangedObjectError(
                f"file://{path} changed since it was listed, or while it was read; run again"
            )
        return data

    def write(self, path: str, data: bytes) -> None:
        _replace(path, io.BytesIO(data))

    def write_file(self, path: str, file: Path, attempt: Attempt) -> None:
        def copy() -> None:
            with file.open("rb") as content:
                _replace(path, content)

        attempt(copy)

    def create(self, path: str, data: bytes, writer: str) -> bool:
        temporary = _write_beside(path, io.BytesIO(data))
        try:
            os.link(temporary, path)  # unlike a rename, fails where the name is taken
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    def etag_is_md5(self, path: str) -> bool:
        return False

    def check_reachable(self, path: str) -> None:
        """A folder that does not exist yet is fine: whoever reads it says so, whoever writes makes it."""
        existing = Path(path)
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.R_OK | (os.X_OK if existing.is_dir() else 0)):
            raise PermissionError(errno.EACCES, "not readable", str(existing))

    def classify(self, error: Exception, uri: str) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return MissingObjectError(f"{uri} does not exist; check the path")
        if isinstance(error, PermissionError):
            return AccessDeniedError(
                f"{uri}: permission denied; check the owner and mode of {error.filename}"
            )
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
            return TransientStorageError(f"{uri}: the disk failed ({reason}); run again once it is back")
        return StorageError(f"{uri}: {reason}")


def _walk(folder: str, attempt: Attempt, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Files below a folder in the order of their keys.

    `above` are the folders we are in, by device and inode: a link back to one of them is not followed.
    """
    status = attempt(partial(os.stat, folder))
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for key in attempt(partial(_sorted_keys, folder)):
        path = os.path.join(folder, os.fsdecode(key.rstrip(b"/")))
        if key.endswith(b"/"):
            yield from _walk(path, attempt, above | {identity})
            continue
        with suppress(MissingObjectError):  # deleted meanwhile, or a link to nothing
            status = attempt(partial(os.stat, path))
            if stat.S_ISREG(status.st_mode):
                yield _file_info(path, status)


def _sorted_keys(folder: str) -> list[bytes]:
    """Names in a folder as their keys would sort in a bucket: a folder as its name and "/"."""
    with os.scandir(folder) as entries:
        return sorted(os.fsencode(entry.name) + (b"/" if entry.is_dir() else b"") for entry in entries)


def _file_info(path: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(f"file://{path}", status.st_size, None, f"{status.st_mtime_ns}-{status.st_size}")


def _replace(path: str, content: BinaryIO) -> None:
    temporary = _write_beside(path, content)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _write_beside(path: str, content: BinaryIO) -> str:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".masklake-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            shutil.copyfileobj(content, file, _COPIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary
