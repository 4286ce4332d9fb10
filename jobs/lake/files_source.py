"""Images that are objects of their own: a slice of a folder's listing, or of a list of URIs."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from jobs.lake.shards import MAX_IMAGE_BYTES, ClaimedId, ImageIds, Shard, SourceImage, duplicate, too_large
from jobs.lake.storage import (
    AccessDeniedError,
    ChangedObjectError,
    CorruptObjectError,
    MissingObjectError,
    ObjectInfo,
    Storage,
    TransientStorageError,
)
from schemas.errors import MasklakeError, StorageError, UsageError
from schemas.labels import ErrorKind

# An object takes a round trip or two of 10-50 ms, most of it waiting: readers in parallel hide it.
_READERS = 16
_AHEAD_BYTES = 64 << 20
# Each was tried for minutes: the store is away, and the rest of the slice would take hours to say so.
_MAX_UNREACHABLE = 3
# An object that is replaced each time it is read is left for the next run.
_MAX_VERSIONS = 3

# What a read gives: an image or its failed row; None where the object is gone since it was listed; or the
# error where nothing is known of the image, which then gets no row.
_Result = SourceImage | StorageError | None


def read_objects(shard: Shard, storage: Storage, ids: ImageIds) -> Iterator[SourceImage]:
    """Give the images in order, while the next ones are being fetched: up to _READERS, about _AHEAD_BYTES.

    An object that is damaged or refused for what it is gives a failed row: kind corrupt, too_large, io; and
    of a list, missing, or unsupported for a URI that is none of ours. An object of a listing that is gone by
    now gives nothing. One that was replaced is read as it is now.

    Raises (at the end, after all that could be read):
        StorageError: objects could not be reached, or access to them is denied, so nothing can be said of
            their images: they are left for the next run.
    """
    claims = [(ids.claim(image_id), info) for image_id, info in shard.objects]
    wanted = [(claimed, info) for claimed, info in claims if claimed.wanted]
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="masklake-read")
    ahead: deque[tuple[int, Future[_Result] | _Result]] = deque()
    unread: list[StorageError] = []
    num_unreachable = 0

    def next_result() -> Iterator[SourceImage]:
        nonlocal num_unreachable
        _, future = ahead.popleft()
        result = future.result() if isinstance(future, Future) else future
        if isinstance(result, SourceImage):
            yield result
        elif result is not None:
            unread.append(result)
            num_unreachable += isinstance(result, TransientStorageError)

    try:
        look_up = partial(_look_up, shard=shard.name, storage=storage)
        for found in pool.map(look_up, wanted):
            size_bytes = found.info.size if isinstance(found, _Found) else 0
            while ahead and (len(ahead) == _READERS or sum(s for s, _ in ahead) + size_bytes > _AHEAD_BYTES):
                yield from next_result()
            if num_unreachable >= _MAX_UNREACHABLE:
                break
            ahead.append(
                (size_bytes, pool.submit(_read, found, shard.name, storage))
                if isinstance(found, _Found)
                else (0, found)
            )
        while ahead:
            yield from next_result()
    finally:
        pool.shutdown(cancel_futures=True)
    if unread:
        others = f" ({len(unread) - 1} more of this slice likewise)" if len(unread) > 1 else ""
        raise StorageError(f"{unread[0]}{others}")


@dataclass(frozen=True)
class _Found:
    """listed: by a listing, which says what there was; a list says what there should be."""

    image_id: str
    info: ObjectInfo
    listed: bool


def _look_up(item: tuple[ClaimedId, ObjectInfo | None], shard: str, storage: Storage) -> _Found | _Result:
    """What to read, or the failed row of what is not worth it. Only a list's objects cost a request."""
    claimed, info = item
    if info is None:
        return duplicate(claimed, shard)
    listed = info.size >= 0
    if not listed:
        try:
            info = storage.stat(info.uri)
        except MasklakeError as error:
            return _refusal(claimed.image_id, shard, error)
    if info.size > MAX_IMAGE_BYTES:
        return replace(too_large(claimed.image_id, shard, info.size), version=info.version)
    return _Found(claimed.image_id, info, listed)


def _read(found: _Found, shard: str, storage: Storage) -> _Result:
    info = found.info
    for _ in range(_MAX_VERSIONS):
        try:
            return SourceImage(found.image_id, shard, storage.read_bytes(info), None, None, info.version)
        except MissingObjectError as error:
            return None if found.listed else _refusal(found.image_id, shard, error)
        except ChangedObjectError as error:
            changed = error
        except MasklakeError as error:
            return _refusal(found.image_id, shard, error, info.version)
        try:
            info = storage.stat(info.uri)
        except MasklakeError as error:
            return None if isinstance(error, MissingObjectError) else _refusal(found.image_id, shard, error)
    return changed


def _refusal(image_id: str, shard: str, error: MasklakeError, version: str = "") -> _Result:
    """The failed row, or the error itself where the image may be as good as any."""
    if isinstance(error, TransientStorageError | AccessDeniedError):
        return error
    kinds: dict[type[MasklakeError], ErrorKind] = {
        UsageError: ErrorKind.UNSUPPORTED,
        MissingObjectError: ErrorKind.MISSING,
        CorruptObjectError: ErrorKind.CORRUPT,
    }
    failed = SourceImage.failed(image_id, shard, kinds.get(type(error), ErrorKind.IO), str(error))
    return replace(failed, version=version)
