"""The optimiser of a recipe, and the average of the weights that it makes.

Enters: a model and a recipe. Leaves: torch's optimiser; a second model that follows the first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from jobs.train.recipe import Recipe
from maskrcnn_core.model import MaskRCNN

_Named = tuple[str, nn.Parameter]


def make_optimizer(model: MaskRCNN, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the parameters that are trained.

    Norms and biases are not decayed: shrinking a scale or a shift regularises nothing (Goyal et al.,
    arXiv:1706.02677, section 5.3, for norms).
    """
    decayed, rest = ([p for _, p in named] for named in _trained(model))
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device.type
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.rate_at(0), fused=True)
    return torch.optim.SGD(groups, recipe.rate_at(0), recipe.momentum, fused=device in ("cpu", "cuda"))


def trained_names(model: MaskRCNN) -> list[str]:
    """Names of the trained parameters in the order in which an optimiser of ours numbers them."""
    decayed, rest = _trained(model)
    return [name for name, _ in (*decayed, *rest)]


class AveragedWeights:
    """An exponential moving average of a model's weights and buffers, kept as a model of its own.

    model: in eval mode; what is evaluated and written as checkpoint.
    """

    def __init__(self, model: MaskRCNN, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: MaskRCNN, step: int) -> None:
        """Take in the weights after step `step`, counted from 1.

        Until the average has seen enough steps it is the plain mean of those it has seen: the first
        weights, which are random, would stay in it for long.
        """
        decay = min(self._decay, (step - 1) / step)
        ours, theirs = (list(_floating(m)) for m in (self.model, model))
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, its in zip(self.model.buffers(), model.buffers(), strict=True):
            if not mine.is_floating_point():
                mine.copy_(its)


def _trained(model: nn.Module) -> tuple[list[_Named], list[_Named]]:
    """The trained parameters with their names: those that are decayed, and the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [(name, p) for name, p in named if p.ndim > 1], [(name, p) for name, p in named if p.ndim <= 1]


def _floating(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())
