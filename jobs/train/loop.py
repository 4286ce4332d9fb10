"""The training loop: batches in, a trained model out. One process.

Letters: B images of a batch, all of one padded size H×W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from maskrcnn_core.model import MaskRCNN
from maskrcnn_core.roi_heads import Instances


@dataclass(frozen=True)
class TrainingBatch:
    """images: (B, 3, H, W) float32, normalised; image_sizes: B (height, width); targets: B."""

    images: Tensor
    image_sizes: list[tuple[int, int]]
    targets: list[Instances]


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and a cosine to zero, gradient clipping, and an average of the weights."""

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    clip_norm: float = 10.0
    ema_decay: float = 0.998
    bf16: bool = True  # autocast; the heads' losses stay float32

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"Recipe: steps {self.steps}, warmup_steps {self.warmup_steps}; wanted 0 <= warmup < steps."
            )

    def rate_at(self, step: int) -> float:
        """Learning rate of the step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: MaskRCNN,
    batches: Iterator[TrainingBatch],
    recipe: Recipe,
    on_step: Callable[[int, dict[str, float]], None],
    last_step: int | None = None,
) -> MaskRCNN:
    """Train `model` in place.

    Args:
        batches: at least `recipe.steps` of them.
        on_step: called after each step with its number from 1 and the loss terms.
        last_step: stop here, before the schedule's end.

    Returns:
        the averaged model, in eval mode. Its batch-norm statistics want `recalibrate_batch_norm`.

    Raises:
        FloatingPointError: the loss is not finite; the model is then of no use.
    """
    device_type = next(model.parameters()).device.type
    model.train().to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
    for step in range(last_step or recipe.steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        with torch.autocast(device_type, torch.bfloat16, enabled=recipe.bf16):
            losses = model.losses(
                batch.images.contiguous(memory_format=torch.channels_last), batch.image_sizes, batch.targets
            )
            total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {float(total.detach())} at step {step + 1}; lower the learning rate."
            )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        averaged.update_parameters(model)
        on_step(step + 1, {name: float(term.detach()) for name, term in losses.items()})
    result = averaged.module
    assert isinstance(result, MaskRCNN)
    return result.eval()


@torch.no_grad()
def recalibrate_batch_norm(model: MaskRCNN, batches: Iterator[TrainingBatch], num_batches: int) -> None:
    """Measure the backbone's batch-norm statistics anew, as the mean over some batches; leaves eval mode on.

    An average of weights has other activations than any model it averages, and the averaged statistics lag
    behind them. A model without batch norm is left as it is.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", section 3.2, arXiv:1803.05407.
    """
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    if norms:
        for _ in range(num_batches):
            model.backbone(next(batches).images)
    model.eval()
