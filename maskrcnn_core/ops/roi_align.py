"""RoIAlign over all levels of a pyramid in one operator.

Letters: B images, L levels, C channels, R RoIs, S side of the output grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision.ops  # noqa: F401 (registers the operator of the gradient)
from torch import Tensor


@torch.library.custom_op("masklake::roi_align", mutates_args=(), device_types="cpu")
def roi_align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Sample each RoI on an S×S grid from its level, bilinearly.

    Args:
        features: L tensors (B, C, H_l, W_l), float32 or bfloat16 on a CPU.
        rois: (R, 5) float32: image index, x0, y0, x1, y1 in input pixels. R may be 0.
        levels: (R,) int64, 0 ... L-1.
        strides: L, input pixels between neighbours of a level.
        side: S.
        sampling_ratio: samples a bin and side; 0: as many as a bin has feature pixels, rounded up.
        aligned: whether pixel centres lie at +0.5, as everywhere else, or at 0.

    Returns:
        (R, C, S, S) of the features' type, in memory with channels last.

    Source: Mask R-CNN, section 3; torchvision's `roi_align` on one level, to which this is equal, on a
    CPU to the last bit.
    """
    from maskrcnn_core.ops.cpu.roi_align import align  # here: a machine with a GPU can do without Numba

    return align(features, rois, levels, strides, side, sampling_ratio, aligned)


@roi_align.register_kernel("cuda")
def _(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    from maskrcnn_core.ops.cuda.roi_align import align  # here: Triton comes with torch on Linux only

    return align(features, rois, levels, strides, side, sampling_ratio, aligned)


@roi_align.register_fake
def _(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return features[0].new_empty((rois.shape[0], side, side, features[0].shape[1])).permute(0, 3, 1, 2)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, *ctx.rest = inputs
    ctx.shapes = [f.shape for f in features]
    ctx.save_for_backward(rois, levels)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """torchvision's gradient, level by level, summed in float32."""
    rois, levels = ctx.saved_tensors
    strides, side, sampling_ratio, aligned = ctx.rest
    gradients = []
    for level, (shape, stride) in enumerate(zip(ctx.shapes, strides, strict=True)):
        of_level = torch.where(levels == level)[0]
        gradients.append(
            torch.ops.torchvision._roi_align_backward(
                gradient[of_level].float().contiguous(),
                rois[of_level],
                1.0 / stride,
                side,
                side,
                *shape,
                sampling_ratio,
                aligned,
            ).to(gradient.dtype)
        )
    return gradients, None, None, None, None, None, None


roi_align.register_autograd(_backward, setup_context=_remember)
