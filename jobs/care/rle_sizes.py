"""Pixels and area of many COCO RLE strings at once, without making a mask.

Enters: an Arrow array of compressed count strings. Leaves: for each how many pixels its runs cover and how
many of them are foreground, or that it is malformed. maskrcnn_core.masks reads one string; this reads the
strings of thousands of images in whole-array steps, so that a check of every mask costs little beside reading
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_MAX_CHARS = 7  # of one run: 35 bits, more than any image's pixel count
MALFORMED = -1


def rle_sizes(strings: pa.Array[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sum of all runs and sum of the foreground runs of each string.

    Args:
        strings: (N,) binary, no nulls. N may be 0.

    Returns:
        (N,) pixels and (N,) areas, both MALFORMED where a string is none: empty, another character than '0'
        to 'o', cut within a run, or a run that is negative or absurdly long.

    Source: cocoapi, common/maskApi.c (rleFrString): five bits a character, low bits first, 0x20 says that
    more follow, 0x10 of the last is the sign; from the fourth run on the difference to the last but one.
    """
    num_strings = len(strings)
    large = strings.cast(pa.large_binary())
    _, offsets, data = large.buffers()
    if num_strings == 0 or offsets is None or data is None or data.size == 0:
        return np.full(num_strings, MALFORMED, np.int64), np.full(num_strings, MALFORMED, np.int64)
    bounds = np.frombuffer(memoryview(offsets), np.int64)[large.offset : large.offset + num_strings + 1]
    chars = np.frombuffer(memoryview(data), np.uint8)[bounds[0] : bounds[-1]].astype(np.int64) - 48
    starts, ends = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]

    is_bad = starts == ends
    is_foreign = np.concatenate(([0], np.cumsum((chars < 0) | (chars >= 64))))
    is_bad |= is_foreign[ends] > is_foreign[starts]
    is_last = chars < 32
    is_bad[~is_bad] |= ~is_last[ends[~is_bad] - 1]
    if is_bad.any():  # read the good ones alone: a string cut within a run would run into the next
        pixels, areas = (np.full(num_strings, MALFORMED, np.int64) for _ in range(2))
        if not is_bad.all():
            pixels[~is_bad], areas[~is_bad] = rle_sizes(large.filter(pa.array(~is_bad)))
        return pixels, areas

    run_ends = np.flatnonzero(is_last) + 1
    run_starts = np.concatenate(([0], run_ends[:-1]))
    lengths = run_ends - run_starts
    place = np.arange(len(chars)) - np.repeat(run_starts, lengths)
    bits = np.where(place < _MAX_CHARS, (chars & 31) << np.minimum(5 * place, 5 * _MAX_CHARS), 0)
    runs = np.add.reduceat(bits, run_starts)
    runs -= np.where((chars[run_ends - 1] & 16) != 0, np.int64(1) << np.minimum(5 * lengths, 60), 0)

    first_run = np.searchsorted(run_starts, starts)
    num_runs = np.diff(np.concatenate((first_run, [len(runs)])))
    number = np.arange(len(runs)) - np.repeat(first_run, num_runs)  # of a run in its string
    owner = np.repeat(np.arange(num_strings), num_runs)
    runs[number % 2 == 1] = _sums_within(runs[number % 2 == 1], owner[number % 2 == 1])
    is_even = (number % 2 == 0) & (number > 0)  # the first run stands alone
    runs[is_even] = _sums_within(runs[is_even], owner[is_even])

    pixels = np.add.reduceat(runs, first_run)
    areas = np.add.reduceat(np.where(number % 2 == 1, runs, 0), first_run)
    is_bad = np.logical_or.reduceat((runs < 0) | (lengths > _MAX_CHARS), first_run)
    pixels[is_bad] = areas[is_bad] = MALFORMED
    return pixels, areas


def _sums_within(values: NDArray[np.int64], owner: NDArray[np.intp]) -> NDArray[np.int64]:
    """Cumulative sums that begin anew with each owner; owners ascend."""
    if len(values) == 0:
        return values
    sums = np.cumsum(values)
    is_first = np.concatenate(([True], owner[1:] != owner[:-1]))
    before = np.where(is_first, sums - values, 0)[is_first]
    return np.asarray(sums - np.repeat(before, np.diff(np.append(np.flatnonzero(is_first), len(values)))))
