"""Sizes the pool of label actors and the tasks around it, each number with its reason.

Enters: what the cluster has, the spec's pool section. Leaves: a PoolPlan without any "auto".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.errors import UsageError
from schemas.specs import PoolSpec

# A read task waits for storage and hashes what it reads, a write task compresses rows: neither fills a core.
# Odd figures, because Ray Data fuses a task with an actor that asks for the same, and then the actor does the
# reading.
READ_CPUS = 0.4
WRITE_CPUS = 0.2

# Ray Data's tasks between the stages ask for one CPU and cannot be told otherwise. Where actors hold all
# CPUs, those tasks never start and the job hangs, so one CPU stays free of actors.
_FREE_CPUS = 1.0

# One unit in work and one waiting. On calls of 150 ms that keeps an actor busy for 0.90 of its time (1: 0.72,
# 4: 0.94); units take seconds, so the gap is smaller still, and each unit more is up to 64 MB and repeated
# work.
TASKS_IN_FLIGHT = 2

# About 10 s of an actor's work: progress, commits and lost work stay fine-grained. On a GPU the 64 MB of a
# unit are the tighter bound, and 512 images what the design allows.
_GPU_MAX_IMAGES = 512
_CPU_MAX_IMAGES = {"lite": 32}
_CPU_MAX_IMAGES_RESNET = 4

# On a GPU the CPUs decode: 2.6 ms a photograph and core, so 8 cores feed 3000 photographs a second, more than
# one GPU takes. On CPUs the convolutions use them: two an actor halve the replicas in memory.
_MOST_CPUS_PER_GPU_ACTOR = 8.0
_CPUS_PER_CPU_ACTOR = 2.0
# Not measured: convolutions of one image gain little from more.
_MOST_THREADS = 8


@dataclass(frozen=True)
class PoolPlan:
    """What the pipeline asks Ray for.

    Attributes:
        min_actors, max_actors: bounds of the pool; Ray Data scales between them.
        gpus_per_actor, cpus_per_actor: what Ray books for an actor.
        torch_threads: what an actor's PyTorch and decoding may really use.
        tasks_in_flight: units sent to an actor before it returned the first.
        read_cpus, write_cpus: what Ray books for a task.
        max_images: in a unit.
    """

    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    torch_threads: int
    tasks_in_flight: int
    read_cpus: float
    write_cpus: float
    max_images: int


def actor_profile(
    device_gpus_available: float,
    num_cpus: float,
    pool: PoolSpec,
    preset: str,
    *,
    node_cpus: Sequence[float] | None = None,
    max_images: int | Literal["auto"] = "auto",
) -> PoolPlan:
    """Replace every "auto" and null by a number that fits the cluster.

    Args:
        device_gpus_available: GPUs of all nodes.
        num_cpus: CPUs of all nodes.
        pool: the spec's section.
        preset: the model's, such as "lite"; it decides how long an image takes.
        node_cpus: CPUs of each node, for an actor cannot stand on two; None: one node.
        max_images: the spec's unit.max_images.

    Raises:
        UsageError: the actors that the spec wants would never start. Where max_actors is given the spec is
            taken at its word: the cluster may grow.
    """
    nodes = list(node_cpus) if node_cpus else [num_cpus]
    largest = max(nodes) or 1.0
    gpus = _gpus_per_actor(device_gpus_available, pool)
    wanted = pool.max_actors
    cpus: float
    if pool.cpus_per_actor != "auto":
        cpus = pool.cpus_per_actor
    elif gpus > 0:
        actors = wanted or max(1, math.floor(device_gpus_available / gpus))
        cpus = min(_MOST_CPUS_PER_GPU_ACTOR, largest, _whole((num_cpus - _FREE_CPUS) / actors))
    else:
        cpus = min(_CPUS_PER_CPU_ACTOR, largest, _whole(num_cpus - _FREE_CPUS))

    room = _room(nodes, cpus)
    if gpus > 0:
        room = min(room, math.floor(device_gpus_available / gpus))
    if wanted is None and room < pool.min_actors:
        raise UsageError(
            f"the cluster has {num_cpus:g} CPUs, of which {_FREE_CPUS:g} is kept for reading and writing, "
            f"and {device_gpus_available:g} GPUs: room for {room} actors of {cpus:g} CPUs and {gpus:g} GPUs, "
            f"the spec wants {pool.min_actors}; lower pool.min_actors, pool.cpus_per_actor or "
            "pool.gpus_per_actor, or set pool.max_actors where the cluster grows"
        )
    max_actors = room if wanted is None else wanted
    return PoolPlan(
        min_actors=pool.min_actors,
        max_actors=max_actors,
        gpus_per_actor=gpus,
        cpus_per_actor=cpus,
        torch_threads=_threads(pool, cpus, gpus, nodes, max_actors),
        tasks_in_flight=TASKS_IN_FLIGHT,
        read_cpus=READ_CPUS,
        write_cpus=WRITE_CPUS,
        max_images=_max_images(gpus, preset) if max_images == "auto" else max_images,
    )


def _gpus_per_actor(gpus_available: float, pool: PoolSpec) -> float:
    gpus = (1.0 if gpus_available >= 1 else 0.0) if pool.gpus_per_actor == "auto" else pool.gpus_per_actor
    if gpus > 1 and gpus != int(gpus):
        raise UsageError(f"pool.gpus_per_actor is {gpus:g}, wanted a whole number, or less than 1")
    return gpus


def _whole(cpus: float) -> float:
    """Whole CPUs where there is one, else hundredths; never nothing."""
    return math.floor(cpus * 100) / 100 if 0.01 <= cpus < 1 else max(1.0, math.floor(cpus))


def _room(nodes: Sequence[float], cpus_per_actor: float) -> int:
    """Actors that fit on the nodes, with _FREE_CPUS kept on the node where that costs the least."""
    whole = [math.floor(node / cpus_per_actor) for node in nodes]
    shrunk = [math.floor(max(0.0, node - _FREE_CPUS) / cpus_per_actor) for node in nodes]
    return sum(whole) - min(full - rest for full, rest in zip(whole, shrunk, strict=True))


def _threads(pool: PoolSpec, cpus: float, gpus: float, nodes: Sequence[float], actors: int) -> int:
    """Threads of an actor. On CPUs the actors share all cores, for the tasks beside them are idle mostly."""
    if gpus > 0 or pool.cpus_per_actor != "auto":
        return max(1, int(cpus))
    return max(1, min(_MOST_THREADS, int(max(nodes)), int(sum(nodes)) // max(1, actors)))


def _max_images(gpus: float, preset: str) -> int:
    return _GPU_MAX_IMAGES if gpus > 0 else _CPU_MAX_IMAGES.get(preset, _CPU_MAX_IMAGES_RESNET)
