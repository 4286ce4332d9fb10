"""Box arithmetic: deltas, clipping, matching and balanced sampling.

Boxes are (x0, y0, x1, y1), absolute pixels, x1 - x0 = width. Letters: N boxes, G ground-truth boxes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

# A predicted log-size is cut here before exp(): an anchor grows at most to 1000/16 times its size
# (Detectron, lib/core/config.py, BBOX_XFORM_CLIP).
MAX_LOG_SCALE = math.log(1000.0 / 16)

MOST_SHIFTED = 1000  # candidates of an image; see shift_by_label

IGNORED = -1  # neither positive nor negative
NEGATIVE = -2


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """What regression must predict to turn `anchors` into `boxes`.

    Args:
        boxes, anchors: (N, 4) float.
        weights: factors of (dx, dy, dw, dh).

    Returns:
        (N, 4): ((x - xa) / wa, (y - ya) / ha, log(w / wa), log(h / ha)) of centres and sizes, times weights.

    Source: Girshick et al., R-CNN, appendix C.
    """
    anchor_w, anchor_h = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    anchor_x, anchor_y = anchors[:, 0] + 0.5 * anchor_w, anchors[:, 1] + 0.5 * anchor_h
    box_w, box_h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    box_x, box_y = boxes[:, 0] + 0.5 * box_w, boxes[:, 1] + 0.5 * box_h
    wx, wy, ww, wh = weights
    return torch.stack(
        (
            wx * (box_x - anchor_x) / anchor_w,
            wy * (box_y - anchor_y) / anchor_h,
            ww * torch.log(box_w / anchor_w),
            wh * torch.log(box_h / anchor_h),
        ),
        dim=1,
    )


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Apply predicted deltas; the inverse of `encode_deltas`.

    Args:
        deltas: (..., 4).
        anchors: (..., 4), broadcast against deltas.

    Returns:
        (..., 4) boxes, not clipped to the image.
    """
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    center_x, center_y = anchors[..., 0] + 0.5 * width, anchors[..., 1] + 0.5 * height
    wx, wy, ww, wh = weights
    x = deltas[..., 0] / wx * width + center_x
    y = deltas[..., 1] / wy * height + center_y
    half_w = 0.5 * torch.exp(torch.clamp(deltas[..., 2] / ww, max=MAX_LOG_SCALE)) * width
    half_h = 0.5 * torch.exp(torch.clamp(deltas[..., 3] / wh, max=MAX_LOG_SCALE)) * height
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut the boxes of each image to 0 <= x <= width, 0 <= y <= height; NaN stays NaN.

    Args:
        boxes: (B, N, 4).
        sizes: (B, 2) height, width.
    """
    most = sizes.flip(1).repeat(1, 2)[:, None]
    return torch.minimum(boxes.clamp(min=0), most)


def has_area(boxes: Tensor, min_side_px: float) -> Tensor:
    """(...) bool of (..., 4) boxes: both sides are at least min_side_px long."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_side_px).all(dim=-1)


def shift_by_label(boxes: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Boxes as torchvision hands them to NMS: each label moved to a place of its own.

    Our NMS knows labels and needs no such thing, but far from the origin float32 is coarse (0.008 px at
    100,000), which decides now and then whether two boxes overlap by more than the threshold. With more than
    MOST_SHIFTED candidates in an image torchvision goes label by label instead, and so nothing is moved here.

    Args:
        boxes: (B, N, 4), not negative; labels: (B, N); valid: (B, N) bool, the candidates.

    Source: torchvision, ops/boxes.py (batched_nms), on a CPU.
    """
    largest = torch.where(valid[..., None], boxes, 0.0).amax((1, 2)) if boxes.shape[1] else boxes.sum((1, 2))
    step = torch.where(valid.sum(1) <= MOST_SHIFTED, largest + 1, 0.0)
    return boxes + (labels * step[:, None])[..., None]


def match(
    gt_boxes: Tensor,
    boxes: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    rescue: bool,
    ignored_boxes: Tensor,
) -> Tensor:
    """Assign to each box a ground-truth box by IoU.

    Args:
        gt_boxes: (G, 4); G may be 0, then no box is positive.
        boxes: (N, 4) anchors or proposals.
        positive_iou: from here on a box is positive; below negative_iou it is negative; between, IGNORED.
        rescue: the boxes that overlap a gt box most become positive even below the threshold, each
            for the gt box that it overlaps most itself (Faster R-CNN, section 3.1.2, case i).
        ignored_boxes: (I, 4); a box is IGNORED, too, that is not positive and has at least half of its own
            area in one of these.

    Returns:
        (N,) int64: index into gt_boxes, or NEGATIVE, or IGNORED.
    """
    if gt_boxes.shape[0] == 0:
        matched = torch.full((boxes.shape[0],), NEGATIVE, dtype=torch.int64, device=boxes.device)
    else:
        iou: Tensor = box_iou(gt_boxes, boxes)  # (G, N)
        best_iou, best_gt = iou.max(dim=0)
        matched = best_gt.clone()
        matched[best_iou < positive_iou] = IGNORED
        matched[best_iou < negative_iou] = NEGATIVE
        if rescue:
            best_of_gt = iou.max(dim=1, keepdim=True).values
            rescued = (iou == best_of_gt).any(dim=0)
            matched[rescued] = best_gt[rescued]
    if ignored_boxes.shape[0]:
        matched[(matched == NEGATIVE) & _lies_in_one_of(ignored_boxes, boxes)] = IGNORED
    return matched


def _lies_in_one_of(regions: Tensor, boxes: Tensor) -> Tensor:
    """(N,) bool: at least half of the area of boxes (N, 4) lies in one of the regions (I, 4), I >= 1.

    Source: cocoapi, common/maskApi.c (bbIou): with a crowd, intersection over the detection's own area.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    corner0 = torch.maximum(regions[:, None, :2], boxes[:, :2])
    corner1 = torch.minimum(regions[:, None, 2:], boxes[:, 2:])
    most_inside = (corner1 - corner0).clamp(min=0).prod(2).amax(0)
    return (area > 0) & (2 * most_inside >= area)


def sample_balanced(
    matched: Tensor,
    num_samples: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw at most `num_samples` boxes, at most the given fraction of them positive.

    Args:
        matched: (N,) from `match`.
        generator: on the device of `matched`; None: torch's global one.

    Returns:
        indices of the positives and of the negatives drawn, each int64, in random order.
    """
    positive = torch.where(matched >= 0)[0]
    negative = torch.where(matched == NEGATIVE)[0]
    num_positive = min(positive.numel(), int(num_samples * positive_fraction))
    num_negative = min(negative.numel(), num_samples - num_positive)
    orders = [
        torch.randperm(of_kind.numel(), generator=generator, device=matched.device)
        for of_kind in (positive, negative)
    ]
    return positive[orders[0][:num_positive]], negative[orders[1][:num_negative]]
