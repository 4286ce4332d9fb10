"""Resize, normalise and pad on GPUs; `maskrcnn_core.ops.resize` says what it computes.

One program writes a piece of one row of one padded image, its three channels side by side, as they lie in
memory.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK = 1024  # values a program writes: eight a thread


def resize(
    pixels: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    output = pixels.new_empty((len(geometry), height, width, 3), dtype=dtype)
    if output.numel() == 0:
        return output.permute(0, 3, 1, 2)
    if pixels.is_cuda:  # from pinned memory, so that nothing waits
        geometry = geometry.pin_memory().to(pixels.device, non_blocking=True)
    factors = [1.0 / (255.0 * s) for s in std]
    shifts = [-m / s for m, s in zip(mean, std, strict=True)]
    with torch.cuda.device_of(pixels):
        _resize[(triton.cdiv(width * 3, BLOCK), height, len(geometry))](
            pixels.contiguous(),
            geometry.contiguous(),
            output,
            height,
            width,
            *factors,
            *shifts,
            block=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return output.permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=["height", "width"])
def _resize(
    pixels: tl.tensor,
    geometry: tl.tensor,
    canvas: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    factor0: tl.tensor,
    factor1: tl.tensor,
    factor2: tl.tensor,
    shift0: tl.tensor,
    shift1: tl.tensor,
    shift2: tl.tensor,
    block: tl.constexpr,
) -> None:
    y = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    geometry += image * 5
    pixels += tl.load(geometry)
    from_h = tl.load(geometry + 1).to(tl.int32)
    from_w = tl.load(geometry + 2).to(tl.int32)
    to_h = tl.load(geometry + 3).to(tl.int32)
    to_w = tl.load(geometry + 4).to(tl.int32)

    values = tl.program_id(0) * block + tl.arange(0, block)
    x = values // 3
    channel = values - 3 * x
    is_image = x < tl.where(y < to_h, to_w, 0)
    top, weight_y = _taps(y, from_h, to_h)
    left, weight_x = _taps(x, from_w, to_w)
    bottom = tl.minimum(top + 1, from_h - 1)
    right = tl.minimum(left + 1, from_w - 1)
    factor = tl.where(channel == 0, factor0, tl.where(channel == 1, factor1, factor2))
    shift = tl.where(channel == 0, shift0, tl.where(channel == 1, shift1, shift2))

    upper = pixels + top * from_w * 3
    lower = pixels + bottom * from_w * 3
    left = left * 3 + channel
    right = right * 3 + channel
    a = tl.fma(tl.load(upper + left, mask=is_image, other=0).to(tl.float32), factor, shift)
    b = tl.fma(tl.load(upper + right, mask=is_image, other=0).to(tl.float32), factor, shift)
    c = tl.fma(tl.load(lower + left, mask=is_image, other=0).to(tl.float32), factor, shift)
    d = tl.fma(tl.load(lower + right, mask=is_image, other=0).to(tl.float32), factor, shift)
    above = tl.fma(b - a, weight_x, a)
    below = tl.fma(d - c, weight_x, c)
    result = tl.where(is_image, above + (below - above) * weight_y, 0.0)
    cell = (image * height + y) * width * 3 + values
    tl.store(canvas + cell, result.to(canvas.dtype.element_ty), mask=values < width * 3)


@triton.jit
def _taps(index: tl.tensor, from_size: tl.tensor, to_size: tl.tensor) -> tl.tensor:
    """A target pixel's first source pixel and the weight of the next one."""
    step = tl.div_rn(from_size.to(tl.float32), to_size.to(tl.float32))
    position = tl.maximum((index.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    first = tl.minimum(position.to(tl.int32), from_size - 1)
    return first, tl.where(first < from_size - 1, position - first.to(tl.float32), 0.0)
