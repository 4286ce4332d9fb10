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


@torch.library.custom_op("masklake::roi_align_gradient", mutates_args=(), device_types="cpu")
def roi_align_gradient(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    grids: list[int],
    num_images: int,
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """What roi_align's result says of its features: torchvision's gradient, summed in float32.

    Args:
        gradient: (R, C, S, S), of the loss by the result.
        grids: 2·L, H_l and W_l of each level; num_images: B.

    Returns:
        L tensors (B, C, H_l, W_l) of the gradient's type.
    """
    from maskrcnn_core.ops.cpu.roi_align_gradient import spread  # here: see above

    return spread(gradient, rois, levels, grids, num_images, strides, sampling_ratio, aligned)


@roi_align_gradient.register_kernel("cuda")
def _(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    grids: list[int],
    num_images: int,
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """torchvision's operator, level by level."""
    channels, side = gradient.shape[1:3]
    gradients = []
    for level, stride in enumerate(strides):
        of_level = torch.where(levels == level)[0]
        gradients.append(
            torch.ops.torchvision._roi_align_backward(
                gradient[of_level].float().contiguous(),
                rois[of_level],
                1.0 / stride,
                side,
                side,
                num_images,
                channels,
                *grids[2 * level : 2 * level + 2],
                sampling_ratio,
                aligned,
            ).to(gradient.dtype)
        )
    return gradients


@roi_align_gradient.register_fake
def _(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    grids: list[int],
    num_images: int,
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    return [
        gradient.new_empty((num_images, *grids[2 * level : 2 * level + 2], gradient.shape[1])).permute(
            0, 3, 1, 2
        )
        for level in range(len(strides))
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, strides, _, *ratio_and_aligned = inputs
    grids = [extent for feature in features for extent in feature.shape[2:]]
    ctx.rest = (grids, features[0].shape[0], strides, *ratio_and_aligned)
    ctx.save_for_backward(rois, levels)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return roi_align_gradient(gradient, *ctx.saved_tensors, *ctx.rest), *[None] * 6


roi_align.register_autograd(_backward, setup_context=_remember)
