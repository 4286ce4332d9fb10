"""Waits for nodes that an autoscaler has yet to bring.

Enters: what has to fit at once. Leaves: a plan for the nodes that are there then.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray.util.placement_group import placement_group, remove_placement_group

from cluster.session import ClusterInfo, cluster_info
from schemas.errors import UsageError

Plan = TypeVar("Plan")

_AT_ONCE_S = 2.0
_LOOK_S = 5.0


class NoRoomError(UsageError):
    """The nodes that there are have no room for what has to start."""


def planned_with_room(
    make_plan: Callable[[Sequence[Mapping[str, float]]], Plan],
    cluster: ClusterInfo,
    bundles: Sequence[dict[str, float]],
    wait_s: float | None,
    note: Callable[[str], None],
) -> Plan:
    """A plan for the cluster's nodes, for those that it has after a wait if there is no room yet.

    A placement group asks for nodes, so that other users' wishes stand: ray.autoscaler.sdk would overwrite
    them. It is gone when this returns; an autoscaler lets what it brought stand idle for a minute at least.

    Args:
        make_plan: of nodes' resources; raises NoRoomError.
        bundles: of resources, each on one node; what is asked for and waited for.
        wait_s: seconds; None: no wait.
        note: is told once that there is a wait.

    Raises:
        NoRoomError: there is no room, or there was none within the time.
    """
    try:
        return make_plan(cluster.nodes)
    except NoRoomError as error:
        if wait_s is None:
            raise
        if not _have_come(bundles, wait_s, note):
            raise NoRoomError(f"no nodes came within {wait_s:.0f} s: {error}") from None
    return make_plan(cluster_info().nodes)


def _have_come(bundles: Sequence[dict[str, float]], wait_s: float, note: Callable[[str], None]) -> bool:
    group: Any = placement_group(list(bundles))
    try:
        deadline = time.monotonic() + wait_s
        if not group.wait(_AT_ONCE_S):
            note(f"waiting up to {wait_s:.0f} s for nodes with room for {_listed(bundles)}.")
        while not group.wait(_LOOK_S):
            if time.monotonic() > deadline:
                return False
        return True
    finally:
        remove_placement_group(group)


def _listed(bundles: Sequence[dict[str, float]]) -> str:
    named = Counter(" + ".join(f"{amount:g} {name}" for name, amount in each.items()) for each in bundles)
    return ", ".join(f"{number} × ({resources})" for resources, number in named.items())
