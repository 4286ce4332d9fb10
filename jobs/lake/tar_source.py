"""Images of a tar shard, plain or gzipped, WebDataset or not.

image_id is "<shard name>/<member name without its last suffix>". Members that are not images by their suffix
are passed over: .json, .txt, .cls and hidden ones.
"""

import gzip
from collections.abc import Iterator
from typing import BinaryIO, cast

from jobs.lake.shards import (
    MAX_IMAGE_BYTES,
    ImageIds,
    Shard,
    SourceImage,
    duplicate,
    is_image_name,
    too_large,
)
from jobs.lake.storage import CorruptObjectError, ObjectInfo, Storage
from jobs.lake.tar import TarError, TarMember, TarReader
from schemas.labels import ErrorKind

_GZIP_MAGIC = b"\x1f\x8b"


def read_tar(shard: Shard, info: ObjectInfo, storage: Storage, ids: ImageIds) -> Iterator[SourceImage]:
    """Give the images in member order; what `ids` does not want is not held.

    Where the archive is damaged, the images before the damage are good, and one more failed row stands for
    the rest of it: "<shard name>/#tail", which says at which byte. It is also there where nothing could be
    read.

    Raises:
        ChangedObjectError, MissingObjectError: the shard was replaced or deleted while it was read; what came
            before are images of the one that was listed, and nothing is known about the rest.
    """
    try:
        with storage.open_verified(info) as stream:
            yield from _members(shard, info, stream, ids)
    except TarError as error:
        yield from _tail(shard, error.kind, str(error), ids)
    except CorruptObjectError as error:
        yield from _tail(shard, ErrorKind.CORRUPT, str(error), ids)


def _members(shard: Shard, info: ObjectInfo, stream: BinaryIO, ids: ImageIds) -> Iterator[SourceImage]:
    is_gzip = stream.read(2) == _GZIP_MAGIC
    stream.seek(0)
    if is_gzip:
        reader = TarReader(cast(BinaryIO, gzip.GzipFile(fileobj=stream)), None, packed_bytes=info.size)
    else:
        reader = TarReader(stream, info.size)
    for member in reader:
        # A name that climbs, "../a.jpg", is odd but not hidden.
        if not is_image_name("/".join(part for part in member.name.split("/") if part not in (".", ".."))):
            continue
        claimed = ids.claim(f"{shard.name}/{member.name.rpartition('.')[0]}")
        if not claimed.wanted:
            continue
        if claimed.repeated:
            yield duplicate(claimed, shard.name)
        elif member.not_a_file:
            yield _not_a_file(claimed.image_id, shard.name, member)
        elif member.size_bytes > MAX_IMAGE_BYTES:
            yield too_large(claimed.image_id, shard.name, member.size_bytes)
        else:
            try:
                data = reader.read_data()
            except TarError:
                ids.give_back(claimed)  # it belongs to the tail
                raise
            yield SourceImage(claimed.image_id, shard.name, data, None, None)


def _not_a_file(image_id: str, shard: str, member: TarMember) -> SourceImage:
    return SourceImage.failed(
        image_id,
        shard,
        ErrorKind.UNSUPPORTED,
        f"member {member.name!r} is a {member.not_a_file}, which has no bytes of its own here; pack plain "
        f"files (GNU tar: --dereference --hard-dereference, without --sparse)",
    )


def _tail(shard: Shard, kind: ErrorKind, problem: str, ids: ImageIds) -> Iterator[SourceImage]:
    ids.is_whole = False
    claimed = ids.claim(f"{shard.name}/#tail")
    if claimed.wanted:
        yield SourceImage.failed(
            claimed.image_id,
            shard.name,
            kind,
            f"{problem}; {ids.num_images - 1} images before were read, the rest of {shard.name} was not: "
            f"pack it anew",
        )
