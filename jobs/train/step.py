"""One step of training: batches in, changed weights and the loss terms out.

The loss of a step is that of its whole batch, however many workers share it: the terms' sums are divided by
the counts of all workers, so that W workers compute the gradients of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.train.batches import TrainingBatch
from jobs.train.optimizer import AveragedWeights
from jobs.train.recipe import Recipe
from jobs.train.workers import Workers
from maskrcnn_core.losses import LossSums
from maskrcnn_core.model import MaskRCNN


@dataclass(frozen=True)
class StepFigures:
    """What is known of a step, over all workers: scalars on the device, not waited for.

    terms: of the loss, by name; norm: of the gradients before clipping; waited_s: seconds that a worker
    waited for its images, the mean of all; num_unreadable: images that could not be read.
    """

    terms: Mapping[str, Tensor]
    norm: Tensor
    waited_s: Tensor
    num_unreadable: Tensor

    @property
    def loss(self) -> Tensor:
        return torch.stack([*self.terms.values()]).sum()


@dataclass(frozen=True)
class _PassFigures:
    """As in StepFigures, of one pass."""

    terms: Mapping[str, Tensor]
    waited_s: Tensor
    num_unreadable: Tensor


class Stepper:
    """Takes steps on a model, in place.

    Args:
        model: on the workers' device, in training mode.
        average: follows the model; None where the recipe has no average.
    """

    def __init__(
        self,
        model: MaskRCNN,
        average: AveragedWeights | None,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        workers: Workers,
        seed: int,
    ) -> None:
        self._model = model
        self._average = average
        self._optimizer = optimizer
        self._recipe = recipe
        self._workers = workers
        self._seed = seed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._losses: nn.Module = _Losses(model)
        if workers.size > 1:
            self._losses = DistributedDataParallel(self._losses, gradient_as_bucket_view=True)
            # The argument of this name is deprecated from torch 2.13 on, and what replaces it is not in 2.11.
            self._losses.broadcast_buffers = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    def step(self, passes: Sequence[TrainingBatch], step: int, waited_s: float = 0.0) -> StepFigures:
        """One step, over this worker's share of the batch.

        Args:
            passes: as many as the recipe's `accumulate`; at least one image in each.
            step: counted from 0.
            waited_s: seconds that this worker waited for the passes.
        """
        rate = self._recipe.rate_at(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        terms: dict[str, Tensor] = {}
        waited = num_unreadable = torch.zeros((), device=self._workers.device)
        for number, batch in enumerate(passes, start=1):
            share_s = waited_s / len(passes) / self._workers.size
            everywhere = self._backward(batch, share_s, is_last=number == len(passes))
            waited = waited + everywhere.waited_s
            num_unreadable = num_unreadable + everywhere.num_unreadable
            for name, term in everywhere.terms.items():
                terms[name] = terms.get(name, 0) + term / len(passes)
        limit = self._recipe.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self._model, step + 1)
        return StepFigures(terms, norm, waited, num_unreadable)

    def _backward(self, batch: TrainingBatch, share_s: float, is_last: bool) -> _PassFigures:
        """Add the gradients of a pass. share_s: adds up to waited_s over all workers."""
        device = self._workers.device
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        targets = [target.to(device) for target in batch.targets]
        generators = [self._generator(int(position)) for position in batch.positions]
        if isinstance(self._losses, DistributedDataParallel):
            self._losses.require_backward_grad_sync = is_last
        with torch.autocast(device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            found: LossSums = self._losses(images, batch.image_sizes, targets, generators)
        everywhere = self._workers.sum(
            {f"sum {name}": value for name, value in found.sums.items()}
            | {f"count {name}": value for name, value in found.counts.items()}
            # full: a tensor made of a number would wait for a GPU
            | {
                "waited": torch.full((), share_s, device=device),
                "unreadable": torch.full((), len(batch.unreadable), device=device),
            }
        )
        counts = {name: everywhere[f"count {name}"].clamp(min=1) for name in found.counts}
        # DistributedDataParallel divides by the number of workers.
        share = self._workers.size / self._recipe.accumulate
        loss = torch.stack([found.sums[name] / counts[name] for name in counts]).sum() * share
        loss.backward()
        terms = {name: everywhere[f"sum {name}"] / counts[name] for name in counts}
        return _PassFigures(terms, everywhere["waited"], everywhere["unreadable"])

    def _generator(self, position: int) -> torch.Generator:
        """For the samples of one image of one step."""
        digest = hashlib.blake2b(f"samples {self._seed} {position}".encode(), digest_size=7).digest()
        return torch.Generator(self._workers.device).manual_seed(int.from_bytes(digest, "big"))


class _Losses(nn.Module):
    """`loss_sums` as forward, which is what DistributedDataParallel looks after."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object) -> LossSums:
        return self.model.loss_sums(*args)  # type: ignore[arg-type]  # as Stepper calls it
