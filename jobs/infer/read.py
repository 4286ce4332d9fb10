"""The read stage: shards in, their work units out, streamed in member order."""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import cast

import pyarrow as pa

from jobs.infer.metrics import count_read
from jobs.infer.units import UnitReport, read_row
from jobs.lake.plan import ShardTask
from jobs.lake.shards import SourceImage, content_hash
from jobs.lake.sources import ShardReader, slice_units
from jobs.lake.storage import Storage
from schemas.errors import StorageError
from schemas.specs import SourceSpec

TASK_SCHEMA = pa.schema([("task", pa.large_binary())])
_TASKS_PER_BATCH = 1000


class Tasks(Iterable[ShardTask]):
    """All tasks of a run, as compressed bytes in Arrow columns: a plan may name a billion objects.

    Args:
        tasks: gone through once.
    """

    def __init__(self, tasks: Iterable[ShardTask]) -> None:
        self.num_bytes = 0  # of the shards' objects, to be read at most
        self.num_objects = 0  # images that are objects of their own
        stream = iter(tasks)
        batches: list[pa.RecordBatch] = []
        while pickles := [self._pickle(task) for task in islice(stream, _TASKS_PER_BATCH)]:
            batches.append(pa.record_batch([pa.array(pickles, pa.large_binary())], schema=TASK_SCHEMA))
        self.table = pa.Table.from_batches(batches, TASK_SCHEMA)

    def _pickle(self, task: ShardTask) -> bytes:
        """The driver's own, and it travels inside the cluster only."""
        self.num_bytes += task.shard.num_bytes
        self.num_objects += len(task.shard.objects)
        return zlib.compress(pickle.dumps(task), 1)

    def __len__(self) -> int:
        return self.table.num_rows

    def parts(self, number: int) -> list[list[bytes]]:
        """The values of the table in so many parts of like length, in order; each what a UnitReader takes."""
        column = self.table["task"]
        bounds = [part * len(column) // number for part in range(number + 1)]
        return [cast(list[bytes], column[start:stop].to_pylist()) for start, stop in pairwise(bounds)]

    def likely_units(self, max_bytes: int, max_images: int) -> int:
        """How many units of these bounds there will be, as far as a listing tells."""
        return max(len(self), self.num_bytes // max_bytes, self.num_objects // max_images)

    def __iter__(self) -> Iterator[ShardTask]:
        return (_unpickle(task.as_py()) for task in self.table["task"])


def _unpickle(task: bytes) -> ShardTask:
    unpickled: ShardTask = pickle.loads(zlib.decompress(task))
    return unpickled


class UnitReader:
    """Turns tasks into unit rows."""

    def __init__(self, source: SourceSpec, storage: Storage, max_bytes: int, max_images: int) -> None:
        self._source = source
        self._storage = storage
        self._max_bytes = max_bytes
        self._max_images = max_images

    def __call__(self, tasks: Sequence[bytes]) -> Iterator[pa.Table]:
        """Read what one of Tasks.parts() asks for."""
        for task in tasks:
            yield from self.read_units(_unpickle(task))

    def read_units(self, task: ShardTask) -> Iterator[pa.Table]:
        """READ_SCHEMA rows: the shard's units and, last, one without images that closes the shard.

        A shard that cannot be read to its end is closed with `shard_error`; what was read before stands.
        """
        shard = task.shard
        reader = ShardReader(shard, self._source, self._storage, task.skip)
        closing = UnitReport(shard.name)
        started = time.perf_counter()
        ordinal = 0
        try:
            wanted = _without_unchanged(reader, task.contents, closing.unchanged)
            for images in slice_units(wanted, self._max_bytes, self._max_images):
                report = UnitReport(
                    shard.name,
                    num_images=len(images),
                    encoded_bytes=sum(len(image.data or b"") for image in images),
                    read_s=time.perf_counter() - started,
                )
                count_read(report.encoded_bytes)
                # Unique within the run: a shard is one task, and its image_ids are unique.
                yield read_row(f"{shard.name}#{ordinal:06d}:{images[0].image_id}", report, images)
                del images  # before the next ones are read: a unit is 64 MB
                ordinal += 1
                started = time.perf_counter()
            closing.shard_num_units = ordinal
            closing.shard_num_images = reader.num_images
            closing.shard_version = shard.info.version if shard.info else None
            closing.shard_gone = reader.ids.missing(task.known_ids) if shard.info else []
        except StorageError as error:
            closing.shard_error = str(error)
        yield read_row(f"{shard.name}#end:{shard.uri}", closing, [])


def _without_unchanged(
    images: Iterable[SourceImage], contents: Mapping[str, bytes], unchanged: list[str]
) -> Iterator[SourceImage]:
    """Leave out images that are what they were, though their object is another; note their ids."""
    for image in images:
        known = contents.get(image.image_id)
        if known is not None and image.data is not None and content_hash(image.data) == known:
            unchanged.append(image.image_id)
        else:
            yield image
