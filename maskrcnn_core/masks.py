"""Mask probabilities and boolean masks -> COCO run-length encoding, and back.

Enters: a small square of probabilities and a box per instance (encode_mask_probs), or a full-size bool mask
(encode_masks). Leaves: a COCO compressed count string per instance and, from probabilities, its area in
pixels.

Letters: N instances of one image, M mask side (28 in the paper), H×W pixels of the original image.

A COCO string lists run lengths in column-major order, background first. The straight way to get it from an
M×M square is to resize the square to its box, paste it into an H×W canvas, threshold and scan the canvas:
time and memory grow with the image, a hundred times over. But the resized mask is bilinear between source
samples, so where four neighbouring samples are all well above the threshold every pixel between them is
foreground, and where they are all well below, background. Only cells that the outline crosses are evaluated
pixel by pixel, and no canvas is made. `benchmarks/masks.py` measures what this is worth.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from maskrcnn_core.machine_code import compiled

MAX_COORDINATE_PX = 1e9  # boxes are cut to whole pixels in int64 arithmetic; no image comes near this

_PAD = 1  # ring of zeros around the M×M square, as in the reference: the mask fades out at its box's border
_SAFETY = np.float32(1e-5)  # float32 interpolation is off by less than 1e-6: this far above stays above
_OUTSIDE, _INSIDE, _MIXED = 0, 1, 2
_MAX_CODE_CHARS = 13  # of one run: 64 bits, five to a character
_MAX_COUNT_CHARS = 7  # accepted when reading: 35 bits, more than any image's pixel count


def encode_mask_probs(
    probs: NDArray[np.float32], boxes: NDArray[np.float32], height: int, width: int, threshold: float = 0.5
) -> tuple[list[bytes], NDArray[np.int32]]:
    """Paste, threshold and run-length encode the masks of one image, without pasting.

    Gives the bytes that torchvision's `paste_masks_in_image`, `> threshold` and pycocotools' `encode` give.
    Only a pixel within 1e-6 of the threshold may fall on the other side, because float32 sums are rounded
    differently.

    Releases the GIL and keeps no state: call it from as many threads as you like. The first call of a
    process loads machine code (0.3 s), the first one on a machine compiles it (about 4 s); a call without
    masks does that too.

    Args:
        probs: (N, M, M) float32, the probability of each instance's own class on an M×M grid over its box.
            N may be 0.
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the original image. A box may stick out of the
            image, which cuts its mask; one that lies outside, or has x1 well below x0, has an empty mask.
        height: H, the image's rows.
        width: W, the image's columns.
        threshold: a pixel is foreground where its probability is greater than this; from 0 to 1.

    Returns:
        N compressed count strings in input order, whose COCO size is (H, W), and (N,) int32 areas in pixels.

    Raises:
        TypeError: probs or boxes are not float32.
        ValueError: shapes do not fit, a value is NaN or infinite, a box is beyond ±1e9 px, the threshold is
            outside [0, 1], or the image has no pixel.

    Source: torchvision, models/detection/roi_heads.py (expand_boxes, paste_mask_in_image); cocoapi,
    common/maskApi.c.
    """
    for name, values in (("probs", probs), ("boxes", boxes)):
        if values.dtype != np.float32:
            raise TypeError(f"{name} are {values.dtype}; want float32")
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or probs.shape[1] == 0:
        raise ValueError(f"probs have shape {probs.shape}; want (N, M, M) with M of at least 1")
    if boxes.shape != (len(probs), 4):
        raise ValueError(f"boxes have shape {boxes.shape}; want ({len(probs)}, 4), one box for each mask")
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height}×{width} px; want at least one pixel")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; want a probability from 0 to 1")
    if not np.isfinite(probs).all():
        raise ValueError("probs hold NaN or infinite values; look for NaN in the model's weights")
    if not (np.abs(boxes) <= MAX_COORDINATE_PX).all():
        raise ValueError("boxes hold NaN or values beyond ±1e9 px; look for NaN in the model's weights")
    boxes_px = _pixel_boxes(boxes, scale=(probs.shape[1] + 2 * _PAD) / probs.shape[1])
    probs = np.require(probs, requirements=("C", "W"))  # one array type, so one compilation
    codes, offsets, areas = _encode_all(probs, boxes_px, height, width, np.float32(threshold))
    text = codes[: offsets[-1]].tobytes()
    return [text[start:end] for start, end in itertools.pairwise(offsets.tolist())], areas


def encode_masks(masks: NDArray[np.bool_]) -> list[bytes]:
    """Run-length encode the instance masks of one image, COCO style.

    Pixels are read column by column; runs alternate background, foreground, starting with background
    (possibly of length 0).

    Args:
        masks: (N, H, W) bool, on the original image's pixel grid, not the network's input. N may be 0.

    Returns:
        N compressed count strings in input order; size is (H, W).

    Raises:
        TypeError: masks are not bool; threshold probabilities first.
        ValueError: masks are not three-dimensional.

    Source: cocoapi, common/maskApi.c; tests compare with pycocotools.
    Example: [[0, 1, 1], [0, 1, 0]] has runs [2, 3, 1].
    """
    if masks.dtype != np.bool_:
        raise TypeError(f"masks are {masks.dtype}; want bool: threshold probabilities first")
    if masks.ndim != 3:
        raise ValueError(f"masks have shape {masks.shape}; want (N, H, W)")
    num_masks, height, width = masks.shape
    rles = []
    for pixels in masks.transpose(0, 2, 1).reshape(num_masks, height * width):
        edges = np.flatnonzero(np.diff(pixels, prepend=False))
        codes = np.empty((len(edges) + 1) * _MAX_CODE_CHARS, np.uint8)
        end, _ = _write_counts(edges, len(edges), pixels.size, codes, 0)
        rles.append(codes[:end].tobytes())
    return rles


def decode_rle(counts: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """Expand one COCO compressed count string into its (H, W) bool mask, C-contiguous.

    Raises:
        ValueError: the string is malformed or its runs do not add up to height × width.
    """
    runs = _read_counts(counts)
    num_pixels = int(runs.sum())
    if num_pixels != height * width:
        raise ValueError(f"RLE covers {num_pixels} pixels; an image of {height}×{width} has {height * width}")
    is_foreground = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(is_foreground, runs).reshape(width, height).T)


def decode_rle_crop(counts: bytes, height: int, y0: int, x0: int, y1: int, x1: int) -> NDArray[np.bool_]:
    """The pixels of one COCO compressed count string that lie in a rectangle, and no others.

    Releases the GIL. Runs behind the rectangle are not looked at.

    Args:
        height: rows of the mask's image.
        y0, x0, y1, x1: rows y0 to y1 and columns x0 to x1, ends excluded; may be empty.

    Returns:
        (y1 - y0, x1 - x0) bool, C-contiguous: decode_rle(…)[y0:y1, x0:x1].

    Raises:
        ValueError: the rectangle is not one of `height` rows, or the string is malformed or ends before the
            rectangle does.
    """
    if not (0 <= y0 <= y1 <= height and 0 <= x0 <= x1):
        raise ValueError(f"rectangle is rows {y0} to {y1}, columns {x0} to {x1}, of {height} rows")
    columns = np.zeros((x1 - x0, y1 - y0), np.bool_)
    if columns.size:
        _fill_columns(np.frombuffer(counts, np.uint8), height, y0, x0, columns)
    return np.ascontiguousarray(columns.T)


def rle_num_pixels(counts: bytes) -> int:
    """Pixels that one COCO compressed count string covers: height × width of its image.

    Raises:
        ValueError: the string is malformed.
    """
    return int(_read_counts(counts).sum())


def rle_area(counts: bytes) -> int:
    """Foreground pixels of one COCO compressed count string.

    Raises:
        ValueError: the string is malformed.
    """
    return int(_read_counts(counts)[1::2].sum())


def _read_counts(counts: bytes) -> NDArray[np.int64]:
    """Run lengths of a compressed count string.

    Each character holds five bits, low bits first, offset by 48; 0x20 says that more follow, and 0x10 of
    the last one is the sign. From the fourth run on, the string holds differences to the run before the
    previous one.
    """
    chars = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(chars):
        raise ValueError("RLE string is empty; want at least one run")
    if not ((chars >= 0) & (chars < 64)).all():
        at = int(np.flatnonzero((chars < 0) | (chars >= 64))[0])
        raise ValueError(f"RLE string has byte {counts[at]:#04x} at {at}; want characters '0' to 'o'")
    is_last = chars < 32
    if not is_last[-1]:
        raise ValueError(f"RLE string of {len(counts)} bytes stops in the middle of a run")
    ends = np.flatnonzero(is_last) + 1
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    if lengths.max() > _MAX_COUNT_CHARS:
        raise ValueError(
            f"RLE string has a run of {lengths.max()} characters; want at most {_MAX_COUNT_CHARS}"
        )
    position = np.arange(len(chars)) - np.repeat(starts, lengths)
    values = np.add.reduceat((chars & 31) << (5 * position), starts)
    is_negative = (chars[ends - 1] & 16) != 0
    runs = values - np.where(is_negative, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError(f"RLE string has a run of {runs.min()} pixels; a run cannot be negative")
    return runs


@compiled
def _fill_columns(
    counts: NDArray[np.uint8], height: int, y0: int, x0: int, columns: NDArray[np.bool_]
) -> None:
    """Set the foreground of a count string in columns (w, h): column by column, as the string lies."""
    num_columns, num_rows = columns.shape
    end_pixel = (x0 + num_columns) * height
    start, run, run_before = 0, 0, 0  # where the next run starts, and the last two runs
    at = num_runs = 0
    while start < end_pixel:
        value = num_chars = 0
        while True:
            if at == len(counts) or num_chars == _MAX_COUNT_CHARS:
                raise ValueError("RLE string is malformed, or ends before the rectangle does")
            bits = int(counts[at]) - 48
            if bits < 0 or bits > 63:
                raise ValueError("RLE string holds other characters than '0' to 'o'")
            value |= (bits & 31) << (5 * num_chars)
            at, num_chars = at + 1, num_chars + 1
            if bits < 32:
                break
        if bits & 16:
            value -= 1 << (5 * num_chars)
        length = value + run_before if num_runs > 2 else value
        if length < 0:
            raise ValueError("RLE string has a negative run")
        if num_runs % 2 == 1 and length > 0:
            last = min(start + length, end_pixel) - 1
            for x in range(max(start // height, x0), last // height + 1):
                first_row = max(start - x * height, y0)
                end_row = min(last + 1 - x * height, y0 + num_rows)
                for y in range(first_row, end_row):
                    columns[x - x0, y - y0] = True
        run, run_before = length, run
        start += length
        num_runs += 1


def _pixel_boxes(boxes: NDArray[np.float32], scale: float) -> NDArray[np.int64]:
    """Boxes grown about their centres for the ring of padding, then cut to whole pixels towards zero.

    The float32 steps are the reference's, one by one: a pixel more or less would shift the whole mask.
    """
    half_sizes = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5) * np.float32(scale)
    centres = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    return np.concatenate((centres - half_sizes, centres + half_sizes), axis=1).astype(np.int64)


@compiled
def _encode_all(
    probs: NDArray[np.float32], boxes_px: NDArray[np.int64], height: int, width: int, threshold: np.float32
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
    """All strings of an image in one buffer: (characters, N + 1 offsets into them, areas)."""
    num_masks, mask_side = probs.shape[0], probs.shape[1]
    samples = np.zeros((mask_side + 2 * _PAD, mask_side + 2 * _PAD), np.float32)  # [column, row]
    codes = np.empty(256 * num_masks + _MAX_CODE_CHARS, np.uint8)
    offsets = np.zeros(num_masks + 1, np.int64)
    areas = np.empty(num_masks, np.int32)
    end = 0
    for n in range(num_masks):
        for row in range(mask_side):
            for column in range(mask_side):
                samples[column + _PAD, row + _PAD] = probs[n, row, column]
        edges, num_edges = _find_edges(samples, boxes_px[n], height, width, threshold)
        needed = end + (num_edges + 1) * _MAX_CODE_CHARS
        if needed > len(codes):
            grown = np.empty(2 * needed, np.uint8)
            for k in range(end):
                grown[k] = codes[k]
            codes = grown
        end, areas[n] = _write_counts(edges, num_edges, height * width, codes, end)
        offsets[n + 1] = end
    return codes, offsets, areas


@compiled
def _find_edges(
    samples: NDArray[np.float32], box_px: NDArray[np.int64], height: int, width: int, threshold: np.float32
) -> tuple[NDArray[np.int64], int]:
    """Column-major numbers of the pixels at which one mask turns to foreground or back, ascending.

    Returns:
        (edges, num_edges); only edges[:num_edges] mean something. The last may be H·W, one past the end.
    """
    side = samples.shape[0]
    left, top = box_px[0], box_px[1]
    first_column, end_column = max(left, 0), min(box_px[2] + 1, width)
    first_row, end_row = max(top, 0), min(box_px[3] + 1, height)
    num_columns, num_rows = end_column - first_column, end_row - first_row
    if num_columns <= 0 or num_rows <= 0:
        return np.empty(0, np.int64), 0

    x_sample, x_weight = _sample_axis(side, max(box_px[2] + 1 - left, 1), first_column - left, num_columns)
    y_sample, y_weight = _sample_axis(side, max(box_px[3] + 1 - top, 1), first_row - top, num_rows)
    cell_row = np.empty(side + 1, np.int64)  # first pixel row at or below sample j; there cell j begins
    y = 0
    for j in range(side + 1):
        while y < num_rows and y_sample[y] < j:
            y += 1
        cell_row[j] = y

    low, high = threshold - _SAFETY, threshold + _SAFETY
    step_cell, step_kind = np.empty(side, np.int64), np.empty(side, np.int64)
    num_steps = 0
    edges = np.empty(4 * num_columns + num_rows + 2, np.int64)
    num_edges = 0
    for x in range(num_columns):
        left_samples = samples[x_sample[x]]
        right_samples = samples[min(x_sample[x] + 1, side - 1)]
        if x == 0 or x_sample[x] != x_sample[x - 1]:
            num_steps = _plan_strip(left_samples, right_samples, cell_row, low, high, step_cell, step_kind)
        if num_edges + num_rows + 2 > len(edges):  # a column has at most num_rows + 1 edges
            grown = np.empty(2 * len(edges) + num_rows + 2, np.int64)
            for k in range(num_edges):  # scalar loops compile in half the time of slice assignments
                grown[k] = edges[k]
            edges = grown

        column_start = (first_column + x) * height + first_row
        right_weight = x_weight[x]
        left_weight = np.float32(1) - right_weight
        is_inside = False
        for s in range(num_steps):
            j, kind = step_cell[s], step_kind[s]
            if kind == _MIXED:
                below = min(j + 1, side - 1)
                upper = left_samples[j] * left_weight + right_samples[j] * right_weight
                lower = left_samples[below] * left_weight + right_samples[below] * right_weight
                if upper > high and lower > high:
                    kind = _INSIDE
                elif upper < low and lower < low:
                    kind = _OUTSIDE
                else:
                    for y in range(cell_row[j], cell_row[j + 1]):
                        prob = upper * (np.float32(1) - y_weight[y]) + lower * y_weight[y]
                        if (prob > threshold) != is_inside:
                            num_edges = _toggle(edges, num_edges, column_start + y)
                            is_inside = not is_inside
                            if y > cell_row[j]:
                                break  # linear between two samples: the outline crosses a cell once
                    continue
            if (kind == _INSIDE) != is_inside:
                num_edges = _toggle(edges, num_edges, column_start + cell_row[j])
                is_inside = not is_inside
        if is_inside:
            num_edges = _toggle(edges, num_edges, column_start + num_rows)
    return edges, num_edges


@compiled
def _plan_strip(
    left_samples: NDArray[np.float32],
    right_samples: NDArray[np.float32],
    cell_row: NDArray[np.int64],
    low: np.float32,
    high: np.float32,
    step_cell: NDArray[np.int64],
    step_kind: NDArray[np.int64],
) -> int:
    """What to do down every pixel column between two neighbouring sample columns.

    Fills step_cell and step_kind, top to bottom: from cell step_cell[s] on, all pixels are inside, or all are
    outside, or (one cell only) each has to be looked at. Cells that hold no pixel row make no step.

    Returns:
        The number of steps.
    """
    side = len(left_samples)
    num_steps = 0
    for j in range(side):
        if cell_row[j] == cell_row[j + 1]:
            continue
        below = min(j + 1, side - 1)
        corners = (left_samples[j], right_samples[j], left_samples[below], right_samples[below])
        if min(corners) > high:
            kind = _INSIDE
        elif max(corners) < low:
            kind = _OUTSIDE
        else:
            kind = _MIXED
        if kind == _MIXED or num_steps == 0 or step_kind[num_steps - 1] != kind:
            step_cell[num_steps] = j
            step_kind[num_steps] = kind
            num_steps += 1
    return num_steps


@compiled
def _toggle(edges: NDArray[np.int64], num_edges: int, pixel: int) -> int:
    """Add an edge; if it falls on the last, a run goes on from a column's foot to the next head: both go."""
    if num_edges > 0 and edges[num_edges - 1] == pixel:
        return num_edges - 1
    edges[num_edges] = pixel
    return num_edges + 1


