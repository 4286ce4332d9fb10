"""RoIAlign's gradient on CPUs; `maskrcnn_core.ops.roi_align` says what it computes.

Neighbouring samples and RoIs add to the same pixels. So threads share out channels, not RoIs: no two of them
write the same number, and each adds in the same order whatever their number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.machine_code import compiled
from maskrcnn_core.ops.cpu import as_array, for_each_range, widen
from maskrcnn_core.ops.cpu.roi_align import bins_of, sample_axis

BLOCK = 64  # channels of one piece of work


def spread(
    gradient: Tensor,
    rois: Tensor,
    levels: Tensor,
    grids: list[int],
    num_images: int,
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    channels = gradient.shape[1]
    pooled = as_array(gradient.permute(0, 2, 3, 1).contiguous())
    roi_array, level_array = rois.contiguous().numpy(), levels.contiguous().numpy()
    images = roi_array[:, 0].astype(np.int64)
    offset = np.float32(0.5 if aligned else 0.0)
    results = []
    for level, stride in enumerate(strides):
        total = torch.zeros((num_images, *grids[2 * level : 2 * level + 2], channels), dtype=torch.float32)
        chosen = np.flatnonzero(level_array == level)
        chosen = chosen[np.argsort(images[chosen], kind="stable")]
        bounds = np.searchsorted(images[chosen], np.arange(num_images + 1))
        spread_range = partial(
            _spread,
            total.numpy(),
            roi_array,
            chosen,
            bounds,
            np.float32(1.0 / stride),
            offset,
            sampling_ratio,
            not aligned,
            pooled,
        )
        for_each_range(spread_range, num_images * -(-channels // BLOCK) if len(chosen) else 0, 1)
        results.append(total.to(gradient.dtype).permute(0, 3, 1, 2))
    return results


@compiled
def _spread(
    total: NDArray[np.float32],
    rois: NDArray[np.float32],
    chosen: NDArray[np.int64],
    bounds: NDArray[np.int64],
    scale: np.float32,
    offset: np.float32,
    sampling_ratio: int,
    at_least_one_px: bool,
    pooled: NDArray[Any],
    start: int,
    stop: int,
) -> None:
    """Pieces of work start … stop, each a block of channels of one image.

    Args:
        chosen: the RoIs of the level that `total` is of, sorted by image; those of image b are
            chosen[bounds[b] : bounds[b + 1]].
    """
    num_images, height, width, channels = total.shape
    side = pooled.shape[1]
    of_bin = np.empty(BLOCK, np.float32)
    for piece in range(start, stop):
        image, first = piece % num_images, piece // num_images * BLOCK
        size = min(BLOCK, channels - first)
        for r in chosen[bounds[image] : bounds[image + 1]]:
            x0, y0 = rois[r, 1] * scale - offset, rois[r, 2] * scale - offset
            x1, y1 = rois[r, 3] * scale - offset, rois[r, 4] * scale - offset
            bin_w, grid_w = bins_of(x0, x1, at_least_one_px, side, sampling_ratio)
            bin_h, grid_h = bins_of(y0, y1, at_least_one_px, side, sampling_ratio)
            columns, column_weights, num_columns = _pixels_of_bins(x0, bin_w, side, grid_w, width)
            rows, row_weights, num_rows = _pixels_of_bins(y0, bin_h, side, grid_h, height)
            for i in range(side):
                for j in range(side):
                    if num_rows[i] == 0 or num_columns[j] == 0:
                        continue
                    source = pooled[r, i, j]
                    for k in range(size):
                        of_bin[k] = widen(source[first + k])
                    for y in range(num_rows[i]):
                        for x in range(num_columns[j]):
                            weight = row_weights[i, y] * column_weights[j, x]
                            target = total[image, rows[i, y], columns[j, x]]
                            for k in range(size):
                                target[first + k] += weight * of_bin[k]


@compiled
def _pixels_of_bins(
    start: np.float32, bin_size: np.float32, side: int, num_samples: int, extent: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """On one axis: the pixels that a bin reads, their shares of its mean, (side, most), and their number."""
    pixels = np.empty((side, 2 * num_samples), np.int64)
    weights = np.empty((side, 2 * num_samples), np.float32)
    numbers = np.zeros(side, np.int64)
    for i in range(side):
        number = 0
        for sample in range(num_samples):
            low, high, low_weight, high_weight = sample_axis(start, bin_size, i, sample, num_samples, extent)
            for pixel, weight in ((low, low_weight), (high, high_weight)):
                if weight == 0:
                    continue
                share = weight / np.float32(num_samples)
                # Samples go forward: a pixel that was read before is one of the last two.
                if number >= 1 and pixels[i, number - 1] == pixel:
                    weights[i, number - 1] += share
                elif number >= 2 and pixels[i, number - 2] == pixel:
                    weights[i, number - 2] += share
                else:
                    pixels[i, number], weights[i, number] = pixel, share
                    number += 1
        numbers[i] = number
    return pixels, weights, numbers
