"""What a source is made of: shards to read, and the images that come out of them."""

import hashlib
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jobs.lake.object_table import NO_OBJECTS, ObjectTable
from jobs.lake.storage import ObjectInfo
from schemas.labels import ErrorKind

# An image's encoded bytes are held whole; no photograph is near this, a member that claims more is no image.
MAX_IMAGE_BYTES = 256_000_000
# "<shard name>/#tail" is the id of the row that stands for what could not be read of a damaged shard.
TAIL_KEY = "#tail"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Shard:
    """What one read task reads.

    uri: the tar or Parquet object; of a slice of single objects, one of them, or the list.
    name: stands in column `shard` and is the same in every run: the object's key below the source. All slices
        of a folder of images are one shard, ".", and all slices of a list are one, the list's name.
    info: the tar or Parquet object as it was listed; None for a slice.
    objects: of a slice, in the order of the listing. Empty otherwise.
    """

    uri: str
    name: str
    format: Literal["tar", "parquet", "files"]
    info: ObjectInfo | None
    objects: ObjectTable = NO_OBJECTS

    @property
    def num_bytes(self) -> int:
        """What there is to read at most; objects whose size a list does not say count as nothing."""
        return self.objects.num_bytes if self.info is None else max(0, self.info.size)


@dataclass(frozen=True)
class SourceImage:
    """One image as it came out of its shard: its encoded bytes, or else why there are none.

    version: of the object that held it, as it was read; "": not known.
    """

    image_id: str
    shard: str
    data: bytes | None
    error_kind: ErrorKind | None
    error: str | None
    version: str = ""

    @classmethod
    def failed(cls, image_id: str, shard: str, kind: ErrorKind, error: str) -> "SourceImage":
        return cls(image_id, shard, None, kind, error)


class ClaimedId(NamedTuple):
    """What an image is called, whether its key stood in the shard before, whether it is to be read."""

    image_id: str
    repeated: bool
    wanted: bool


class ImageIds:
    """Gives the images of one shard their ids in the order of reading, and counts them.

    The second image with the key K becomes "K#2", which no other image has. The same shard gives the same ids
    again, whatever is skipped.

    is_whole: false once a reader met damage, which may hide images.

    Args:
        skip: ids that are not wanted; they are counted.
    """

    def __init__(self, skip: Container[str]) -> None:
        self.is_whole = True
        self._skip = skip
        self._taken: set[str] = set()

    @property
    def num_images(self) -> int:
        return len(self._taken)

    def missing(self, image_ids: Iterable[str]) -> list[str]:
        """Those that the shard, read to its end, does not hold; none where that cannot be told."""
        return sorted(set(image_ids) - self._taken) if self.is_whole else []

    def claim(self, key: str) -> ClaimedId:
        image_id, number = key, 1
        while image_id in self._taken:
            number += 1
            image_id = f"{key}#{number}"
        self._taken.add(image_id)
        return ClaimedId(image_id, number > 1, image_id not in self._skip)

    def give_back(self, claimed: ClaimedId) -> None:
        """The image turned out not to be one."""
        self._taken.remove(claimed.image_id)


def content_hash(data: bytes) -> bytes:
    """BLAKE2b-128 of the encoded bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def is_image_name(key: str) -> bool:
    """By its suffix, in any case; a hidden file (also macOS's "._photo.jpg") is none, at any depth."""
    return key.lower().endswith(_IMAGE_SUFFIXES) and not any(part.startswith(".") for part in key.split("/"))


def image_name(path: str) -> str:
    """A file's name without folder and image suffix: what an image's key and a file_name have in common."""
    name = path.rstrip("/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and suffix.isalnum() and 2 < len(suffix) < 5 else name


def duplicate(claimed: ClaimedId, shard: str) -> SourceImage:
    return SourceImage.failed(
        claimed.image_id,
        shard,
        ErrorKind.DUPLICATE_KEY,
        f"its key stands in {shard} before; only the first is labelled: rename this one",
    )


def too_large(image_id: str, shard: str, size_bytes: int) -> SourceImage:
    return SourceImage.failed(
        image_id,
        shard,
        ErrorKind.TOO_LARGE,
        f"{size_bytes} encoded bytes, at most {MAX_IMAGE_BYTES} are read: is it an image?",
    )
