"""Actors that keep something for a whole run: in a process of their own, on the driver's node.

Enters: a class. Leaves: Ray's handle of its actor. A node that is lost takes no run's books with it, unless
it is the driver's, and then the run is gone as well.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_beside_driver(kept: type) -> Any:
    """Start an actor of this class, without arguments. It books no CPU; killed, it comes back empty."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(kept)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        .remote()
    )
