"""Sizes the pool of label actors and the tasks around it, each number with its reason.

Enters: what the cluster has, the spec's pool section. Leaves: a PoolPlan without any "auto".
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.growing import NoRoomError
from schemas.errors import UsageError
from schemas.specs import PoolSpec

# A unit of 64 MB takes 0.1 to 0.3 s of a core to read from a tar, 0.2 to 1.5 s as 512 files (disk, S3 over
# HTTP), and its rows 0.01 s to write (benchmarks/stage_cpus.py). An actor has a unit for some 10 s, so what
# feeds one takes 0.01 to 0.15 of a core, and a read task that is booked at 0.4 feeds two at the least. Less
# would let more of them run at once, each with a unit in memory. Odd figures, because Ray Data fuses a task
# with an actor that asks for the same, and then the actor does the reading.
READ_CPUS = 0.4
WRITE_CPUS = 0.2

# Where actors hold all CPUs nobody reads, and the job stands still: a node that has actors keeps this free of
# them. Of each node and not of one, for an actor whose node is lost is started again on another.
_KEPT_CPUS = READ_CPUS + WRITE_CPUS
_ROUNDING = 1e-6  # of sums of hundredths

# One unit in work and one waiting. On calls of 150 ms that keeps an actor busy for 0.90 of its time (1: 0.72,
# 4: 0.94); units take seconds, so the gap is smaller still, and each unit more is up to 64 MB and repeated
# work.
TASKS_IN_FLIGHT = 2

# Not measured, a choice: a node that has to be brought first, for minutes of its price, gets so many units of
# about 10 s, or is not worth it.
_UNITS_FOR_A_NODE = 4

# About 10 s of an actor's work: progress, commits and lost work stay fine-grained. On a GPU the 64 MB of a
# unit are the tighter bound, and 512 images what the design allows.
_GPU_MAX_IMAGES = 512
_CPU_MAX_IMAGES = {"lite": 32}
_CPU_MAX_IMAGES_RESNET = 4

# On a GPU the CPUs decode: 2.6 ms a photograph and core, so 8 cores feed 3000 photographs a second, more than
# one GPU takes. On CPUs the convolutions use them: two an actor halve the replicas in memory.
_MOST_CPUS_PER_GPU_ACTOR = 8.0
_CPUS_PER_CPU_ACTOR = 2.0
# Not measured, no machine here has more cores than two: taken as where convolutions of one image gain little.
_MOST_THREADS = 8


@dataclass(frozen=True)
class PoolPlan:
    """What the pipeline asks Ray for.

    Attributes:
        min_actors, max_actors: bounds of the pool, as far as there is work.
        room: actors that fit now, at least min_actors and at most max_actors.
        gpus_per_actor, cpus_per_actor, resources: what Ray books for an actor.
        torch_threads: what an actor's PyTorch and decoding may really use.
        tasks_in_flight: units sent to an actor before it returned the first.
        read_cpus, write_cpus: what Ray books for a task.
        max_images: in a unit.
    """

    min_actors: int
    max_actors: int
    room: int
    gpus_per_actor: float
    cpus_per_actor: float
    resources: Mapping[str, float]
    torch_threads: int
    tasks_in_flight: int
    read_cpus: float
    write_cpus: float
    max_images: int

    def num_actors(self, units: int) -> int:
        """The pool's size for so many units: who finds no room at once waits for a node that joins.

        Of one size from the beginning to its tail, not grown by Ray Data as it goes: that divides the CPUs
        by the number of stages, and gives a stage no more actors than its share of CPUs holds, however many
        GPUs stand idle; what waits is also what an autoscaler is told.
        """
        return max(self.min_actors, min(self.room, units), min(self.max_actors, units // _UNITS_FOR_A_NODE))


def actor_profile(
    nodes: Sequence[Mapping[str, float]],
    pool: PoolSpec,
    preset: str,
    max_images: int | Literal["auto"] = "auto",
) -> PoolPlan:
    """Replace every "auto" by a number that fits the cluster.

    Args:
        nodes: of each its CPU, GPU and custom resources; an actor cannot stand on two.
        pool: the spec's section.
        preset: the model's, such as "lite"; it decides how long an image takes.
        max_images: the spec's unit.max_images.

    Raises:
        NoRoomError: the actors that the spec wants find no room on these nodes.
    """
    gpus = _gpus_per_actor(sum(node.get("GPU", 0.0) for node in nodes), pool)
    special = ({"GPU": gpus} if gpus > 0 else {}) | pool.resources
    cpus = _cpus_per_actor(nodes, special, pool)
    most = math.inf if pool.max_actors is None else pool.max_actors
    room = int(min(most, _room(nodes, {"CPU": cpus, **special})))
    if room < pool.min_actors:
        amounts = {"CPU": cpus, "GPU": gpus, **pool.resources}
        raise NoRoomError(_no_room(nodes, amounts, room, pool.min_actors))
    return PoolPlan(
        min_actors=pool.min_actors,
        max_actors=pool.max_actors or room,
        room=room,
        gpus_per_actor=gpus,
        cpus_per_actor=cpus,
        resources=pool.resources,
        torch_threads=_threads(nodes, pool, cpus, gpus, room),
        tasks_in_flight=TASKS_IN_FLIGHT,
        read_cpus=READ_CPUS,
        write_cpus=WRITE_CPUS,
        max_images=_max_images(gpus, preset) if max_images == "auto" else max_images,
    )


def least_room(pool: PoolSpec) -> list[dict[str, float]]:
    """What has to be free for the pool's first actors, as bundles to ask an autoscaler for.

    An "auto" is one CPU here and no GPU; more is made of what comes. One CPU more is for reading.
    """
    cpus = 1.0 if pool.cpus_per_actor == "auto" else pool.cpus_per_actor
    gpus = 0.0 if pool.gpus_per_actor == "auto" else pool.gpus_per_actor
    actor = {"CPU": cpus, **({"GPU": gpus} if gpus > 0 else {}), **pool.resources}
    return [{"CPU": 1.0}, *([actor] * pool.min_actors)]


def _gpus_per_actor(gpus_available: float, pool: PoolSpec) -> float:
    gpus = (1.0 if gpus_available >= 1 else 0.0) if pool.gpus_per_actor == "auto" else pool.gpus_per_actor
    if gpus > 1 and gpus != int(gpus):
        raise UsageError(f"pool.gpus_per_actor is {gpus:g}, wanted a whole number, or less than 1")
    return gpus


def _cpus_per_actor(
    nodes: Sequence[Mapping[str, float]], special: Mapping[str, float], pool: PoolSpec
) -> float:
    """CPUs, in hundredths, that an actor books: as many as leave _KEPT_CPUS on each node that has actors."""
    kinds = {tuple(node.get(name, 0.0) for name in ("CPU", *special)): node for node in nodes}

    def fitting(hundredths: range) -> Iterator[tuple[float, int]]:
        """Amounts that leave every node its room, each with the actors that fit."""
        for cpus in (number / 100 for number in hundredths):
            amounts = {"CPU": cpus, **special}
            if cpus in (READ_CPUS, WRITE_CPUS) or not _leaves_room(kinds.values(), amounts):
                continue
            if room := _room(nodes, amounts):
                yield cpus, room

    if pool.cpus_per_actor != "auto":  # a little more, where so many would fill a node
        asked = round(pool.cpus_per_actor * 100)
        return next((cpus for cpus, _ in fitting(range(asked, asked + 100))), pool.cpus_per_actor)
    most = _MOST_CPUS_PER_GPU_ACTOR if "GPU" in special else _CPUS_PER_CPU_ACTOR
    places = sum(_places(node, special) for node in nodes)
    wanted = places if pool.max_actors is None else min(places, pool.max_actors)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    best, best_room = 0.0, 0
    for cpus, room in fitting(range(round(most * 100), 0, -1)):
        if room >= wanted:
            return cpus
        if room > best_room:
            best, best_room = cpus, room
    # No such amount leaves each node its room: more, so that those that cannot keep it get no actors. Where
    # no node has CPUs to spare, as much as the largest has.
    more = (cpus for cpus, _ in fitting(range(round(most * 100) + 1, round(largest * 100) + 1)))
    return best or next(more, min(most, largest) or most)


def _places(node: Mapping[str, float], special: Mapping[str, float]) -> int:
    """Actors that a node is to have: one for each GPU, or for each two of its CPUs."""
    cpus = node.get("CPU", 0.0)
    if "GPU" in special:
        return int(_slots(node, special)) if cpus > _KEPT_CPUS else 0
    if cpus <= 2 * _KEPT_CPUS:  # what one leaves another would take
        return 0
    return int(min(max(1.0, cpus // _CPUS_PER_CPU_ACTOR), _slots(node, special)))


def _leaves_room(nodes: Iterable[Mapping[str, float]], amounts: Mapping[str, float]) -> bool:
    """Whether a node that is as full of actors as Ray can make it still has _KEPT_CPUS."""
    for node in nodes:
        slots = _slots(node, amounts)
        if slots and node["CPU"] - slots * amounts["CPU"] < _KEPT_CPUS - _ROUNDING:
            return False
    return True


def _slots(node: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    """How many actors of these amounts fit on a node; infinite where they want nothing."""
    return min(
        (math.floor(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in amounts.items()),
        default=math.inf,
    )


def _room(nodes: Sequence[Mapping[str, float]], amounts: Mapping[str, float]) -> int:
    """Actors that fit on the nodes, with _KEPT_CPUS kept on the node where that costs the least."""
    full = sum(int(_slots(node, amounts)) for node in nodes)
    costs = [
        _slots(node, amounts) - _slots({**node, "CPU": node["CPU"] - _KEPT_CPUS}, amounts)
        for node in nodes
        if node.get("CPU", 0.0) >= _KEPT_CPUS
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
        f"the cluster has {total('CPU'):g} CPUs, of which {_KEPT_CPUS:g} is kept for reading and writing,"
        f"{listed(total)}: room for {room} actors of {amounts['CPU']:g} CPUs{listed(amounts.__getitem__)}, "
        f"the spec wants {wanted}; lower pool.min_actors, pool.cpus_per_actor or pool.gpus_per_actor{names}, "
        "or set pool.wait_for_nodes_s where the cluster grows"
    )


def _threads(
    nodes: Sequence[Mapping[str, float]], pool: PoolSpec, cpus: float, gpus: float, actors: int
) -> int:
    """Threads of an actor. On CPUs the actors share all cores, for the tasks beside them are idle mostly."""
    if pool.cpus_per_actor != "auto":
        return max(1, int(pool.cpus_per_actor))
    if gpus > 0:
        return math.ceil(cpus)
    cores = [int(node.get("CPU", 0.0)) for node in nodes if _slots(node, pool.resources) >= 1]
    return max(1, min(_MOST_THREADS, max(cores, default=1), sum(cores) // max(1, actors)))


def _max_images(gpus: float, preset: str) -> int:
    return _GPU_MAX_IMAGES if gpus > 0 else _CPU_MAX_IMAGES.get(preset, _CPU_MAX_IMAGES_RESNET)
