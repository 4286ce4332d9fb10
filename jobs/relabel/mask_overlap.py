"""The overlap of masks that are stored as COCO compressed counts, without making a picture of either.

Enters: two columns of count strings and pairs of places in them. Leaves: an IoU for each pair. The runs of
both strings are walked side by side, so a pair costs what its strings are long: about a microsecond for masks
of a hundred characters. All masks of a table are therefore compared, not a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maskrcnn_core.machine_code import compiled

_MAX_CHARS = 7  # of one run, as maskrcnn_core.masks reads them: 35 bits


def mask_ious(
    old: pa.BinaryArray, old_places: NDArray[np.int64], new: pa.BinaryArray, new_places: NDArray[np.int64]
) -> NDArray[np.float32]:
    """IoU of pairs of masks. Releases the GIL.

    Args:
        old, new: count strings, not null.
        old_places, new_places: (P,) of which strings.

    Returns:
        (P,) from 0 to 1; two empty masks, and equal strings, have 1. NaN where the two cover different
        numbers of pixels or one cannot be read.

    Source: cocoapi, common/maskApi.c, rleFrString and rleIou.
    """
    ious = np.empty(len(old_places), np.float32)
    _mask_ious(*_buffers(old), old_places, *_buffers(new), new_places, ious)
    return ious


def _buffers(strings: pa.BinaryArray) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The characters of all strings, and where each begins and ends among them."""
    buffers: Any = strings.buffers()
    _, offsets, characters = buffers
    if offsets is None or characters is None:  # there is no string, or each is empty
        return np.empty(0, np.uint8), np.zeros(len(strings) + 1, np.int32)
    ends = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return np.frombuffer(characters, np.uint8), ends


@compiled
def _mask_ious(
    old: NDArray[np.uint8],
    old_offsets: NDArray[np.int32],
    old_places: NDArray[np.int64],
    new: NDArray[np.uint8],
    new_offsets: NDArray[np.int32],
    new_places: NDArray[np.int64],
    ious: NDArray[np.float32],
) -> None:
    ours, theirs = np.empty(256, np.int64), np.empty(256, np.int64)
    for pair in range(len(ious)):
        first, end = old_offsets[old_places[pair]], old_offsets[old_places[pair] + 1]
        first_new, end_new = new_offsets[new_places[pair]], new_offsets[new_places[pair] + 1]
        is_equal = end - first == end_new - first_new
        for k in range(end - first):
            if not is_equal:
                break
            is_equal = old[first + k] == new[first_new + k]
        if is_equal:
            ious[pair] = 1
            continue
        longest = max(end - first, end_new - first_new)  # a run has a character at least
        if longest > len(ours):
            ours, theirs = np.empty(2 * longest, np.int64), np.empty(2 * longest, np.int64)
        ious[pair] = _iou(
            ours[: _runs(old[first:end], ours)], theirs[: _runs(new[first_new:end_new], theirs)]
        )


@compiled
def _iou(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> float:
    """Of two masks' run lengths, background first; NaN where their sums differ or one has none."""
    if len(ours) == 0 or len(theirs) == 0 or ours.sum() != theirs.sum():
        return np.nan
    shared = union = 0
    i = j = 0
    left, left_new = ours[0], theirs[0]
    while True:
        step = min(left, left_new)
        if i % 2 == 1 and j % 2 == 1:
            shared += step
        if i % 2 == 1 or j % 2 == 1:
            union += step
        left -= step
        left_new -= step
        while left == 0 and i + 1 < len(ours):
            i += 1
            left = ours[i]
        while left_new == 0 and j + 1 < len(theirs):
            j += 1
            left_new = theirs[j]
        if left == 0 or left_new == 0:  # the sums are equal: both are at their end
            return shared / union if union else 1.0


@compiled
def _runs(characters: NDArray[np.uint8], runs: NDArray[np.int64]) -> int:
    """Fill in the run lengths of a count string; how many they are, 0 where it is malformed."""
    num_runs = num_chars = 0
    value = np.int64(0)
    for character in characters:
        bits = np.int64(character) - 48
        if bits < 0 or bits > 63 or num_chars == _MAX_CHARS:
            return 0
        value |= (bits & 31) << (5 * num_chars)
        num_chars += 1
        if bits >= 32:
            continue
        if bits & 16:
            value -= np.int64(1) << (5 * num_chars)
        if num_runs > 2:
            value += runs[num_runs - 2]
        if value < 0:
            return 0
        runs[num_runs] = value
        num_runs += 1
        value, num_chars = np.int64(0), 0
    return 0 if num_chars else num_runs
