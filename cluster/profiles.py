"""Sizes the pool of label actors and the tasks around it, each number with its reason.

Enters: what the cluster has, the spec's pool section. Leaves: a PoolPlan without any "auto".
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
        min_actors, max_actors: bounds of the pool; Ray Data scales between them. None: as many as find room,
            for where actors want GPUs those are what they run out of, and nodes that join bring more.
        room: actors that fit now, at most max_actors; 0 where the cluster has yet to grow.
        gpus_per_actor, cpus_per_actor, resources: what Ray books for an actor.
        torch_threads: what an actor's PyTorch and decoding may really use.
        tasks_in_flight: units sent to an actor before it returned the first.
        read_cpus, write_cpus: what Ray books for a task.
        max_images: in a unit.
    """

    min_actors: int
    max_actors: int | None
    room: int
    gpus_per_actor: float
    cpus_per_actor: float
    resources: Mapping[str, float]
    torch_threads: int
    tasks_in_flight: int
    read_cpus: float
    write_cpus: float
    max_images: int

    @property
    def actors(self) -> int:
        """That the pool begins with, instead of growing one by one."""
        return max(self.min_actors, self.room)


def actor_profile(
    nodes: Sequence[Mapping[str, float]],
    pool: PoolSpec,
    preset: str,
    max_images: int | Literal["auto"] = "auto",
) -> PoolPlan:
    """Replace every "auto" and null by a number that fits the cluster.

    Args:
        nodes: of each its CPU, GPU and custom resources; an actor cannot stand on two.
        pool: the spec's section.
        preset: the model's, such as "lite"; it decides how long an image takes.
        max_images: the spec's unit.max_images.

    Raises:
        UsageError: the actors that the spec wants would never start. Where max_actors is given the spec is
            taken at its word: the cluster may grow.
    """
    gpus = _gpus_per_actor(sum(node.get("GPU", 0.0) for node in nodes), pool)
    special = ({"GPU": gpus} if gpus > 0 else {}) | pool.resources
    wanted = pool.max_actors
    cpus = _cpus_per_actor(nodes, special, pool)
    room = _room(nodes, {"CPU": cpus, **special})
    if wanted is None and room < pool.min_actors:
        raise UsageError(_no_room(nodes, {"CPU": cpus, "GPU": gpus, **pool.resources}, room, pool.min_actors))
    # Actors that want CPUs alone could take the one that stays free, once a pool may outgrow its room.
    max_actors = room if wanted is None and gpus == 0 else wanted
    room = room if max_actors is None else min(room, max_actors)
    return PoolPlan(
        min_actors=pool.min_actors,
        max_actors=max_actors,
        room=room,
        gpus_per_actor=gpus,
        cpus_per_actor=cpus,
        resources=pool.resources,
        torch_threads=_threads(nodes, pool, cpus, gpus, max_actors or max(pool.min_actors, room)),
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


def _cpus_per_actor(
    nodes: Sequence[Mapping[str, float]], special: Mapping[str, float], pool: PoolSpec
) -> float:
    """What the actors can have on the nodes that have the special resources, without being fewer for it."""
    if pool.cpus_per_actor != "auto":
        return pool.cpus_per_actor
    places = [(node.get("CPU", 0.0), slots) for node in nodes if (slots := _slots(node, special)) >= 1]
    if not places:  # the cluster may grow
        places = [(node.get("CPU", 0.0), 1) for node in nodes] or [(0.0, 1)]
    spare = sum(node.get("CPU", 0.0) for node in nodes) - _FREE_CPUS
    largest = max(cpus for cpus, _ in places) or 1.0
    if "GPU" not in special:
        return min(_CPUS_PER_CPU_ACTOR, largest, _whole(spare))
    num_actors = pool.max_actors or max(1, sum(int(slots) for _, slots in places))
    poorest = min(cpus / slots for cpus, slots in places)
    if pool.max_actors is not None:  # they may leave places empty
        poorest = max(poorest, min(largest, spare / num_actors))
    return min(_MOST_CPUS_PER_GPU_ACTOR, largest, _whole(min(poorest, spare / num_actors)))


def _whole(cpus: float) -> float:
    """Whole CPUs where there is one, else hundredths; never nothing."""
    return math.floor(cpus * 100) / 100 if 0.01 <= cpus < 1 else max(1.0, math.floor(cpus))


def _slots(node: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    """How many actors of these amounts fit on a node; infinite where they want nothing."""
    return min(
        (math.floor(node.get(name, 0.0) / amount) for name, amount in amounts.items()), default=math.inf
    )


def _room(nodes: Sequence[Mapping[str, float]], amounts: Mapping[str, float]) -> int:
    """Actors that fit on the nodes, with _FREE_CPUS kept on the node where that costs the least."""
    full = sum(int(_slots(node, amounts)) for node in nodes)
    costs = [
        _slots(node, amounts) - _slots({**node, "CPU": node["CPU"] - _FREE_CPUS}, amounts)
        for node in nodes
        if node.get("CPU", 0.0) >= _FREE_CPUS
    ]
    return full - int(min(costs, default=full))


def _no_room(
    nodes: Sequence[Mapping[str, float]], amounts: Mapping[str, float], room: int, wanted: int
) -> str:
    def total(name: str) -> float:
        return sum(node.get(name, 0.0) for node in nodes)

    def listed(amount_of: Callable[[str], float]) -> str:
        custom = (name for name in amounts if name not in ("CPU", "GPU"))
        return "".join(
            [f" and {amount_of('GPU'):g} GPUs", *(f", {amount_of(name):g} {name}" for name in custom)]
        )

    names = "".join(f", pool.resources.{name}" for name in amounts if name not in ("CPU", "GPU"))
    return (
        f"the cluster has {total('CPU'):g} CPUs, of which {_FREE_CPUS:g} is kept for reading and writing,"
        f"{listed(total)}: room for {room} actors of {amounts['CPU']:g} CPUs{listed(amounts.__getitem__)}, "
        f"the spec wants {wanted}; lower pool.min_actors, pool.cpus_per_actor or pool.gpus_per_actor{names}, "
        "or set pool.max_actors where the cluster grows"
    )


def _threads(
    nodes: Sequence[Mapping[str, float]], pool: PoolSpec, cpus: float, gpus: float, actors: int
) -> int:
    """Threads of an actor. On CPUs the actors share all cores, for the tasks beside them are idle mostly."""
    if gpus > 0 or pool.cpus_per_actor != "auto":
        return max(1, int(cpus))
    cores = [int(node.get("CPU", 0.0)) for node in nodes if _slots(node, pool.resources) >= 1]
    return max(1, min(_MOST_THREADS, max(cores, default=1), sum(cores) // max(1, actors)))


def _max_images(gpus: float, preset: str) -> int:
    return _GPU_MAX_IMAGES if gpus > 0 else _CPU_MAX_IMAGES.get(preset, _CPU_MAX_IMAGES_RESNET)
