"""Waits for nodes that an autoscaler has yet to bring.

Enters: bundles that have to fit at once. Leaves: what the cluster has then.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from cluster.session import ClusterInfo, cluster_info

_AT_ONCE_S = 2.0
_LOOK_S = 5.0


def wait_for_nodes(
    bundles: Sequence[dict[str, float]], wait_s: float, note: Callable[[str], None]
) -> ClusterInfo | None:
    """Ask for room, of a process that is connected, and wait until it is there.

    A placement group asks, so that other users' wishes stand: ray.autoscaler.sdk would overwrite them. It is
    gone when this returns, and an autoscaler lets what it brought stand idle for a minute at least.

    Args:
        bundles: of resources, each on one node; the group's parts.
        note: is told once that there is a wait.

    Returns:
        the cluster with its new nodes; None: they did not come within `wait_s`.
    """
    group: Any = placement_group(list(bundles))
    try:
        deadline = time.monotonic() + wait_s
        if not group.wait(_AT_ONCE_S):
            note(f"waiting up to {wait_s:.0f} s for nodes with room for {_listed(bundles)}.")
        while not group.wait(_LOOK_S):
            if time.monotonic() > deadline:
                return None
        return cluster_info()
    finally:
        remove_placement_group(group)


def _listed(bundles: Sequence[dict[str, float]]) -> str:
    named = Counter(" + ".join(f"{amount:g} {name}" for name, amount in each.items()) for each in bundles)
    return ", ".join(f"{number} × ({resources})" for resources, number in named.items())
