"""Batch-norm statistics of averaged weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from jobs.train.batches import TrainingBatch
from maskrcnn_core.model import MaskRCNN


@torch.no_grad()
def recalibrate_batch_norm(model: MaskRCNN, batches: Iterator[TrainingBatch], num_batches: int) -> None:
    """Measure the backbone's batch-norm statistics anew, as the mean over some batches; leaves eval mode on.

    An average of weights has other activations than any model it averages, and the averaged statistics lag
    behind them. A model without batch norm is left as it is.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", section 3.2, arXiv:1803.05407.
    """
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    device = next(model.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    if norms:
        for _ in range(num_batches):
            model.backbone(next(batches).images.to(device))
    model.eval()
