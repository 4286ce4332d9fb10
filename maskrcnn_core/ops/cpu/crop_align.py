"""RoIAlign on cropped masks, on CPUs; `maskrcnn_core.ops.crop_align` says what it computes.

A bilinear sample is a weight in y times a weight in x, and so is the mean over a bin: the rows that a row of
bins reads are summed first, once for all its bins.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.machine_code import compiled
from maskrcnn_core.ops.cpu import for_each_range
from maskrcnn_core.ops.cpu.roi_align import bins_of, sample_axis


def align(
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
    output = torch.empty((len(boxes), side, side), dtype=torch.float32)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    align_range = partial(
        _align,
        pixels.contiguous().numpy(),
        starts.numpy(),
        corners.contiguous().numpy(),
        sizes.contiguous().numpy(),
        mask_index.contiguous().numpy(),
        boxes.contiguous().numpy(),
        height,
        width,
        np.float32(0.5 if aligned else 0.0),
        not aligned,
        output.numpy(),
    )
    for_each_range(align_range, len(boxes), 16)
    return output


@compiled
def _align(
    pixels: NDArray[np.uint8],
    starts: NDArray[np.int64],
    corners: NDArray[np.int64],
    sizes: NDArray[np.int64],
    mask_index: NDArray[np.int64],
    boxes: NDArray[np.float32],
    height: int,
    width: int,
    offset: np.float32,
    at_least_one_px: bool,
    pooled: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """RoIs start … stop."""
    side = pooled.shape[1]
    most_columns = 0
    for g in range(len(sizes)):
        most_columns = max(most_columns, sizes[g, 1])
    total = np.empty(most_columns, np.float32)
    for f in range(start, stop):
        mask = mask_index[f]
        top, left = corners[mask]
        rows, columns = sizes[mask]
        crop = pixels[starts[mask] : starts[mask] + rows * columns].reshape((rows, columns))
        x0, y0 = boxes[f, 0] - offset, boxes[f, 1] - offset
        bin_w, grid_w = bins_of(x0, boxes[f, 2] - offset, at_least_one_px, side, 0)
        bin_h, grid_h = bins_of(y0, boxes[f, 3] - offset, at_least_one_px, side, 0)
        num_samples = np.float32(max(grid_w * grid_h, 1))
        first_x, end_x = (
            max(int(x0) - 1 - left, 0),
            min(int(x0 + bin_w * np.float32(side)) + 2 - left, columns),
        )  # what it reads
        for i in range(side):
            total[:columns] = 0
            for sy in range(grid_h):
                low, high, low_weight, high_weight = sample_axis(y0, bin_h, i, sy, grid_h, height)
                for y, weight in ((low - top, low_weight), (high - top, high_weight)):
                    if 0 <= y < rows and weight > 0:
                        row = crop[y]
                        for x in range(first_x, end_x):
                            total[x] += weight * np.float32(row[x])
            for j in range(side):
                in_bin = np.float32(0)
                for sx in range(grid_w):
                    low, high, low_weight, high_weight = sample_axis(x0, bin_w, j, sx, grid_w, width)
                    for x, weight in ((low - left, low_weight), (high - left, high_weight)):
                        if 0 <= x < columns:
                            in_bin += weight * total[x]
                pooled[f, i, j] = in_bin / num_samples
