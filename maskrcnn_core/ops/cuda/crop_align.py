"""RoIAlign on cropped masks, on GPUs; `maskrcnn_core.ops.crop_align` says what it computes."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from maskrcnn_core.ops.cuda.roi_align import _neighbours as neighbours
from maskrcnn_core.ops.cuda.roi_align import _samples_per_bin as samples_per_bin


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
    output = boxes.new_empty((len(boxes), side, side))
    if output.numel() == 0:
        return output
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    crops = torch.cat((starts[:, None], corners, sizes), 1)[mask_index]
    with torch.cuda.device_of(boxes):
        _align[(len(boxes), side)](
            pixels,
            crops,
            boxes.contiguous(),
            output,
            height,
            width,
            side=side,
            aligned=aligned,
            num_bins=triton.next_power_of_2(side),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return output


@triton.jit(do_not_specialize=["height", "width"])
def _align(
    pixels: tl.tensor,
    crops: tl.tensor,
    boxes: tl.tensor,
    pooled: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    side: tl.constexpr,
    aligned: tl.constexpr,
    num_bins: tl.constexpr,
) -> None:
    """One row of bins of one RoI, a bin a lane; crops: (F, 5) int64, start, corner and size of its mask."""
    roi, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    crops += roi * 5
    pixels += tl.load(crops)
    top, left = tl.load(crops + 1).to(tl.int32), tl.load(crops + 2).to(tl.int32)
    rows, columns = tl.load(crops + 3).to(tl.int32), tl.load(crops + 4).to(tl.int32)
    boxes += roi * 4
    offset = 0.5 if aligned else 0.0
    x0, y0 = tl.load(boxes) - offset, tl.load(boxes + 1) - offset
    roi_w = tl.load(boxes + 2) - offset - x0
    roi_h = tl.load(boxes + 3) - offset - y0
    if not aligned:
        roi_w = tl.where(roi_w < 1.0, 1.0, roi_w)  # NaN stays NaN
        roi_h = tl.where(roi_h < 1.0, 1.0, roi_h)
    bin_w, bin_h = tl.div_rn(roi_w, side * 1.0), tl.div_rn(roi_h, side * 1.0)
    samples_w, samples_h = samples_per_bin(bin_w), samples_per_bin(bin_h)
    bins = tl.arange(0, num_bins)
    first_x = x0 + bins.to(tl.float32) * bin_w
    first_y = y0 + row.to(tl.float32) * bin_h
    total = tl.zeros((num_bins,), tl.float32)
    sample_y = samples_h * 0
    while sample_y < samples_h:
        y = first_y + tl.div_rn((sample_y + 0.5) * bin_h, samples_h.to(tl.float32))
        low_y, high_y, low_weight_y, high_weight_y = neighbours(y, height)
        sample_x = samples_w * 0
        while sample_x < samples_w:
            x = first_x + tl.div_rn((sample_x + 0.5) * bin_w, samples_w.to(tl.float32))
            low_x, high_x, low_weight_x, high_weight_x = neighbours(x, width)
            a = _pixel(pixels, low_y - top, low_x - left, rows, columns)
            b = _pixel(pixels, low_y - top, high_x - left, rows, columns)
            c = _pixel(pixels, high_y - top, low_x - left, rows, columns)
            d = _pixel(pixels, high_y - top, high_x - left, rows, columns)
            total += low_weight_y * (low_weight_x * a + high_weight_x * b)
            total += high_weight_y * (low_weight_x * c + high_weight_x * d)
            sample_x += 1
        sample_y += 1
    total *= tl.div_rn(1.0, tl.maximum(samples_w * samples_h, 1).to(tl.float32))
    tl.store(pooled + (roi * side + row) * side + bins, total, mask=bins < side)


@triton.jit
def _pixel(pixels: tl.tensor, y: tl.tensor, x: tl.tensor, rows: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """(bins,) float32 of row y of the crop; 0 outside of it."""
    y += x * 0  # Triton's interpreter makes integers of a scalar comparison that it broadcasts
    is_stored = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    return tl.load(pixels + y * columns + x, mask=is_stored, other=0).to(tl.float32)
