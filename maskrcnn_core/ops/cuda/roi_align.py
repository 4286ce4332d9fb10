"""RoIAlign on GPUs; `maskrcnn_core.ops.roi_align` says what it computes.

With channels last a sample is four contiguous rows of C values. A program holds one row of bins with all
their channels in registers, so that the weights of a sample are computed once for all channels, and goes
through the RoI's rows, so that pixels which neighbouring bins share are found in the nearest cache.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

LEVELS = 4  # that one launch serves; P2 ... P5 are four
MAX_CHANNELS = 256  # of one program
MAX_WARPS = 8
# With fewer RoIs than this a program takes one row of bins and not all: every multiprocessor shall have work.
FEW_ROIS = 2048


def align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    num_rois, channels = len(rois), features[0].shape[1]
    output = features[0].new_empty((num_rois, side, side, channels))
    if output.numel() == 0:
        return output.permute(0, 3, 1, 2)
    maps = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    rois, levels = rois.contiguous(), levels.contiguous()
    bins, block = triton.next_power_of_2(side), min(MAX_CHANNELS, triton.next_power_of_2(channels))
    threads = bins * block * output.element_size() // 16  # each loads 16 bytes at once
    rows = side if num_rois >= FEW_ROIS else 1
    grid = (num_rois, triton.cdiv(side, rows), triton.cdiv(channels, block))
    with torch.cuda.device_of(rois):
        for first in range(0, len(maps), LEVELS):
            served = [*range(first, min(first + LEVELS, len(maps)))]
            served += served[-1:] * (LEVELS - len(served))  # no RoI is on these
            _align[grid](
                *(maps[level] for level in served),
                *(maps[level].shape[1] for level in served),
                *(maps[level].shape[2] for level in served),
                *(1.0 / strides[level] for level in served),
                rois,
                levels,
                output,
                first,
                min(LEVELS, len(maps) - first),
                rows,
                side=side,
                num_channels=channels,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
                num_bins=bins,
                block=block,
                num_warps=min(MAX_WARPS, max(1, threads // 32)),
                enable_fp_fusion=False,
            )
    return output.permute(0, 3, 1, 2)


_SIZES = [f"{side}{level}" for side in ("height", "width") for level in range(LEVELS)]


@triton.jit(do_not_specialize=[*_SIZES, "first_level", "num_levels", "rows"])
def _align(
    map0: tl.tensor,
    map1: tl.tensor,
    map2: tl.tensor,
    map3: tl.tensor,
    height0: tl.tensor,
    height1: tl.tensor,
    height2: tl.tensor,
    height3: tl.tensor,
    width0: tl.tensor,
    width1: tl.tensor,
    width2: tl.tensor,
    width3: tl.tensor,
    scale0: tl.tensor,
    scale1: tl.tensor,
    scale2: tl.tensor,
    scale3: tl.tensor,
    rois: tl.tensor,
    levels: tl.tensor,
    pooled: tl.tensor,
    first_level: tl.tensor,
    num_levels: tl.tensor,
    rows: tl.tensor,
    side: tl.constexpr,
    num_channels: tl.constexpr,
    sampling_ratio: tl.constexpr,
    aligned: tl.constexpr,
    num_bins: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """`rows` rows of bins of one RoI; nothing where another launch serves its level."""
    roi = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * rows
    level = (tl.load(levels + roi) - first_level).to(tl.int32)
    if (level >= 0) & (level < num_levels):
        pixels = _of_level(level, map0, map1, map2, map3)
        height = _of_level(level, height0, height1, height2, height3)
        width = _of_level(level, width0, width1, width2, width3)
        scale = _of_level(level, scale0, scale1, scale2, scale3)
        rois += roi * 5
        image = tl.load(rois).to(tl.int64)
        pixels += image * height * width * num_channels
        offset = 0.5 if aligned else 0.0
        x0 = tl.load(rois + 1) * scale - offset
        y0 = tl.load(rois + 2) * scale - offset
        roi_w = tl.load(rois + 3) * scale - offset - x0
        roi_h = tl.load(rois + 4) * scale - offset - y0
        if not aligned:
            roi_w = tl.where(roi_w < 1.0, 1.0, roi_w)  # NaN stays NaN
            roi_h = tl.where(roi_h < 1.0, 1.0, roi_h)
        bin_w = tl.div_rn(roi_w, side * 1.0)
        bin_h = tl.div_rn(roi_h, side * 1.0)

        bins = tl.arange(0, num_bins)
        channels = tl.program_id(2) * block + tl.arange(0, block)
        wanted = (bins < side)[:, None] & (channels < num_channels)[None, :]
        first_x = x0 + bins.to(tl.float32) * bin_w
        pooled += roi * (side * side * num_channels)
        cells = bins[:, None] * num_channels + channels[None, :]
        row = first_row
        while row < tl.minimum(first_row + rows, side):
            first_y = y0 + row.to(tl.float32) * bin_h
            total = tl.zeros((num_bins, block), tl.float32)
            if sampling_ratio > 0:
                for sample_y in tl.static_range(sampling_ratio):
                    y = first_y + bin_h * ((sample_y + 0.5) / sampling_ratio)
                    for sample_x in tl.static_range(sampling_ratio):
                        x = first_x + bin_w * ((sample_x + 0.5) / sampling_ratio)
                        total += _sample(pixels, y, x, height, width, channels, wanted, num_channels)
                total *= 1.0 / (sampling_ratio * sampling_ratio)
            else:
                samples_w, samples_h = _samples_per_bin(bin_w), _samples_per_bin(bin_h)
                sample_y = samples_h * 0
                while sample_y < samples_h:
                    y = first_y + tl.div_rn((sample_y + 0.5) * bin_h, samples_h.to(tl.float32))
                    sample_x = samples_w * 0
                    while sample_x < samples_w:
                        x = first_x + tl.div_rn((sample_x + 0.5) * bin_w, samples_w.to(tl.float32))
                        total += _sample(pixels, y, x, height, width, channels, wanted, num_channels)
                        sample_x += 1
                    sample_y += 1
                total *= tl.div_rn(1.0, tl.maximum(samples_w * samples_h, 1).to(tl.float32))
            cell = row * (side * num_channels) + cells
            tl.store(pooled + cell, total.to(pooled.dtype.element_ty), mask=wanted)
            row += 1


@triton.jit
def _of_level(level: tl.tensor, of0: tl.tensor, of1: tl.tensor, of2: tl.tensor, of3: tl.tensor) -> tl.tensor:
    return tl.where(level == 0, of0, tl.where(level == 1, of1, tl.where(level == 2, of2, of3)))


@triton.jit
def _samples_per_bin(bin_size: tl.tensor) -> tl.tensor:
    """On one axis, one a feature pixel; 0 where the size is not finite or not positive."""
    is_size = (bin_size > 0.0) & (bin_size < 1e9)
    return tl.ceil(tl.where(is_size, bin_size, 0.0)).to(tl.int32)


@triton.jit
def _sample(
    pixels: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    wanted: tl.tensor,
    num_channels: tl.constexpr,
) -> tl.tensor:
    """(bins, channels) float32 of one sample in each bin; all its bins lie at the same y."""
    low_y, high_y, low_weight_y, high_weight_y = _neighbours(y, height)
    low_x, high_x, low_weight_x, high_weight_x = _neighbours(x, width)
    upper = pixels + low_y * width * num_channels
    lower = pixels + high_y * width * num_channels
    left = (low_x * num_channels)[:, None] + channels[None, :]
    right = (high_x * num_channels)[:, None] + channels[None, :]
    a = tl.load(upper + left, mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(upper + right, mask=wanted, other=0.0).to(tl.float32)
    c = tl.load(lower + left, mask=wanted, other=0.0).to(tl.float32)
    d = tl.load(lower + right, mask=wanted, other=0.0).to(tl.float32)
    result = a * (low_weight_y * low_weight_x)[:, None]
    result = tl.fma(b, (low_weight_y * high_weight_x)[:, None].broadcast_to(b.shape), result)
    result = tl.fma(c, (high_weight_y * low_weight_x)[:, None].broadcast_to(c.shape), result)
    return tl.fma(d, (high_weight_y * high_weight_x)[:, None].broadcast_to(d.shape), result)


@triton.jit
def _neighbours(position: tl.tensor, extent: tl.tensor) -> tl.tensor:
    """The pixels on both sides of a position on one axis, and their weights: 0 where it is outside or NaN."""
    is_inside = (position >= -1.0) & (position <= extent.to(tl.float32))
    position = tl.where(is_inside, tl.maximum(position, 0.0), 0.0)
    low = tl.minimum(position.to(tl.int32), extent - 1)
    high = tl.minimum(low + 1, extent - 1)
    high_weight = tl.where(low < extent - 1, position - low.to(tl.float32), 0.0)
    return low, high, tl.where(is_inside, 1.0 - high_weight, 0.0), tl.where(is_inside, high_weight, 0.0)
