"""Non-maximum suppression on CPUs; `maskrcnn_core.ops.nms` says what it computes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.machine_code import compiled
from maskrcnn_core.ops.cpu import for_each_range


def suppress(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    keep = torch.zeros_like(valid)
    box_array, label_array, valid_array = (x.contiguous().numpy() for x in (boxes, labels, valid))
    threshold, kept = np.float32(iou_threshold), keep.numpy()

    def suppress_range(start: int, stop: int) -> None:
        _suppress(box_array, label_array, valid_array, threshold, max_keep, kept, start, stop)

    for_each_range(suppress_range, len(boxes), 1)
    return keep


@compiled
def _suppress(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int32],
    valid: NDArray[np.bool_],
    threshold: np.float32,
    max_keep: int,
    keep: NDArray[np.bool_],
    first_group: int,
    last_group: int,
) -> None:
    num_candidates = boxes.shape[1]
    for group in range(first_group, last_group):
        x0, y0 = boxes[group, :, 0].copy(), boxes[group, :, 1].copy()
        x1, y1 = boxes[group, :, 2].copy(), boxes[group, :, 3].copy()
        area = (x1 - x0) * (y1 - y0)
        label = labels[group]
        alive = valid[group].copy()
        kept = 0
        for i in range(num_candidates):
            if not alive[i]:
                continue
            if kept == max_keep:
                break
            keep[group, i] = True
            kept += 1
            for j in range(i + 1, num_candidates):
                width = max(min(x1[i], x1[j]) - max(x0[i], x0[j]), np.float32(0))
                height = max(min(y1[i], y1[j]) - max(y0[i], y0[j]), np.float32(0))
                overlap = width * height
                iou = overlap / (area[i] + area[j] - overlap)
                alive[j] &= not ((iou > threshold) & (label[i] == label[j]))
