"""Photographs -> the network's input: resize, normalise and pad in one pass over each image.

Letters: B images, H×W the padded input.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("masklake::resize_normalize", mutates_args=(), device_types="cpu")
def resize_normalize(
    pixels: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Resize each image bilinearly, subtract the mean, divide by std, and pad with zeros.

    Args:
        pixels: (P,) uint8, the images one after another, each (h, w, 3) RGB.
        geometry: (B, 5) int64 on the CPU: where an image begins in `pixels`, h, w, and its height and width
            after resizing, which are at most `height` and `width`.
        height, width: H and W.
        mean, std: three each, of RGB in [0, 1].
        dtype: of the result: float32 or bfloat16, on a GPU also float16.

    Returns:
        (B, 3, H, W), in memory with channels last; images at the top left.

    Source: torchvision, models/detection/transform.py: bilinear without antialiasing, pixel centres at +0.5;
    on a CPU equal to it to the last bit.
    """
    from maskrcnn_core.ops.cpu.resize import resize  # here: a machine with a GPU can do without Numba

    return resize(pixels, geometry, height, width, mean, std, dtype)


@resize_normalize.register_kernel("cuda")
def _(
    pixels: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    from maskrcnn_core.ops.cuda.resize import resize  # here: Triton comes with torch on Linux only

    return resize(pixels, geometry, height, width, mean, std, dtype)


@resize_normalize.register_fake
def _(
    pixels: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    return pixels.new_empty((len(geometry), height, width, 3), dtype=dtype).permute(0, 3, 1, 2)
