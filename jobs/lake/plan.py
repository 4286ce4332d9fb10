"""The plan: a source minus what the label table already has.

Enters: shards, and what is known to be done. Leaves: the shards to read, each with the image ids to skip.
Both come as values or as questions that values answer; nothing here touches storage of its own accord.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jobs.lake.done_images import ShardState
from jobs.lake.shard_index import ShardIndex
from jobs.lake.shards import TAIL_KEY
from jobs.lake.sources import Shard

_NO_SKIP: frozenset[str] = frozenset()


class Done(Protocol):
    """What the plan asks of the label table; DoneImages answers."""

    def state(self, shard: str) -> ShardState: ...

    def ids(self, shard: str) -> frozenset[str]: ...

    def open_ids(self, shard: str) -> frozenset[str]: ...

    def among(self, image_ids: Sequence[str]) -> frozenset[str]: ...

    def open_among(self, image_ids: Sequence[str]) -> frozenset[str]: ...


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

    A slice of single objects comes back without the objects that are done, so it has nothing to skip. A tar
    or Parquet shard says how many images it has only once it was read: it is left out when an earlier run
    read this very version of it to its end, and all of that is still in the table. Otherwise it is read
    again, at worst to find every image done.
    """
    for shard in shards:
        if shard.format == "files":
            done_ids = done.among([image_id for image_id, _ in shard.objects])
            if (left := _without(shard, done_ids)).objects:
                yield left, _NO_SKIP
        elif not _is_complete(shard, done, index):
            yield shard, done.ids(shard.name)


def plan_failed(shards: Iterable[Shard], done: Done) -> Iterator[tuple[Shard, Container[str]]]:
    """Give the images that failed and are to be tried again, as plan_shards does, and no others.

    The row that stands for the unread rest of a shard is tried again with all that it stood for.
    """
    for shard in shards:
        if shard.format == "files":
            open_ids = done.open_among([image_id for image_id, _ in shard.objects])
            if open_ids:
                yield _without(shard, AllBut(open_ids)), _NO_SKIP
        elif open_ids := done.open_ids(shard.name):
            has_tail = f"{shard.name}/{TAIL_KEY}" in open_ids
            yield shard, done.ids(shard.name) if has_tail else AllBut(open_ids)


def _without(shard: Shard, skip: Container[str]) -> Shard:
    objects = tuple((image_id, info) for image_id, info in shard.objects if image_id not in skip)
    return replace(shard, objects=objects, num_images=len(objects))


def _is_complete(shard: Shard, done: Done, index: ShardIndex) -> bool:
    num_images = index.get((shard.name, shard.info.version)) if shard.info else None
    if num_images is None:
        return False
    state = done.state(shard.name)
    # More than that may be done: rows of images that an earlier version of the shard had.
    return state.num_done >= num_images and state.num_open == 0
