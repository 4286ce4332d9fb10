"""The pixels of an image of a training set, or why nothing can be learnt from it.

Enters: a set, an image's number, a reader. Leaves: pixels of the size that its annotations are for; a look at
a few images of a set says before a run begins whether the set is where its annotations say, and a look at
their places whether they can be read in a shuffled order without reading all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.lake.storage import ChangedObjectError, CorruptObjectError, MissingObjectError
from jobs.train.image_locations import DEFAULT_CACHE_BYTES, ImageReader
from jobs.train.training_set import TrainingSet
from maskrcnn_core.images import DecodeError, decode_image
from schemas.errors import UsageError

_TRIED_IMAGES = 16
_THREADS = 8  # reading waits for storage


@dataclass(frozen=True)
class UnreadableImage:
    """An image of which nothing could be learnt. kind: as in the label table's error_kind, or `changed`, or
    `another_size` than its annotations are for.
    """

    name: str
    kind: str
    problem: str


class UnreadableImageError(Exception):
    """Says which image it is; never leaves jobs/train."""

    def __init__(self, image: UnreadableImage) -> None:
        super().__init__(image.problem)
        self.image = image


def read_pixels(data: TrainingSet, index: int, reader: ImageReader) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of the size that the annotations are for.

    Raises:
        UnreadableImageError: the image itself is no good.
        StorageError: the store cannot be reached, which says nothing about the image.
    """
    try:
        pixels = decode_image(reader.read(data.location(index)))
    except DecodeError as error:
        raise _refusal(data, index, error.kind, str(error)) from error
    except (ChangedObjectError, MissingObjectError, CorruptObjectError) as error:
        kinds = {ChangedObjectError: "changed", MissingObjectError: "missing"}
        raise _refusal(data, index, kinds.get(type(error), "corrupt"), str(error)) from error
    height, width = data.sizes[index].tolist()
    if pixels.shape[:2] != (height, width):
        problem = f"it has {pixels.shape[0]}×{pixels.shape[1]} pixels, its annotations {height}×{width}"
        raise _refusal(data, index, "another_size", problem)
    return pixels


def check_images(name: str, data: TrainingSet, reader: ImageReader, *, strict: bool) -> None:
    """Read a few images from all over a set before anybody trains on it.

    Args:
        name: of the set, for the message.
        strict: one that cannot be read is one too many.

    Raises:
        UsageError: none of them can be read, or, if strict, not all.
        StorageError: the store cannot be reached.
    """
    indices = sorted({k * len(data) // _TRIED_IMAGES for k in range(_TRIED_IMAGES)})

    def try_to_read(index: int) -> UnreadableImage | None:
        try:
            read_pixels(data, index, reader)
        except UnreadableImageError as error:
            return error.image
        return None

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="try-images") as pool:
        bad = [image for image in pool.map(try_to_read, indices) if image is not None]
    if bad and (strict or len(bad) == len(indices)):
        raise UsageError(
            f"the data set {name}: {len(bad)} of {len(indices)} images that were tried cannot be read, first "
            f"{bad[0].name}: {bad[0].kind} ({bad[0].problem}); check that its images are those that were "
            f"annotated, or mend them. Nothing was trained."
        )


def told_of_row_groups(name: str, data: TrainingSet) -> Iterator[str]:
    """A line where single images come out of row groups that have to be read again and again."""
    num_images, num_groups, num_bytes = data.row_groups()
    if num_images > num_groups and num_bytes > DEFAULT_CACHE_BYTES:
        yield (
            f"the data set {name}: its Parquet files have {num_bytes / 2**30:,.1f} GiB and each worker keeps "
            f"{DEFAULT_CACHE_BYTES / 2**30:g}; in a shuffled order a row group of "
            f"{num_images / num_groups:,.0f} images is read for about each of them: write smaller row "
            "groups, or give the images as tars or files"
        )


def _refusal(data: TrainingSet, index: int, kind: str, problem: str) -> UnreadableImageError:
    return UnreadableImageError(UnreadableImage(data.name(index), kind, problem))