@compiled
def _sample_axis(
    side: int, size_px: int, first_px: int, num_px: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Bilinear resizing of `side` samples to `size_px` pixels, for pixels first_px … first_px + num_px - 1.

    Returns:
        For each pixel the sample before it and the weight, 0 to 1, of the sample after it, as PyTorch's
        interpolate with align_corners=False computes them in float32 (ATen, UpSample.h).
    """
    sample = np.empty(num_px, np.int64)
    weight = np.empty(num_px, np.float32)
    scale = np.float32(side) / np.float32(size_px)
    for k in range(num_px):
        position = max(scale * (np.float32(first_px + k) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
        sample[k] = min(int(position), side - 1)
        weight[k] = min(position - np.float32(sample[k]), np.float32(1))
    return sample, weight


@compiled
def _write_counts(
    edges: NDArray[np.int64], num_edges: int, num_pixels: int, codes: NDArray[np.uint8], end: int
) -> tuple[int, int]:
    """Append the runs between edges to codes[end:], spelt as _read_counts describes: (new end, area)."""
    area = 0
    previous = 0
    run, run_before = 0, 0  # of the last two runs
    for k in range(num_edges + 1):
        if k == num_edges and num_edges > 0 and previous == num_pixels:
            break  # the foreground reaches the last pixel
        edge = edges[k] if k < num_edges else num_pixels
        length = edge - previous
        previous = edge
        if k % 2 == 1:
            area += length
        value = length - run_before if k > 2 else length
        run, run_before = length, run
        while True:
            bits = value & 0x1F
            value >>= 5
            is_last = value == (-1 if bits & 0x10 else 0)
            codes[end] = 48 + bits + (0 if is_last else 0x20)
            end += 1
            if is_last:
                break
    return end, area
