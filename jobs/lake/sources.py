"""From a source to encoded images: list its shards, read one shard, slice what comes out into work units.

Enters: a SourceSpec and Storage. Leaves: SourceImages in the order of the shard, each with its bytes or with
the reason why it has none; nothing that looks like an image is left out without a row. Memory stays at one
image plus what tar_source, parquet_source or files_source read ahead, however large the shard.
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from jobs.lake.files_source import read_objects
from jobs.lake.parquet_source import read_parquet
from jobs.lake.shard_listing import list_shards
from jobs.lake.shards import ImageIds, Shard, SourceImage
from jobs.lake.storage import Storage
from jobs.lake.tar_source import read_tar
from schemas.errors import StorageError
from schemas.specs import SourceSpec

__all__ = ["Shard", "ShardReader", "SourceImage", "list_shards", "slice_units"]


class ShardReader:
    """The images of one shard, those in `skip` left out.

    num_images: images in the shard, with failed and skipped ones: known once the iteration came to its end,
        None before. It equals the number of different image ids the shard gives over all runs.
    ids: those that were met so far, of this iteration.

    Raises (while iterating):
        StorageError: the shard as a whole vanished, is denied, or cannot be reached: nothing is known about
        its images. UsageError: a Parquet shard without the columns.
    """

    def __init__(self, shard: Shard, spec: SourceSpec, storage: Storage, skip: Container[str]) -> None:
        self.num_images: int | None = None
        self.ids = ImageIds(skip)
        self._shard = shard
        self._spec = spec
        self._storage = storage
        self._skip = skip

    def __iter__(self) -> Iterator[SourceImage]:
        self.num_images = None
        ids = self.ids = ImageIds(self._skip)
        info = self._shard.info
        try:
            for image in self._read(ids):
                # Single objects have versions of their own.
                yield image if info is None else replace(image, version=info.version)
        except OSError as error:  # from a file that is read in place
            raise StorageError(f"{self._shard.uri}: reading failed ({error.strerror or error})") from error
        self.num_images = ids.num_images

    def _read(self, ids: ImageIds) -> Iterator[SourceImage]:
        if self._shard.info is None:
            return read_objects(self._shard, self._storage, ids)
        if self._shard.format == "tar":
            return read_tar(self._shard, self._shard.info, self._storage, ids)
        return read_parquet(self._shard, self._shard.info, self._spec, self._storage, ids)


def slice_units(
    images: Iterable[SourceImage], max_bytes: int, max_images: int
) -> Iterator[list[SourceImage]]:
    """Cut a stream of images into work units of at most max_bytes encoded bytes and max_images images.

    A larger image is a unit of its own. No unit is empty. A StorageError of the stream is raised after the
    last unit, so that what was read before it is not lost.
    """
    unit: list[SourceImage] = []
    unit_bytes = 0
    failure: StorageError | None = None
    try:
        for image in images:
            image_bytes = len(image.data or b"")
            if unit and (unit_bytes + image_bytes > max_bytes or len(unit) == max_images):
                yield unit
                unit, unit_bytes = [], 0
            unit.append(image)
            unit_bytes += image_bytes
    except StorageError as error:
        failure = error
    if unit:
        yield unit
    if failure is not None:
        raise failure
