"""The plan: a source minus what the label table already has.

Enters: shards, and what is known to be done. Leaves: the shards to read, each with the images to skip.
Both come as values or as questions that values answer; nothing here touches storage of its own accord.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.lake.done_images import TO_DO, Known, ShardState, Standing
from jobs.lake.object_table import ObjectTable, concat
from jobs.lake.shard_index import ShardIndex
from jobs.lake.shard_listing import SLICE_IMAGES
from jobs.lake.shards import TAIL_KEY
from jobs.lake.sources import Shard


class Done(Protocol):
    """What the plan asks of the label table; DoneImages answers."""

    def state(self, shard: str) -> ShardState: ...

    def ids(self, shard: str, version: str) -> frozenset[str]: ...

    def contents(self, shard: str, version: str) -> dict[str, bytes]: ...

    def open_ids(self, shard: str) -> frozenset[str]: ...

    def known(self, objects: ObjectTable) -> Known: ...


@dataclass(frozen=True)
class AllBut(Container[str]):
    """Every image id but some: to skip all that is not wanted."""

    wanted: frozenset[str]

    def __contains__(self, image_id: object) -> bool:
        return image_id not in self.wanted


@dataclass(frozen=True)
class ShardTask:
    """What one read task is asked to do.

    skip: image_ids that are not wanted. contents: image_id -> content_hash of images that are wanted only if
    something else is in them by now.
    """

    shard: Shard
    skip: Container[str] = frozenset()
    contents: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def known_ids(self) -> set[str]:
        """Images that have a row, as far as the task says."""
        return {*(self.skip if isinstance(self.skip, frozenset) else ()), *self.contents}


def plan_shards(shards: Iterable[Shard], done: Done, index: ShardIndex) -> Iterator[ShardTask]:
    """Give what is left to do: each shard that is not complete.

    Slices of single objects come back as slices of SLICE_IMAGES of those that are left, so they have nothing
    to skip. A tar or Parquet shard says how many images it has only once it was read: it is left out when an
    earlier run read this very version of it to its end, and all of that is still in the table. Otherwise it
    is read again, at worst to find every image done.
    """
    left = _Slices()
    for shard in shards:
        if shard.format == "files":
            known = done.known(shard.objects)
            yield from left.add(shard, known, np.isin(known.standing, TO_DO))
        elif not _is_complete(shard, done, index):
            version = shard.info.version if shard.info else ""
            yield ShardTask(shard, done.ids(shard.name, version), done.contents(shard.name, version))
    yield from left.rest()


def plan_failed(shards: Iterable[Shard], done: Done) -> Iterator[ShardTask]:
    """Give the images that failed and are to be tried again, as plan_shards does, and no others.

    The row that stands for the unread rest of a shard is tried again with all that it stood for.
    """
    left = _Slices()
    for shard in shards:
        if shard.format == "files":
            known = done.known(shard.objects)
            yield from left.add(shard, known, known.standing == Standing.RETRY)
        elif open_ids := done.open_ids(shard.name):
            has_tail = f"{shard.name}/{TAIL_KEY}" in open_ids
            yield ShardTask(shard, done.ids(shard.name, "") if has_tail else AllBut(open_ids))
    yield from left.rest()


class _Slices:
    """Gathers what is left of slices into slices of SLICE_IMAGES: of a listing with a hole here and there,
    one task for many holes.
    """

    def __init__(self) -> None:
        self._last: Shard | None = None
        self._parts: list[ObjectTable] = []
        self._contents: dict[str, bytes] = {}
        self._num = 0

    def add(self, shard: Shard, known: Known, wanted: NDArray[np.bool_]) -> Iterator[ShardTask]:
        """Take what is wanted of a slice; all slices of a source are alike but for their objects."""
        self._last = shard
        objects = shard.objects.where(wanted)
        self._parts.append(objects)
        self._num += len(objects)
        changed = pa.array(wanted & (known.standing == Standing.CHANGED))
        ids, hashes = shard.objects.image_ids.filter(changed), known.content_hash.filter(changed)
        for image_id, content_hash in zip(ids.to_pylist(), hashes.to_pylist(), strict=True):
            if content_hash is not None:
                self._contents[str(image_id)] = content_hash
        if self._num >= SLICE_IMAGES:
            objects = concat(self._parts)
            whole = self._num - self._num % SLICE_IMAGES
            for start in range(0, whole, SLICE_IMAGES):
                yield self._slice(objects.part(start, SLICE_IMAGES))
            self._parts, self._num = [objects.part(whole, self._num - whole)], self._num - whole

    def rest(self) -> Iterator[ShardTask]:
        if self._num:
            yield self._slice(concat(self._parts))

    def _slice(self, objects: ObjectTable) -> ShardTask:
        assert self._last is not None, "there are objects, so there was a slice"
        contents = {}
        if self._contents:
            ids = (str(image_id) for image_id in objects.image_ids.to_pylist())
            contents = {i: self._contents.pop(i) for i in ids if i in self._contents}
        return ShardTask(replace(self._last, objects=objects), frozenset(), contents)


def _is_complete(shard: Shard, done: Done, index: ShardIndex) -> bool:
    num_images = index.get((shard.name, shard.info.version)) if shard.info else None
    if num_images is None:
        return False
    state = done.state(shard.name)
    # More than that may be done: rows of images that an earlier version of the shard had.
    return state.num_done >= num_images and state.num_open == 0
