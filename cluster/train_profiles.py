"""Sizes the workers of a training run, each number with its reason.

Enters: what the cluster has, the spec's scaling section. Leaves: a TrainPlan without any "auto".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.growing import NoRoomError
from schemas.train_spec import TrainSpec

# Of a core, decoding a photograph takes 2.0 ms and resizing it 2.8 (benchmarks: decoders, preprocessing).
# Should masks and augmenting make 10 of it, which was not measured, four cores feed 400 a second: ten times
# what a GPU is taken to need (20 to 40 a second; not measured, there was none), and one of them drives it.
_MOST_CPUS_PER_GPU_WORKER = 4
# Without a GPU the step needs the cores; loading takes a few hundredths of its time.
_LOADER_THREADS_ON_CPU = 1
_ROUNDING = 1e-6  # of quotients


@dataclass(frozen=True)
class TrainPlan:
    """What Ray Train is asked for.

    Attributes:
        min_workers, max_workers: equal where the number is fixed.
        use_gpu: one GPU a worker.
        cpus_per_worker: what Ray books; may be a fraction where workers share cores.
        torch_threads, loader_threads: of a worker.
    """

    min_workers: int
    max_workers: int
    use_gpu: bool
    cpus_per_worker: float
    torch_threads: int
    loader_threads: int


def train_plan(nodes: Sequence[Mapping[str, float]], spec: TrainSpec) -> TrainPlan:
    """Replace every "auto" by a number that fits the cluster.

    Args:
        nodes: of each its CPUs and GPUs; a worker cannot stand on two.

    Raises:
        NoRoomError: fewer workers than the spec wants would ever start.
    """
    low, high = spec.worker_range
    scaling = spec.scaling
    gpus = sum(math.floor(node.get("GPU", 0.0)) for node in nodes)
    use_gpu = gpus >= low if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and gpus < low:
        raise NoRoomError(
            f"scaling.num_workers wants {low} GPUs and the cluster has {gpus}; lower it, set "
            "scaling.use_gpu=false, or scaling.wait_for_nodes_s where the cluster grows"
        )
    cpus = _cpus_per_worker(nodes, spec, high, use_gpu)
    if (room := _room(nodes, cpus, use_gpu)) < low:
        largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        raise NoRoomError(
            f"scaling.num_workers wants {low} workers of {cpus:g} CPUs{' and a GPU' if use_gpu else ''}, and "
            f"the nodes, the largest of {largest:g} CPUs, have room for {room}; lower it or "
            "scaling.cpus_per_worker, or set scaling.wait_for_nodes_s where the cluster grows"
        )
    threads = max(1, math.floor(cpus))
    auto = threads if use_gpu else _LOADER_THREADS_ON_CPU
    loaders = auto if scaling.loader_threads == "auto" else int(scaling.loader_threads)
    return TrainPlan(low, high, use_gpu, cpus, threads, loaders)


def least_train_room(spec: TrainSpec) -> list[dict[str, float]]:
    """What has to be free for the first workers, as bundles to ask an autoscaler for.

    An "auto" is one CPU here and no GPU.
    """
    low, _ = spec.worker_range
    cpus = spec.scaling.cpus_per_worker
    worker = {"CPU": 1.0 if cpus == "auto" else float(cpus)}
    return [worker | ({"GPU": 1.0} if spec.scaling.use_gpu is True else {})] * low


def _cpus_per_worker(
    nodes: Sequence[Mapping[str, float]], spec: TrainSpec, most_workers: int, use_gpu: bool
) -> float:
    """The most, whole where it can be, that leaves room for all the workers there may be."""
    if spec.scaling.cpus_per_worker != "auto":
        return float(spec.scaling.cpus_per_worker)
    largest = math.floor(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    if use_gpu:
        largest = min(_MOST_CPUS_PER_GPU_WORKER, largest)
        most_workers = min(most_workers, _room(nodes, 0.01, use_gpu))
    tried = (*range(largest, 0, -1), *(number / 100 for number in range(99, 0, -1)))
    return float(next((cpus for cpus in tried if _room(nodes, cpus, use_gpu) >= most_workers), 0.01))


def _room(nodes: Sequence[Mapping[str, float]], cpus: float, use_gpu: bool) -> int:
    """Workers that the nodes hold."""
    slots = 0
    for node in nodes:
        on_cpus = math.floor(node.get("CPU", 0.0) / cpus + _ROUNDING)
        slots += min(on_cpus, math.floor(node.get("GPU", 0.0))) if use_gpu else on_cpus
    return slots
