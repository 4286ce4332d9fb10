"""Objects in this process's memory, for tests and trials: memory://bucket/key. No other process sees them."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem

from jobs.lake.store import PAGE_KEYS, Attempt, ChangedObjectError, MissingObjectError, ObjectInfo
from schemas.errors import StorageError

# fsspec looks and then writes; between the two another thread may come.
_LOCK = threading.Lock()


class MemoryStore:
    """fsspec's in-memory files."""

    def __init__(self) -> None:
        self.filesystem = MemoryFileSystem()

    def stat(self, path: str) -> ObjectInfo:
        content = self._content(path)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return ObjectInfo(f"memory://{path}", len(content), md5, md5)

    def pages(self, path: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        paths = sorted((name.removeprefix("/") for name in self.filesystem.find(path)), key=str.encode)
        for start in range(0, len(paths), PAGE_KEYS):
            yield [self.stat(path) for path in paths[start : start + PAGE_KEYS]]

    def read(self, path: str, start: int, end: int, version: str) -> bytes:
        if version not in ("", self.stat(path).version):
            raise ChangedObjectError(f"memory://{path} was replaced since it was listed; run again")
        return self._content(path)[start:end]

    def write(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(path, data)

    def write_file(self, path: str, file: Path, attempt: Attempt) -> None:
        self.write(path, file.read_bytes())  # into memory is where it goes

    def create(self, path: str, data: bytes, writer: str) -> bool:
        with _LOCK:
            if self.filesystem.exists(path):
                return False
            self.write(path, data)
            return True

    def delete(self, path: str) -> None:
        if self.filesystem.exists(path):
            self.filesystem.rm_file(path)

    def etag_is_md5(self, path: str) -> bool:
        return True

    def check_reachable(self, path: str) -> None:
        pass

    def classify(self, error: Exception, uri: str) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return MissingObjectError(f"{uri} does not exist in this process's memory")
        return StorageError(f"{uri}: {type(error).__name__}")

    def _content(self, path: str) -> bytes:
        content: bytes = self.filesystem.cat_file(path)
        return content
