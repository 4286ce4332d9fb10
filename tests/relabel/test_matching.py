"""Pairs of detections, jobs/relabel/matching.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.relabel import matching
from jobs.relabel.matching import Objects, match_objects

Detection = tuple[int, float, float, float, float]  # category, x0, y0, x1, y1


def objects(images: Sequence[Sequence[Detection]]) -> Objects:
    flat = [detection for image in images for detection in image]
    return Objects(
        np.cumsum([0, *map(len, images)], dtype=np.int64),
        np.array([detection[0] for detection in flat], np.int32),
        np.array([detection[1:] for detection in flat], np.float32).reshape(-1, 4),
    )


def pairs(
    old: Sequence[Sequence[Detection]], new: Sequence[Sequence[Detection]], min_iou: float = 0.5
) -> list[tuple[int, int, Any]]:
    found = match_objects(objects(old), objects(new), min_iou)
    return list(zip(found.old.tolist(), found.new.tolist(), found.ious.tolist(), strict=True))


def one_by_one(
    old: Sequence[Sequence[Detection]], new: Sequence[Sequence[Detection]], min_iou: float
) -> set[tuple[int, int]]:
    """The same by a loop over images and sorted candidates, with nothing shared but the definition."""
    matched: set[tuple[int, int]] = set()
    old_start = new_start = 0
    for ours, theirs in zip(old, new, strict=True):
        candidates = []
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                width = np.float32(min(a[3], b[3])) - np.float32(max(a[1], b[1]))
                height = np.float32(min(a[4], b[4])) - np.float32(max(a[2], b[2]))
                if width <= 0 or height <= 0:
                    continue
                areas = [(d[3] - d[1]) * (d[4] - d[2]) for d in (a, b)]
                iou = np.float32(width * height) / np.float32(sum(areas) - width * height)
                if iou >= min_iou:
                    candidates.append((a[0] != b[0], -iou, i, j))
        free_old, free_new = set(range(len(ours))), set(range(len(theirs)))
        for _, _, i, j in sorted(candidates):
            if i in free_old and j in free_new:
                free_old.remove(i)
                free_new.remove(j)
                matched.add((old_start + i, new_start + j))
        old_start += len(ours)
        new_start += len(theirs)
    return matched


def test_the_overlap_of_two_boxes_is_their_shared_area_over_that_of_both() -> None:
    # 10 x 10 and 10 x 10, shifted by 2: 80 shared of 120.
    assert pairs([[(1, 0, 0, 10, 10)]], [[(1, 2, 0, 12, 10)]]) == [(0, 0, pytest.approx(80 / 120))]
    assert pairs([[(1, 0, 0, 10, 10)]], [[(1, 2, 0, 12, 10)]], min_iou=0.7) == []


def test_the_best_overlap_is_taken_first_and_each_detection_once() -> None:
    old = [[(1, 0, 0, 10, 10), (1, 1, 0, 11, 10)]]
    new = [[(1, 1, 0, 11, 10), (1, 3, 0, 13, 10)]]
    # Old 1 is new 0 exactly, which leaves new 1 for old 0, 70 of 130: too little here.
    assert pairs(old, new, 0.55) == [(1, 0, 1.0)]
    assert pairs(old, new, 0.5) == [(0, 1, pytest.approx(70 / 130)), (1, 0, 1.0)]


def test_one_category_comes_before_a_better_overlap_of_another() -> None:
    old = [[(1, 0, 0, 10, 10)]]
    new = [[(2, 0, 0, 10, 10), (1, 2, 0, 12, 10)]]
    assert pairs(old, new) == [(0, 1, pytest.approx(80 / 120))]


def test_what_is_left_is_paired_across_categories() -> None:
    assert pairs([[(1, 0, 0, 10, 10)]], [[(2, 0, 0, 10, 10)]]) == [(0, 0, 1.0)]


def test_boxes_of_different_images_are_never_paired() -> None:
    box = (1, 0.0, 0.0, 10.0, 10.0)
    assert pairs([[box], [], [box]], [[], [box], [box]]) == [(1, 1, 1.0)]


@pytest.mark.parametrize("images", [[], [[]], [[], [], []]])
def test_nothing_is_paired_where_nothing_is(images: list[list[Detection]]) -> None:
    assert pairs(images, images) == []


def test_a_box_without_an_area_overlaps_nothing_not_even_itself() -> None:
    assert pairs([[(1, 5, 5, 5, 9)]], [[(1, 5, 5, 5, 9)]]) == []


boxes = st.builds(
    lambda category, x, y, width, height: (category, x / 1, y / 1, (x + width) / 1, (y + height) / 1),
    st.integers(1, 3),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 6),
)
images_of_both = st.lists(st.tuples(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6)), max_size=6)


@settings(max_examples=60)
@given(images_of_both, st.sampled_from([0.1, 0.5, 0.75, 1.0]), st.sampled_from([1, 7, 1 << 17]))
def test_pairs_are_those_of_going_through_them_one_by_one(
    images: list[tuple[list[Detection], list[Detection]]], min_iou: float, at_once: int
) -> None:
    old, new = [image[0] for image in images], [image[1] for image in images]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_PAIRS_AT_ONCE", at_once)
        assert {pair[:2] for pair in pairs(old, new, min_iou)} == one_by_one(old, new, min_iou)


def test_a_chain_in_which_every_pair_waits_for_the_next_is_matched_as_one_by_one() -> None:
    # Boxes of both in turn, ever closer to the one before: only the last two are each other's best.
    places = np.cumsum(np.linspace(3, 2, 40)).tolist()
    boxes = [(1, place, 0.0, place + 10, 10.0) for place in places]
    old, new = [boxes[0::2]], [boxes[1::2]]
    assert {pair[:2] for pair in pairs(old, new)} == one_by_one(old, new, 0.5) == {(n, n) for n in range(20)}
