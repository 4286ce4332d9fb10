"""The model that a run would leave if it ended now: what is evaluated, and what is written.

Enters: weights in the midst of training. Leaves: a copy of them in the numbers in which they are stored, with
batch norm's statistics measured on these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from jobs.train.batches import TrainingBatch
from jobs.train.workers import Workers
from maskrcnn_core.checkpoint import as_stored
from maskrcnn_core.model import MaskRCNN


@torch.no_grad()
def stored_copy(model: MaskRCNN, dtype: torch.dtype) -> MaskRCNN:
    """A copy in eval mode whose parameters have the values that a file of `dtype` gives back."""
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.copy_(as_stored(parameter, dtype))
    return copied


@torch.no_grad()
def recalibrate_batch_norm(
    model: MaskRCNN, batches: Iterator[TrainingBatch], num_batches: int, workers: Workers
) -> None:
    """Measure the backbone's batch-norm statistics anew, as the mean over some batches; leaves eval mode on.

    An average of weights has other activations than any model it averages, and the averaged statistics lag
    behind them. A model without batch norm is left as it is, and so are stages that are frozen.

    Every worker calls it, with the same weights, and has the same statistics afterwards: those that one
    worker alone would measure, because each takes whole batches. Synchronised norms are no others here.

    Args:
        batches: this worker's: of all `num_batches` number rank, rank + size, ...

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", section 3.2, arXiv:1803.05407.
    """
    backbone = model.backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm) and module.training]
    own = range(workers.rank, num_batches, workers.size)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    if norms:
        with _by_themselves(norms):
            for _ in own:
                backbone(next(batches).images.to(workers.device))
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic *= len(own) / num_batches
            if workers.size > 1:
                dist.all_reduce(statistic)
    model.eval()


@contextmanager
def _by_themselves(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """A synchronised norm would wait for all workers at each batch, and not all of them have as many."""
    for norm in norms:
        norm.forward = partial(_BatchNorm.forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
