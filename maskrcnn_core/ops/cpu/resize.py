"""Resize, normalise and pad on CPUs; `maskrcnn_core.ops.resize` says what it computes.

Every rounding is that of torchvision's transform on a CPU, so that float32 results are the same bits: divide
by 255, subtract, divide; along x, then along y, each time one product rounded and one fused with the sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from maskrcnn_core.machine_code import compiled
from maskrcnn_core.ops.cpu import as_array, for_each_range, narrow


def resize(
    pixels: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    output = torch.empty((len(geometry), height, width, 3), dtype=dtype)
    source, target = pixels.numpy(), as_array(output)
    for image, (offset, from_h, from_w, to_h, to_w) in enumerate(geometry.tolist()):
        photograph = source[offset : offset + from_h * from_w * 3].reshape(from_h, from_w * 3)
        column, column_weight = _taps(from_w, to_w)
        row, row_weight = _taps(from_h, to_h)
        resize_range = partial(
            _resize_rows,
            photograph,
            row,
            row_weight,
            column * 3,
            column_weight,
            np.tile(np.array(mean, np.float32), from_w),
            np.tile(np.array(std, np.float32), from_w),
            target[image],
        )
        for_each_range(resize_range, height, 64)
    return output.permute(0, 3, 1, 2)


def _taps(from_size: int, to_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each target pixel its first source pixel and the weight of the next one."""
    position = (np.arange(to_size, dtype=np.float32) + np.float32(0.5)) * np.float32(from_size / to_size)
    position = np.maximum(position - np.float32(0.5), np.float32(0))
    first = np.minimum(position.astype(np.int64), from_size - 1)
    weight = np.where(first < from_size - 1, position - first.astype(np.float32), np.float32(0))
    return first, weight.astype(np.float32)


@compiled
def _resize_rows(
    photograph: NDArray[np.uint8],
    row: NDArray[np.int64],
    row_weight: NDArray[np.float32],
    column: NDArray[np.int64],
    column_weight: NDArray[np.float32],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    canvas: NDArray[Any],
    start: int,
    stop: int,
) -> None:
    """Rows start ... stop of the padded canvas (H, W, 3).

    Neighbouring target rows share their source rows, so these are resized along x once and kept.
    """
    to_w = len(column)
    upper, lower = np.empty(to_w * 3 + 1, np.float32), np.empty(to_w * 3 + 1, np.float32)
    normalized = np.empty(photograph.shape[1] + 4, np.float32)
    upper_row = lower_row = -1
    zero = np.float32(0)
    for y in range(start, stop):
        out = canvas[y].reshape(canvas.shape[1] * 3)
        if y >= len(row):
            out[:] = narrow(zero, out[0])
            continue
        top = row[y]
        bottom = min(top + 1, len(photograph) - 1)
        if top == lower_row:
            upper, lower = lower, upper
            upper_row, lower_row = lower_row, upper_row
        if top != upper_row:
            _resize_line(photograph[top], column, column_weight, mean, std, normalized, upper)
            upper_row = top
        if bottom != lower_row:
            _resize_line(photograph[bottom], column, column_weight, mean, std, normalized, lower)
            lower_row = bottom
        _blend_lines(upper, lower, row_weight[y], to_w * 3, out)


@compiled
def _blend_lines(
    upper: NDArray[np.float32],
    lower: NDArray[np.float32],
    weight: np.float32,
    length: int,
    out: NDArray[Any],
) -> None:
    """out = upper * (1 - weight) + lower * weight, then zeros."""
    for i in range(length):
        out[i] = narrow(_fma(upper[i], np.float32(1) - weight, lower[i] * weight), out[i])
    for i in range(length, len(out)):
        out[i] = narrow(np.float32(0), out[i])


@compiled
def _resize_line(
    line: NDArray[np.uint8],
    column: NDArray[np.int64],
    column_weight: NDArray[np.float32],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    normalized: NDArray[np.float32],
    resized: NDArray[np.float32],
) -> None:
    """One row along x. Four floats at a time, since a vector register holds four and not three: the fourth is
    the next pixel's first and is written over by it. Both buffers have room for it.
    """
    for i in range(len(line)):
        normalized[i] = (np.float32(line[i]) / np.float32(255) - mean[i]) / std[i]
    normalized[len(line) : len(line) + 4] = 0  # read with weight 0
    for x in range(len(column)):
        _blend_pixel(normalized, column[x], column_weight[x], resized, 3 * x)


def _generate_blend(typing_context: Any, source: Any, left: Any, weight: Any, target: Any, to: Any) -> Any:
    """target[to : to + 4] = source[left : left + 4] * (1 - weight) + source[left + 3 : left + 7] * weight.

    Written out in vector instructions, which the compiler does not find by itself here: half the time.
    """
    four = ir.VectorType(ir.FloatType(), 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def pointer(array: int, index: Any) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [index]), four.as_pointer())

        three = ir.Constant(arguments[1].type, 3)
        here = builder.load(pointer(0, arguments[1]), align=4)
        neighbour = builder.load(pointer(0, builder.add(arguments[1], three)), align=4)
        after = ir.Constant(four, ir.Undefined)
        for lane in range(4):
            after = builder.insert_element(after, arguments[2], ir.Constant(ir.IntType(32), lane))
        before = builder.fsub(ir.Constant(four, [1.0] * 4), after)
        signature_of_fma = ir.FunctionType(four, [four, four, four])
        fma = builder.module.globals.get("llvm.fma.v4f32") or ir.Function(
            builder.module, signature_of_fma, "llvm.fma.v4f32"
        )
        blended = builder.call(fma, [here, before, builder.fmul(neighbour, after)])
        builder.store(blended, pointer(3, arguments[4]), align=4)
        return context.get_dummy_value()

    return types.void(source, left, weight, target, to), generate


def _generate_fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding; float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


_blend_pixel: Any = intrinsic(_generate_blend)
_fma: Any = intrinsic(_generate_fma)
