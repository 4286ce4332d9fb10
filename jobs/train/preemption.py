"""The warning that machines of a run are about to go: a spot notice, or any other drain of their nodes.

Enters: what Ray Train tells a training worker. Leaves: each warning once.
Ray Train asks its cluster every five seconds which nodes are drained, and tells every worker. Its public
question, ray.train.get_preemption_info, is a barrier over all workers at each step. Worker 0 alone decides
when a checkpoint is written, so it looks at what it was told, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_USUAL_NOTICE_S = 120.0


@dataclass(frozen=True)
class Preemption:
    """Nodes that go.

    Attributes:
        node_ids: Ray's, in hex; those only that workers of this run are on.
        deadline_s: Unix time of the first one's end; None: nobody said.
    """

    node_ids: frozenset[str]
    deadline_s: float | None

    def end_s(self, now_s: float) -> float:
        """Unix time of the first one's end; where nobody said, what clouds leave at most."""
        return now_s + _USUAL_NOTICE_S if self.deadline_s is None else self.deadline_s

    def told(self, now_s: float) -> str:
        """In a few words."""
        nodes = ", ".join(node[:12] for node in sorted(self.node_ids))
        goes = "node goes" if len(self.node_ids) == 1 else "nodes go"
        left = "soon" if self.deadline_s is None else f"in {max(0.0, self.deadline_s - now_s):.0f} s"
        return f"{goes} {left}: {nodes}"


Ask = Callable[[], Preemption | None]
"""What is known by now; None: all stay."""


class PreemptionWarnings:
    """Of one worker. A node that is warned of again is no news."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._heard: frozenset[str] = frozenset()

    def news(self) -> Preemption | None:
        """Nodes that were not told of before; None: there are none."""
        found = self._ask()
        if found is None or found.node_ids <= self._heard:
            return None
        new = Preemption(found.node_ids - self._heard, found.deadline_s)
        self._heard |= found.node_ids
        return new


def ask_nobody() -> Preemption | None:
    """Where no Ray is."""
    return None


def ask_ray_train() -> Preemption | None:
    """What this worker of Ray Train was told; does not wait.

    Source: ray 2.60, train/v2/_internal/execution/preemption.py, PreemptionContext.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    deadline_s = None if info.deadline_ms is None else info.deadline_ms / 1000
    return Preemption(frozenset(info.preempted_node_ids), deadline_s)
