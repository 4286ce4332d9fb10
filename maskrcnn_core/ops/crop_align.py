"""RoIAlign on masks of which only crops are stored: the targets of the mask head.

Letters: G masks, P pixels of all their crops, F RoIs, S side of the output grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("masklake::crop_align", mutates_args=(), device_types="cpu")
def crop_align(
    pixels: Tensor,
    corners: Tensor,
    sizes: Tensor,
    mask_index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    side: int,
    aligned: bool,
) -> Tensor:
    """Sample each RoI on an S×S grid from its mask, bilinearly, with as many samples a bin as it has pixels.

    Args:
        pixels: (P,) uint8, the crops one after another, each row by row.
        corners: (G, 2) int64 y0 and x0 of each crop in its image; sizes: (G, 2) int64 height and width.
        mask_index: (F,) int64, 0 … G-1. F may be 0.
        boxes: (F, 4) float32 x0 y0 x1 y1, pixels of the image.
        height, width: of the image; RoIAlign reads its last row and column up to a pixel beyond them.
        side: S.
        aligned: whether pixel centres lie at +0.5, as everywhere else, or at 0.

    Returns:
        (F, S, S) float32 in [0, 1].

    Source: torchvision's `roi_align` on the dense masks, sampling_ratio -1, to which this is equal up to the
    rounding of sums.
    """
    from maskrcnn_core.ops.cpu.crop_align import align  # here: a machine with a GPU can do without Numba

    return align(pixels, corners, sizes, mask_index, boxes, height, width, side, aligned)


@crop_align.register_kernel("cuda")
def _(
    pixels: Tensor,
    corners: Tensor,
    sizes: Tensor,
    mask_index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    side: int,
    aligned: bool,
) -> Tensor:
    from maskrcnn_core.ops.cuda.crop_align import align  # here: Triton comes with torch on Linux only

    return align(pixels, corners, sizes, mask_index, boxes, height, width, side, aligned)


@crop_align.register_fake
def _(
    pixels: Tensor,
    corners: Tensor,
    sizes: Tensor,
    mask_index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    side: int,
    aligned: bool,
) -> Tensor:
    return boxes.new_empty((len(boxes), side, side))
