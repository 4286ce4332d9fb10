"""Sizes the workers of a training run, each number with its reason.

Enters: what the cluster has, the spec's scaling section. Leaves: a TrainPlan without any "auto".
"""

import math
from dataclasses import dataclass

from cluster.session import ClusterInfo
from schemas.errors import UsageError
from schemas.train_spec import TrainSpec

# Decoding and augmenting a photograph takes some 10 ms of a core, a GPU takes 20 to 40 of them a second.
_MOST_CPUS_PER_GPU_WORKER = 12.0
# Without a GPU the step needs the cores; loading takes a few hundredths of its time.
_LOADER_THREADS_ON_CPU = 1


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


def train_plan(cluster: ClusterInfo, spec: TrainSpec) -> TrainPlan:
    """Replace every "auto" by a number that fits the cluster.

    Raises:
        UsageError: the workers would never start, or there are more of them than images in a pass.
    """
    low, high = spec.worker_range
    scaling = spec.scaling
    use_gpu = cluster.num_gpus >= low if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and cluster.num_gpus < low:
        raise UsageError(
            f"scaling.num_workers wants {low} GPUs and the cluster has {cluster.num_gpus:g}; lower it, or "
            "set scaling.use_gpu=false"
        )
    largest = cluster.most_node_cpus
    if scaling.cpus_per_worker != "auto":
        cpus = float(scaling.cpus_per_worker)
        if cpus * low > cluster.num_cpus:
            raise UsageError(
                f"{low} workers of {cpus:g} CPUs do not fit a cluster of {cluster.num_cpus:g}; lower "
                "scaling.num_workers or scaling.cpus_per_worker"
            )
    elif use_gpu:
        cpus = max(1.0, min(_MOST_CPUS_PER_GPU_WORKER, math.floor(cluster.num_cpus / max(low, high))))
    else:
        share = min(largest, cluster.num_cpus / high)
        cpus = float(math.floor(share)) if share >= 1 else share
    threads = max(1, math.floor(cpus))
    auto = threads if use_gpu else _LOADER_THREADS_ON_CPU
    loaders = auto if scaling.loader_threads == "auto" else int(scaling.loader_threads)
    return TrainPlan(low, high, use_gpu, cpus, threads, loaders)
