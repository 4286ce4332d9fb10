"""The read stage: a shard in, its work units out, streamed in member order."""

from __future__ import annotations

import pickle
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.infer.units import UnitReport, read_row
from jobs.lake.sources import Shard, ShardReader, slice_units
from jobs.lake.storage import Storage
from schemas.errors import StorageError
from schemas.specs import SourceSpec

TASK_SCHEMA = pa.schema([("task", pa.large_binary())])


@dataclass(frozen=True)
class ShardTask:
    """What one read task is asked to do: a shard, and the image_ids of it that are not wanted."""

    shard: Shard
    skip: Container[str]


def task_table(tasks: Sequence[ShardTask]) -> pa.Table:
    """One row a task. The pickles are the driver's own and travel inside the cluster only."""
    return pa.table({"task": [pickle.dumps(task) for task in tasks]}, schema=TASK_SCHEMA)


class UnitReader:
    """Turns task rows into unit rows."""

    def __init__(self, source: SourceSpec, storage: Storage, max_bytes: int, max_images: int) -> None:
        self._source = source
        self._storage = storage
        self._max_bytes = max_bytes
        self._max_images = max_images

    def __call__(self, batch: Any) -> Iterator[pa.Table]:
        """Read what a table of TASK_SCHEMA asks for; Ray's types leave its format open."""
        for task in batch["task"]:
            yield from self.read_units(pickle.loads(task.as_py()))

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
            for images in slice_units(reader, self._max_bytes, self._max_images):
                report = UnitReport(
                    shard.name,
                    num_images=len(images),
                    encoded_bytes=sum(len(image.data or b"") for image in images),
                    read_s=time.perf_counter() - started,
                )
                # Unique within the run: a shard is one task, and its image_ids are unique.
                yield read_row(f"{shard.name}#{ordinal:06d}:{images[0].image_id}", report, images)
                ordinal += 1
                started = time.perf_counter()
            closing.shard_num_units = ordinal
            closing.shard_num_images = reader.num_images
            closing.shard_version = shard.info.version if shard.info else None
        except StorageError as error:
            closing.shard_error = str(error)
        yield read_row(f"{shard.name}#end:{shard.uri}", closing, [])
