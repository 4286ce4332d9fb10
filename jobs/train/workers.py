"""The workers of a training run, as one of them sees them: what torch.distributed is asked for.

Enters: this worker's tensors. Leaves: sums over all of them. With one worker nothing is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """rank: of this worker, 0 to size - 1; device: where its replica lives."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def joined(cls, device: torch.device) -> Workers:
        """Those of the process group that is up, or this process alone."""
        if not dist.is_initialized():
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars on the device, added up over the workers; detached."""
        packed = torch.stack([value.detach().float() for value in values.values()])
        if self.size > 1:
            dist.all_reduce(packed)
        return dict(zip(values, packed.unbind(), strict=True))

    def gather(self, names: Sequence[str]) -> list[str]:
        """The names that all workers have, in the order of their ranks; for the way to an error."""
        if self.size == 1:
            return list(names)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(names))
        return [name for part in found for name in part]

    def from_first(self, number: int) -> int:
        """The number that worker 0 has."""
        packed = torch.tensor(number, dtype=torch.int64, device=self.device)
        if self.size > 1:
            dist.broadcast(packed, 0)
        return int(packed)
