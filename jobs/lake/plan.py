"""The plan: a source minus what the label table already has.

Enters: shards, and what is known to be done. Leaves: the shards to read, each with the image ids to skip.
Both come as values or as questions that values answer; nothing here touches storage of its own accord.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from jobs.lake.done_images import ShardState
from jobs.lake.object_table import ObjectTable, concat
from jobs.lake.shard_index import ShardIndex
from jobs.lake.shard_listing import SLICE_IMAGES
from jobs.lake.shards import TAIL_KEY
from jobs.lake.sources import Shard


class Done(Protocol):
    """What the plan asks of the label table; DoneImages answers."""

    def state(self, shard: str) -> ShardState: ...

    def ids(self, shard: str) -> frozenset[str]: ...

    def open_ids(self, shard: str) -> frozenset[str]: ...

    def known(self, image_ids: pa.ChunkedArray[Any]) -> pa.ChunkedArray[pa.BooleanScalar]: ...


@dataclass(frozen=True)
class AllBut(Container[str]):
    """Every image id but some: to skip all that is not wanted."""

    wanted: frozenset[str]

    def __contains__(self, image_id: object) -> bool:
        return image_id not in self.wanted


def plan_shards(
    shards: Iterable[Shard], done: Done, index: ShardIndex
) -> Iterator[tuple[Shard, Container[str]]]:
    """Give what is left to do: each shard that is not complete, and the ids of its images to skip.

    Slices of single objects come back as slices of SLICE_IMAGES of those that are left, so they have nothing
    to skip. A tar or Parquet shard says how many images it has only once it was read: it is left out when an
    earlier run read this very version of it to its end, and all of that is still in the table. Otherwise it
    is read again, at worst to find every image done.
    """
    left = _Slices()
    for shard in shards:
        if shard.format == "files":
            known = done.known(shard.objects.image_ids).to_pylist()
            yield from left.add(shard.objects.where([is_done is not True for is_done in known]), shard)
        elif not _is_complete(shard, done, index):
            yield shard, done.ids(shard.name)
    yield from left.rest()


def plan_failed(shards: Iterable[Shard], done: Done) -> Iterator[tuple[Shard, Container[str]]]:
    """Give the images that failed and are to be tried again, as plan_shards does, and no others.

    The row that stands for the unread rest of a shard is tried again with all that it stood for.
    """
    left = _Slices()
    for shard in shards:
        if shard.format == "files":
            known = done.known(shard.objects.image_ids).to_pylist()
            yield from left.add(shard.objects.where([is_done is False for is_done in known]), shard)
        elif open_ids := done.open_ids(shard.name):
            has_tail = f"{shard.name}/{TAIL_KEY}" in open_ids
            yield shard, done.ids(shard.name) if has_tail else AllBut(open_ids)
    yield from left.rest()


class _Slices:
    """Gathers what is left of slices into slices of SLICE_IMAGES: of a listing with a hole here and there,
    one task for many holes.
    """

    def __init__(self) -> None:
        self._last: Shard | None = None
        self._parts: list[ObjectTable] = []
        self._num = 0

    def add(self, objects: ObjectTable, of: Shard) -> Iterator[tuple[Shard, frozenset[str]]]:
        """Take what is left of a slice; all slices of a source are alike but for their objects."""
        self._last = of
        self._parts.append(objects)
        self._num += len(objects)
        if self._num >= SLICE_IMAGES:
            objects = concat(self._parts)
            whole = self._num - self._num % SLICE_IMAGES
            for start in range(0, whole, SLICE_IMAGES):
                yield self._slice(objects.part(start, SLICE_IMAGES))
            self._parts, self._num = [objects.part(whole, self._num - whole)], self._num - whole

    def rest(self) -> Iterator[tuple[Shard, frozenset[str]]]:
        if self._num:
            yield self._slice(concat(self._parts))

    def _slice(self, objects: ObjectTable) -> tuple[Shard, frozenset[str]]:
        assert self._last is not None, "there are objects, so there was a slice"
        return replace(self._last, objects=objects), frozenset()


def _is_complete(shard: Shard, done: Done, index: ShardIndex) -> bool:
    num_images = index.get((shard.name, shard.info.version)) if shard.info else None
    if num_images is None:
        return False
    state = done.state(shard.name)
    # More than that may be done: rows of images that an earlier version of the shard had.
    return state.num_done >= num_images and state.num_open == 0
