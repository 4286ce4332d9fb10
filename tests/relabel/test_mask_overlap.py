"""The overlap of stored masks, jobs/relabel/mask_overlap.py."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from jobs.relabel.mask_overlap import mask_ious
from maskrcnn_core.masks import encode_masks


def ious(old: list[bytes], new: list[bytes]) -> NDArray[np.float32]:
    places = np.arange(len(old))
    return mask_ious(pa.array(old, pa.binary()), places, pa.array(new, pa.binary()), places)


def encoded(rows: list[list[int]]) -> bytes:
    return encode_masks(np.array([rows], np.bool_))[0]


def test_the_overlap_is_shared_pixels_over_pixels_of_either() -> None:
    old = encoded([[0, 1, 1], [0, 1, 0]])
    new = encoded([[0, 1, 0], [0, 1, 1]])
    assert ious([old], [new]).tolist() == [0.5]  # two shared of four


def test_masks_that_touch_nothing_and_empty_ones() -> None:
    left, right, empty = encoded([[1, 0]]), encoded([[0, 1]]), encoded([[0, 0]])
    assert ious([left, left, empty, empty], [right, empty, left, empty]).tolist() == [0, 0, 0, 1]
    assert ious([], []).tolist() == []


def test_it_is_that_of_the_decoded_pixels() -> None:
    rng = np.random.default_rng(6)
    masks = rng.random((40, 23, 31)) < rng.choice([0.02, 0.5, 0.97, 1.0], (40, 1, 1))
    masks[::5] = np.kron(masks[::5, :2, :2], np.ones((12, 16), np.bool_))[:, :23, :31]  # long runs
    strings = pa.array(encode_masks(masks), pa.binary())
    old, new = rng.integers(0, 40, 300), rng.integers(0, 40, 300)
    shared = (masks[old] & masks[new]).sum((1, 2))
    union = (masks[old] | masks[new]).sum((1, 2))
    wanted = np.where(union, shared / np.maximum(union, 1), 1)
    assert mask_ious(strings, old, strings, new) == pytest.approx(wanted, abs=1e-6)
    # A slice of a column begins in the middle of its buffers.
    assert mask_ious(strings[7:], old % 33, strings[7:], new % 33) == pytest.approx(
        mask_ious(strings, old % 33 + 7, strings, new % 33 + 7)
    )


@pytest.mark.parametrize("damaged", [b"", b"o", b"rle of x", b"\x00\xff", b"5N", encoded([[0, 1, 1]])])
def test_a_mask_that_does_not_read_or_is_of_another_size_has_no_overlap(damaged: bytes) -> None:
    assert np.isnan(ious([damaged], [encoded([[0, 1]])])).all()
    assert np.isnan(ious([encoded([[0, 1]])], [damaged])).all()
