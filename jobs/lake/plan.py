"""The plan: a source minus what the label table already has.

Enters: shards, and what is known to be done. Leaves: the shards to read, each with the image ids to skip.
Both come as values or as questions that values answer; nothing here touches storage of its own accord.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from jobs.lake.done_images import ShardState
from jobs.lake.shard_index import ShardIndex
from jobs.lake.sources import Shard

_NO_SKIP: frozenset[str] = frozenset()


class Done(Protocol):
    """What the plan asks of the label table; DoneImages answers."""

    def state(self, shard: str) -> ShardState: ...

    def ids(self, shard: str) -> frozenset[str]: ...

    def among(self, image_ids: Sequence[str]) -> frozenset[str]: ...


def plan_shards(
    shards: Iterable[Shard], done: Done, index: ShardIndex
) -> Iterator[tuple[Shard, frozenset[str]]]:
    """Give what is left to do: each shard that is not complete, and the ids of its images to skip.

    A slice of single objects comes back without the objects that are done, so it has nothing to skip. A tar
    or Parquet shard says how many images it has only once it was read: it is left out when an earlier run
    read this very version of it to its end, and all of that is still in the table. Otherwise it is read
    again, at worst to find every image done.
    """
    for shard in shards:
        if shard.format == "files":
            left = _without_done(shard, done)
            if left.objects:
                yield left, _NO_SKIP
        elif not _is_complete(shard, done, index):
            yield shard, done.ids(shard.name)


def _without_done(shard: Shard, done: Done) -> Shard:
    done_ids = done.among([image_id for image_id, _ in shard.objects])
    objects = tuple((image_id, info) for image_id, info in shard.objects if image_id not in done_ids)
    return replace(shard, objects=objects, num_images=len(objects))


def _is_complete(shard: Shard, done: Done, index: ShardIndex) -> bool:
    num_images = index.get((shard.name, shard.info.version)) if shard.info else None
    if num_images is None:
        return False
    state = done.state(shard.name)
    # More than that may be done: rows of images that an earlier version of the shard had.
    return state.num_done >= num_images and state.num_open == 0
