"""RoIAlign on CPUs; `maskrcnn_core.ops.roi_align` says what it computes.

With channels last a sample is four contiguous rows of C values: the vector units do the rest. Products and
sums are rounded one by one and in torchvision's order, so that float32 results are the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.machine_code import compiled
from maskrcnn_core.ops.cpu import as_array, for_each_range, narrow, widen


def align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    channels = features[0].shape[1]
    output = torch.empty((len(rois), side, side, channels), dtype=features[0].dtype)
    pixels = [as_array(f.permute(0, 2, 3, 1).contiguous()) for f in features]
    roi_array, level_array = rois.contiguous().numpy(), levels.contiguous().numpy()
    pooled = as_array(output)
    offset = np.float32(0.5 if aligned else 0.0)
    for level, (of_level, stride) in enumerate(zip(pixels, strides, strict=True)):
        chosen = np.flatnonzero(level_array == level)
        scale = np.float32(1.0 / stride)
        align_range = partial(
            _align, of_level, roi_array, chosen, scale, offset, sampling_ratio, not aligned, pooled
        )
        for_each_range(align_range, len(chosen), 16)
    return output.permute(0, 3, 1, 2)


@compiled
def sample_axis(
    start: np.float32,
    bin_size: np.float32,
    bin_index: int,
    sample: int,
    num_samples: int,
    extent: int,
) -> tuple[int, int, np.float32, np.float32]:
    """Neighbours and weights of one sample on one axis; weights of 0 where it lies outside or is NaN."""
    # float32 throughout: Numba makes float64 of an integer and a float32
    centre = (np.float32(sample) + np.float32(0.5)) * bin_size / np.float32(num_samples)
    position = start + np.float32(bin_index) * bin_size + centre
    if not (position >= np.float32(-1.0) and position <= np.float32(extent)):
        return 0, 0, np.float32(0), np.float32(0)
    position = max(position, np.float32(0))
    low = int(position)
    if low >= extent - 1:
        return extent - 1, extent - 1, np.float32(1), np.float32(0)
    high_weight = position - np.float32(low)
    return low, low + 1, np.float32(1) - high_weight, high_weight


@compiled
def bins_of(
    start: np.float32, end: np.float32, at_least_one_px: bool, side: int, sampling_ratio: int
) -> tuple[np.float32, int]:
    """On one axis, the size of a RoI's bins and the samples in each."""
    size = end - start
    if at_least_one_px:
        size = max(size, np.float32(1))
    bin_size = size / np.float32(side)
    if sampling_ratio > 0:
        return bin_size, sampling_ratio
    per_bin = np.ceil(bin_size)
    return bin_size, int(per_bin) if per_bin >= 1 else 0  # also 0 for NaN


@compiled
def _align(
    pixels: NDArray[Any],
    rois: NDArray[np.float32],
    chosen: NDArray[np.int64],
    scale: np.float32,
    offset: np.float32,
    sampling_ratio: int,
    at_least_one_px: bool,
    pooled: NDArray[Any],
    start: int,
    stop: int,
) -> None:
    """The RoIs chosen[start:stop], all of the level whose pixels these are."""
    side, channels = pooled.shape[1], pooled.shape[3]
    total = np.empty(channels, np.float32)
    for r in chosen[start:stop]:
        image = int(rois[r, 0])
        x0, y0 = rois[r, 1] * scale - offset, rois[r, 2] * scale - offset
        x1, y1 = rois[r, 3] * scale - offset, rois[r, 4] * scale - offset
        bin_w, grid_w = bins_of(x0, x1, at_least_one_px, side, sampling_ratio)
        bin_h, grid_h = bins_of(y0, y1, at_least_one_px, side, sampling_ratio)
        num_samples = np.float32(max(grid_w * grid_h, 1))
        for i in range(side):
            for j in range(side):
                total[:] = 0
                for sy in range(grid_h):
                    low_y, high_y, wy0, wy1 = sample_axis(y0, bin_h, i, sy, grid_h, pixels.shape[1])
                    for sx in range(grid_w):
                        low_x, high_x, wx0, wx1 = sample_axis(x0, bin_w, j, sx, grid_w, pixels.shape[2])
                        a, b = pixels[image, low_y, low_x], pixels[image, low_y, high_x]
                        c, d = pixels[image, high_y, low_x], pixels[image, high_y, high_x]
                        wa, wb, wc, wd = wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1
                        for k in range(channels):
                            total[k] += (
                                wa * widen(a[k]) + wb * widen(b[k]) + wc * widen(c[k]) + wd * widen(d[k])
                            )
                out = pooled[r, i, j]
                for k in range(channels):
                    out[k] = narrow(total[k] / num_samples, out[k])
