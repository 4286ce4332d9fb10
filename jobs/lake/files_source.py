"""Images that are objects of their own: a slice of a folder's listing, or of a list of URIs."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from jobs.lake.shards import MAX_IMAGE_BYTES, ClaimedId, ImageIds, Shard, SourceImage, duplicate, too_large
from jobs.lake.storage import CorruptObjectError, MissingObjectError, ObjectInfo, Storage
from schemas.errors import MasklakeError, UsageError
from schemas.labels import ErrorKind

# An object takes a round trip or two of 10-50 ms, most of it waiting: readers in parallel hide it.
_READERS = 16
_AHEAD_BYTES = 64 << 20


def read_objects(shard: Shard, storage: Storage, ids: ImageIds) -> Iterator[SourceImage]:
    """Give the images in order, while the next ones are being fetched: up to _READERS, about _AHEAD_BYTES.

    An object that cannot be read gives a failed row: kind missing, corrupt, io (after retries), or
    unsupported for a URI in a list that is none of ours.
    """
    claims = [(ids.claim(image_id), info) for image_id, info in shard.objects]
    wanted = [(claimed, info) for claimed, info in claims if claimed.wanted]
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="masklake-read")
    ahead: deque[tuple[int, Future[SourceImage] | SourceImage]] = deque()
    try:
        for found in pool.map(lambda item: _look_up(item[0], item[1], shard.name, storage), wanted):
            size_bytes = 0 if isinstance(found, SourceImage) else found.info.size
            while ahead and (len(ahead) == _READERS or sum(s for s, _ in ahead) + size_bytes > _AHEAD_BYTES):
                yield _result(ahead.popleft()[1])
            ahead.append(
                (0, found)
                if isinstance(found, SourceImage)
                else (size_bytes, pool.submit(_read, found, shard.name, storage))
            )
        while ahead:
            yield _result(ahead.popleft()[1])
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Found:
    image_id: str
    info: ObjectInfo


def _look_up(
    claimed: ClaimedId, info: ObjectInfo | None, shard: str, storage: Storage
) -> _Found | SourceImage:
    """What to read, or the failed row of what is not worth it. Only a list's objects cost a request."""
    if info is None:
        return duplicate(claimed, shard)
    if info.size < 0:
        try:
            info = storage.stat(info.uri)
        except MasklakeError as error:
            return _failed(claimed.image_id, shard, error)
    if info.size > MAX_IMAGE_BYTES:
        return too_large(claimed.image_id, shard, info.size)
    return _Found(claimed.image_id, info)


def _read(found: _Found, shard: str, storage: Storage) -> SourceImage:
    try:
        return SourceImage(found.image_id, shard, storage.read_bytes(found.info), None, None)
    except MasklakeError as error:
        return _failed(found.image_id, shard, error)


def _failed(image_id: str, shard: str, error: MasklakeError) -> SourceImage:
    kinds: dict[type[MasklakeError], ErrorKind] = {
        UsageError: ErrorKind.UNSUPPORTED,
        MissingObjectError: ErrorKind.MISSING,
        CorruptObjectError: ErrorKind.CORRUPT,
    }
    return SourceImage.failed(image_id, shard, kinds.get(type(error), ErrorKind.IO), str(error))


def _result(image: Future[SourceImage] | SourceImage) -> SourceImage:
    return image if isinstance(image, SourceImage) else image.result()
