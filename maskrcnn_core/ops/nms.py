"""Non-maximum suppression of many groups at once, with an output of fixed size.

Letters: G groups (images, or levels of images), N candidates of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("masklake::nms", mutates_args=(), device_types="cpu")
def nms(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """Greedy suppression: a candidate goes when a kept one before it, of its label, overlaps it too much.

    Args:
        boxes: (G, N, 4) float32 x0 y0 x1 y1, best first within a group.
        labels: (G, N) int32; candidates of different labels leave each other alone.
        valid: (G, N) bool; a candidate that is not is neither kept nor suppresses.
        iou_threshold: suppressed is what overlaps by more than this.
        max_keep: candidates after the max_keep-th kept one of a group are not kept.

    Returns:
        (G, N) bool, what is kept.

    Source: Faster R-CNN, section 3.1; torchvision's `nms` in one image, whose IoU this computes.
    """
    from maskrcnn_core.ops.cpu.nms import suppress  # here: a machine with a GPU can do without Numba

    return suppress(boxes, labels, valid, iou_threshold, max_keep)


@nms.register_kernel("cuda")
def _(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    from maskrcnn_core.ops.cuda.nms import suppress  # here: Triton comes with torch on Linux only

    return suppress(boxes, labels, valid, iou_threshold, max_keep)


@nms.register_fake
def _(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    return torch.empty_like(valid)
