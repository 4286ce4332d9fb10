"""What a kind of object storage has to offer, and the words for what goes wrong there.

local_store, s3_store and gcs_store each implement Store for one kind; storage.py adds what they share:
retries, comparing what was read with what was listed, and the choice by URI. A Store's methods take a path
without its scheme ("bucket/key", "/folder/file") and raise whatever their client raises; classify() turns
that into a StorageError.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from schemas.errors import StorageError

T = TypeVar("T")
# Runs an action, again after a transient failure; storage.py gives it to what makes several requests in a
# row.
Attempt = Callable[[Callable[[], Any]], Any]

# Keys of one page of a listing; what S3 and GCS give at most, or by default.
PAGE_KEYS = 1000


class MissingObjectError(StorageError):
    """There is no such object, folder or bucket."""


class AccessDeniedError(StorageError):
    """No credentials, or the store refuses those it got."""


class CorruptObjectError(StorageError):
    """Size or checksum of what was read differ from what the store says they are."""


class ChangedObjectError(StorageError):
    """The object was replaced since it was listed; what was read of it is of no use, or cannot be told."""


class TransientStorageError(StorageError):
    """The store or the network to it failed in a way that may pass; it did not within our retries."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object, as a listing or a stat saw it.

    uri: full URI, as Storage.normalize gives it.
    size: bytes; -1 where only the URI is known (an entry of a list): stat it before reading.
    etag: MD5 of the content, 32 hex digits, where the store says one; None otherwise.
    version: changes whenever the content does: an ETag, a generation, or mtime_ns and size on disk.
    """

    uri: str
    size: int
    etag: str | None
    version: str


class Store(Protocol):
    """One kind of storage. Paths lead with the bucket, if there are buckets."""

    @property
    def filesystem(self) -> Any:
        """fsspec's, which is not typed."""

    def stat(self, path: str) -> ObjectInfo: ...

    def pages(self, path: str, attempt: Attempt) -> Iterator[list[ObjectInfo]]:
        """Every object below the folder `path`, at any depth, in order of the keys' bytes, page by page."""

    def read(self, path: str, start: int, end: int, version: str) -> bytes:
        """Bytes start to end, end excluded; fewer where the object ends before. start < end.

        Raises ChangedObjectError where the store can tell that the object is no longer of that version, so
        that parts read one after another are never parts of different objects; version "" stands for any.
        """

    def write(self, path: str, data: bytes) -> None:
        """Whole or not at all; replaces what is there."""

    def write_file(self, path: str, file: Path, attempt: Attempt) -> None:
        """Like write, of a file on this machine, of which no more than a part is in memory at once."""

    def create(self, path: str, data: bytes, writer: str) -> bool:
        """Like write, but False where an object exists, unless it was made by this very `writer` (a unique
        string).

        That exception is for a reply that got lost: the put had succeeded and is tried again.
        """

    def delete(self, path: str) -> None:
        """Nothing happens where there is no such object."""

    def etag_is_md5(self, path: str) -> bool:
        """Asked once the ETag differs from the content's MD5: under encryption it is something else."""

    def check_reachable(self, path: str) -> None:
        """Raise the client's error if the bucket is missing or refuses us."""

    def classify(self, error: Exception, uri: str) -> StorageError:
        """The client's error in our words. Never quotes a credential."""
