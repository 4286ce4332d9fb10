"""Whether the nodes that work for a driver have its masklake: one image for all is what is wanted.

Enters: a joined cluster. Leaves: nothing, or a UsageError that names a node and both versions. Nodes that
join later are not looked at.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.errors import UsageError

_PACKAGE = "masklake"
# A process has to start on each. A node that says nothing so long has another trouble than its image.
_ANSWER_S = 20.0


def check_nodes() -> None:
    """Ask each node that takes tasks, all at once.

    Raises:
        UsageError: one has no masklake, or another version than this process.
    """

    # A function of a module would travel as its name, which is what a node without the package does not know.
    def installed() -> str | None:
        if find_spec("cluster") is None:
            return None
        try:
            return version(_PACKAGE)
        except PackageNotFoundError:  # a checkout on the path
            return "of no version"

    look: Any = ray.remote(num_cpus=0, max_retries=0)(installed)
    asked = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray's types stop here
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    found = []
    for answer in answered:
        try:
            found.append((str(asked[answer]["NodeManagerAddress"]), ray.get(answer)))
        except RayError:  # it went away meanwhile, or takes nothing more
            continue
    refuse_others(found, installed())


def refuse_others(found: Sequence[tuple[str, str | None]], ours: str | None) -> None:
    """Args: found: addresses of nodes, each with its version; None: it has no masklake.

    Raises:
        UsageError: one is not ours.
    """
    others = [(address, theirs) for address, theirs in found if theirs != ours]
    if others:
        address, theirs = others[0]
        more = f", and {len(others) - 1} more nodes are not alike" if others[1:] else ""
        raise UsageError(
            f"node {address} has {'no masklake' if theirs is None else f'masklake {theirs}'}, and here is "
            f"masklake {ours}{more}: start all nodes from one image (docs/cluster.md)"
        )
