"""The multi-task loss of Mask R-CNN: L = L_cls + L_box + L_mask, and the two of the RPN.

Letters: R sampled RoIs of the batch, F the positive ones of them, K classes, M mask side, A sampled anchors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rpn_loss(
    logits: Tensor, labels: Tensor, deltas: Tensor, delta_targets: Tensor, smooth_l1_beta: float
) -> tuple[Tensor, Tensor]:
    """Objectness and anchor regression.

    Args:
        logits: (A,) of the sampled anchors; labels: (A,) float, 1 = object.
        deltas, delta_targets: (F, 4) of the positive ones among them.
        smooth_l1_beta: where the loss of a delta turns from quadratic to linear.

    Returns:
        two scalars, both divided by A (Faster R-CNN, equation 1, with N_reg = N_cls).
    """
    objectness = F.binary_cross_entropy_with_logits(logits, labels)
    regression = F.smooth_l1_loss(deltas, delta_targets, beta=smooth_l1_beta, reduction="sum")
    return objectness, regression / max(1, labels.numel())


def box_head_loss(
    class_logits: Tensor,
    box_deltas: Tensor,
    class_indices: Tensor,
    delta_targets: Tensor,
    smooth_l1_beta: float,
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy over K classes and smooth-L1 on the true class's deltas.

    Args:
        class_logits: (R, K); box_deltas: (R, 4K), or (R, 4) for one box of all classes.
        class_indices: (R,) int64, 0 = background.
        delta_targets: (R, 4); rows of background are not read.
        smooth_l1_beta: where the loss of a delta turns from quadratic to linear.

    Returns:
        two scalars; the second is divided by R, not F, so that every RoI weighs the same (Fast R-CNN).
    """
    classification = F.cross_entropy(class_logits, class_indices)
    positive = torch.where(class_indices > 0)[0]
    per_class = box_deltas.unflatten(1, (-1, 4))
    box_of_class = class_indices[positive] if per_class.shape[1] > 1 else torch.zeros_like(positive)
    regression = F.smooth_l1_loss(
        per_class[positive, box_of_class],
        delta_targets[positive],
        beta=smooth_l1_beta,
        reduction="sum",
    )
    return classification, regression / max(1, class_indices.numel())


def mask_head_loss(mask_logits: Tensor, class_indices: Tensor, mask_targets: Tensor) -> Tensor:
    """Per-pixel binary cross-entropy on the true class's mask only, so classes do not compete.

    Args:
        mask_logits: (F, K, M, M), or (F, 1, M, M) for one mask of all classes.
        class_indices: (F,) > 0; mask_targets: (F, M, M) float in [0, 1].

    Returns:
        scalar; 0, still attached to the graph, when F is 0.
    """
    if mask_targets.numel() == 0:
        return mask_logits.sum() * 0
    rows = torch.arange(class_indices.shape[0], device=class_indices.device)
    mask_of_class = class_indices if mask_logits.shape[1] > 1 else torch.zeros_like(class_indices)
    return F.binary_cross_entropy_with_logits(mask_logits[rows, mask_of_class], mask_targets)
