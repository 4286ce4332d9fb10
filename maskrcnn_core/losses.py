"""The multi-task loss of Mask R-CNN: L = L_cls + L_box + L_mask, and the two of the RPN.

Each term is a sum and what it is divided by, so that workers can add up both before they divide.
Letters: R sampled RoIs of the batch, F the positive ones of them, K classes, M mask side, A sampled anchors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossSums:
    """The terms of the loss before division.

    sums: scalars in the graph, under the names of the terms: loss_objectness, loss_rpn_box_reg,
    loss_classifier, loss_box_reg, loss_mask, or some of them; counts: under the same names, float32 scalars
    on the sums' device, of the samples that the term sums over: anchors, RoIs, or positive RoIs.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]

    def __or__(self, other: LossSums) -> LossSums:
        """The terms of both."""
        return LossSums(self.sums | other.sums, self.counts | other.counts)

    def mean(self, counts: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The terms: sums over counts; a count below 1 divides by 1.

        Args:
            counts: instead of this batch's own, such as those of all workers together.
        """
        counts = self.counts if counts is None else counts
        return {name: total / counts[name].clamp(min=1) for name, total in self.sums.items()}


def rpn_loss(
    logits: Tensor, labels: Tensor, deltas: Tensor, delta_targets: Tensor, smooth_l1_beta: float
) -> LossSums:
    """Objectness and anchor regression.

    Args:
        logits: (A,) of the sampled anchors; labels: (A,) float, 1 = object.
        deltas, delta_targets: (F, 4) of the positive ones among them.
        smooth_l1_beta: where the loss of a delta turns from quadratic to linear.

    Returns:
        loss_objectness and loss_rpn_box_reg, both counted by A (Faster R-CNN, equation 1, with
        N_reg = N_cls).
    """
    objectness = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    regression = F.smooth_l1_loss(deltas, delta_targets, beta=smooth_l1_beta, reduction="sum")
    num_anchors = _count(labels)
    return LossSums(
        {"loss_objectness": objectness, "loss_rpn_box_reg": regression},
        {"loss_objectness": num_anchors, "loss_rpn_box_reg": num_anchors},
    )


def box_head_loss(
    class_logits: Tensor,
    box_deltas: Tensor,
    class_indices: Tensor,
    delta_targets: Tensor,
    smooth_l1_beta: float,
) -> LossSums:
    """Softmax cross-entropy over K classes and smooth-L1 on the true class's deltas.

    Args:
        class_logits: (R, K); box_deltas: (R, 4K), or (R, 4) for one box of all classes.
        class_indices: (R,) int64, 0 = background.
        delta_targets: (R, 4); rows of background are not read.
        smooth_l1_beta: where the loss of a delta turns from quadratic to linear.

    Returns:
        loss_classifier and loss_box_reg; the second is counted by R, too, not by F, so that every RoI weighs
        the same (Fast R-CNN).
    """
    classification = F.cross_entropy(class_logits, class_indices, reduction="sum")
    positive = torch.where(class_indices > 0)[0]
    per_class = box_deltas.unflatten(1, (-1, 4))
    box_of_class = class_indices[positive] if per_class.shape[1] > 1 else torch.zeros_like(positive)
    regression = F.smooth_l1_loss(
        per_class[positive, box_of_class],
        delta_targets[positive],
        beta=smooth_l1_beta,
        reduction="sum",
    )
    num_rois = _count(class_indices)
    return LossSums(
        {"loss_classifier": classification, "loss_box_reg": regression},
        {"loss_classifier": num_rois, "loss_box_reg": num_rois},
    )


def mask_head_loss(mask_logits: Tensor, mask_targets: Tensor) -> LossSums:
    """Per-pixel binary cross-entropy on the true class's mask only, so classes do not compete.

    Args:
        mask_logits: (F, M, M), of each RoI's true class; mask_targets: (F, M, M) float in [0, 1].

    Returns:
        loss_mask: the mean over the pixels of each RoI, counted by F; 0, still attached to the graph, when
        F is 0.
    """
    of_pixels = F.binary_cross_entropy_with_logits(mask_logits, mask_targets, reduction="sum")
    num_pixels = mask_targets.shape[1] * mask_targets.shape[2]
    return LossSums({"loss_mask": of_pixels / num_pixels}, {"loss_mask": _count(mask_targets)})


def _count(samples: Tensor) -> Tensor:
    """How many there are, as a float32 scalar on their device."""
    return torch.tensor(float(samples.shape[0]), device=samples.device)
