"""Which detections of two sets are the same object: one to one, by the overlap of their boxes.

Enters: the detections of many images under an old and a new model. Leaves: pairs of them. No loop goes over
images or detections: a million images of ten objects take seconds.

Letters: I images, N old and M new detections of all of them, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Pairs of one image that are compared at a time: some ten arrays of so many numbers stay in a core's cache.
_PAIRS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Objects:
    """Detections of I images, one image after the other.

    offsets: (I + 1,) int64; image i has the detections offsets[i] to offsets[i + 1].
    categories: (N,) int32; boxes: (N, 4) float32, x0 y0 x1 y1, absolute pixels.
    """

    offsets: NDArray[np.int64]
    categories: NDArray[np.int32]
    boxes: NDArray[np.float32]

    @property
    def images(self) -> NDArray[np.int64]:
        """(N,) the image that each detection is of."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class Matches:
    """P pairs, sorted by `old`; no detection is in two of them.

    old, new: (P,) int64, places among the N and the M detections; ious: (P,) float32, of the boxes.
    """

    old: NDArray[np.int64]
    new: NDArray[np.int64]
    ious: NDArray[np.float32]


def match_objects(old: Objects, new: Objects, min_iou: float) -> Matches:
    """Pair the detections of each image whose boxes overlap by min_iou or more, best overlap first.

    Pairs of one category come first; what is left is then paired across categories: the same object under
    another name. Equal overlaps are taken in the order of the detections.

    Args:
        old, new: of the same I images in the same order.
        min_iou: above 0, at most 1.
    """
    assert len(old.offsets) == len(new.offsets), "different images"
    parts = [_pairs(old, new, first, end, min_iou) for first, end in _spans(old, new)]
    ours = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
    theirs = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int64)])
    ious = np.concatenate([part[2] for part in parts] or [np.empty(0, np.float32)])
    is_other = old.categories[ours] != new.categories[theirs]
    order = np.lexsort((theirs, ours, -ious, is_other))
    chosen = order[_greedy(ours[order], theirs[order], len(old.categories), len(new.categories))]
    chosen = chosen[np.argsort(ours[chosen])]
    return Matches(ours[chosen], theirs[chosen], ious[chosen])


def _spans(old: Objects, new: Objects) -> Iterator[tuple[int, int]]:
    """Runs of images, first and end, of about _PAIRS_AT_ONCE pairs: at least one image each."""
    pairs = np.cumsum(np.diff(old.offsets) * np.diff(new.offsets))
    first, done = 0, 0
    while first < len(pairs):
        end = max(first + 1, int(np.searchsorted(pairs, done + _PAIRS_AT_ONCE, side="right")))
        yield first, end
        first, done = end, int(pairs[end - 1])


def _pairs(
    old: Objects, new: Objects, first: int, end: int, min_iou: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """All pairs (old, new, IoU) within images first to end whose boxes overlap enough."""
    num_old, num_new = np.diff(old.offsets[first : end + 1]), np.diff(new.offsets[first : end + 1])
    num_partners = np.repeat(num_new, num_old)  # of each old detection
    ours = np.repeat(np.arange(old.offsets[first], old.offsets[end]), num_partners)
    ends = np.cumsum(num_partners)
    shifts = np.repeat(new.offsets[first:end], num_old) - (ends - num_partners)
    theirs = np.arange(len(ours)) + np.repeat(shifts, num_partners)
    ious = _ious(old.boxes, ours, new.boxes, theirs)
    keep = np.flatnonzero(ious >= min_iou)
    return ours[keep], theirs[keep], ious[keep]


def _ious(
    old_boxes: NDArray[np.float32],
    ours: NDArray[np.int64],
    new_boxes: NDArray[np.float32],
    theirs: NDArray[np.int64],
) -> NDArray[np.float32]:
    """IoU of pairs of boxes, 0 for boxes without an area."""
    x0, y0, x1, y1 = (old_boxes[:, side][ours] for side in range(4))
    a0, b0, a1, b1 = (new_boxes[:, side][theirs] for side in range(4))
    widths = np.minimum(x1, a1) - np.maximum(x0, a0)
    heights = np.minimum(y1, b1) - np.maximum(y0, b0)
    shared = np.maximum(widths, 0) * np.maximum(heights, 0)
    union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared
    ious: NDArray[np.float32] = np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)
    return ious


def _greedy(
    ours: NDArray[np.int64], theirs: NDArray[np.int64], num_old: int, num_new: int
) -> NDArray[np.int64]:
    """Take pairs in their order, each unless one of its two is taken already; the places of those taken.

    In each round all pairs are taken that are the first left of both of their two. None that comes before
    such a pair could have kept it from being taken, so the result is that of going through them one by one.
    """
    taken = []
    left = np.arange(len(ours))
    first_of_old = np.empty(num_old, np.int64)
    first_of_new = np.empty(num_new, np.int64)
    is_used_old = np.zeros(num_old, np.bool_)
    is_used_new = np.zeros(num_new, np.bool_)
    while len(left):
        # Of places that are assigned to one element, the last stays: backwards, the first.
        backwards = left[::-1]
        first_of_old[ours[backwards]] = backwards
        first_of_new[theirs[backwards]] = backwards
        won = left[(first_of_old[ours[left]] == left) & (first_of_new[theirs[left]] == left)]
        taken.append(won)
        is_used_old[ours[won]] = True
        is_used_new[theirs[won]] = True
        left = left[~(is_used_old[ours[left]] | is_used_new[theirs[left]])]
    return np.concatenate(taken) if taken else left
