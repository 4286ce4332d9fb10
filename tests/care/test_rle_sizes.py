"""Sizes of RLE strings without masks, jobs/care/rle_sizes.py, against pycocotools."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from jobs.care.rle_sizes import MALFORMED, rle_sizes


def sizes(strings: list[bytes]) -> list[tuple[int, int]]:
    pixels, areas = rle_sizes(pa.array(strings, pa.binary()))
    return list(zip(pixels.tolist(), areas.tolist(), strict=True))


def test_sizes_are_those_of_pycocotools_for_random_masks() -> None:
    rng = np.random.default_rng(0)
    strings, wanted = [], []
    for share in (0, 0.001, 0.1, 0.5, 0.9, 1):
        for _ in range(30):
            height, width = rng.integers(1, 90, 2)
            mask = np.asfortranarray(rng.random((height, width)) < share, np.uint8)
            rle: Any = coco_mask.encode(mask)
            strings.append(rle["counts"])
            wanted.append((int(height * width), int(coco_mask.area(rle))))
    assert sizes(strings) == wanted
    sliced, areas = rle_sizes(pa.array([b"", *strings], pa.binary()).slice(1))
    assert list(zip(sliced.tolist(), areas.tolist(), strict=True)) == wanted


def test_no_strings_have_no_sizes() -> None:
    assert sizes([]) == []
    assert sizes([b"", b""]) == [(MALFORMED, MALFORMED)] * 2


@pytest.mark.parametrize(
    "malformed", [b"", b"2 1", b"23p", b"2P", b"2" + b"P" * 8 + b"1", b"O", bytes([200]), b"121K"]
)
def test_a_malformed_string_spoils_no_other(malformed: bytes) -> None:
    """Runs 2, 3, 1 of a 2 × 3 image, as in encode_masks; "O" is a run of -1, "K" a fourth one of 2 - 5."""
    good = (6, 3)
    bad = (MALFORMED, MALFORMED)
    assert sizes([b"231", malformed, b"231"]) == [good, bad, good]
