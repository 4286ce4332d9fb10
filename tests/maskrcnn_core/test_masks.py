"""Run-length encoding against hand-worked strings, pycocotools, and torchvision's paste."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn_core.masks import (
    decode_rle,
    decode_rle_crop,
    encode_mask_probs,
    encode_masks,
    rle_area,
    rle_num_pixels,
)

Probs = NDArray[np.float32]
Boxes = NDArray[np.float32]
Masks = NDArray[np.bool_]

TIE = 1e-6  # a mask with a value this close to the threshold may differ by the order of float32 sums


def coco_encode(masks: Masks) -> list[bytes]:
    return [bytes(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]) for mask in masks]  # type: ignore[arg-type]  # bytes, whatever the stub says


def paste(probs: Probs, boxes: Boxes, height: int, width: int) -> NDArray[np.float32]:
    """(N, H, W) float32 as torchvision pastes it."""
    pasted: torch.Tensor = paste_masks_in_image(
        torch.from_numpy(probs)[:, None], torch.from_numpy(boxes), (height, width)
    )
    values: NDArray[np.float32] = pasted[:, 0].numpy()
    return values


def make_probs(num_masks: int, side: int, kind: str, seed: int) -> Probs:
    """`blobs`: one outline or a few, as networks give; `noise`: every cell crosses; `steps`: 0 and 1 only."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.random((num_masks, side, side), dtype=np.float32)
    coarse = torch.from_numpy(rng.normal(size=(num_masks, 1, 6, 6)).astype(np.float32))
    field = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0].numpy()
    y, x = np.mgrid[:side, :side] / max(side - 1, 1) * 2 - 1
    logits: NDArray[np.float64] = 8 * (0.8 - np.hypot(x, y)) + 3 * field
    if kind == "steps":
        return (logits > 0).astype(np.float32)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def make_boxes(num_boxes: int, height: int, width: int, seed: int) -> Boxes:
    """Boxes of all sizes from a fraction of a pixel to twice the image; half of them stick out of it."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(0.5), np.log([2 * width, 2 * height]), (num_boxes, 2)))
    sizes[rng.random((num_boxes, 2)) < 0.1] = 1  # 1 px wide or high
    centres = rng.uniform(0, [width, height], (num_boxes, 2))
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1).astype(np.float32)


def cases() -> Iterator[tuple[str, int, int, int, int, float]]:
    """kind, N, M, height, width, threshold: 6,000 masks in all."""
    for height, width in ((120, 160), (97, 31), (60, 200), (1, 50), (50, 1), (1, 1)):
        for kind in ("blobs", "noise", "steps"):
            yield kind, 240, 28, height, width, 0.5
    yield "blobs", 60, 28, 480, 640, 0.5
    for side in (1, 2, 3, 7, 14, 56):
        yield "blobs", 100, side, 90, 120, 0.5
    for threshold in (0.0, 0.05, 0.3, 0.7, 0.999, 1.0):
        yield "blobs", 100, 28, 90, 120, threshold
        yield "noise", 33, 28, 90, 120, threshold


class TestEncodeMaskProbs:
    def test_strings_and_areas_are_those_of_paste_threshold_and_pycocotools(self) -> None:
        compared = tied = 0
        for seed, (kind, num_masks, side, height, width, threshold) in enumerate(cases()):
            probs = make_probs(num_masks, side, kind, seed)
            boxes = make_boxes(num_masks, height, width, seed)
            rles, areas = encode_mask_probs(probs, boxes, height, width, threshold)
            values = paste(probs, boxes, height, width)
            is_clear = (np.abs(values - np.float32(threshold)) > TIE).all(axis=(1, 2))
            if threshold in (
                0,
                1,
            ):  # plain background and foreground stand on the threshold, exactly on both sides
                is_clear = np.ones(num_masks, bool)
            expected = coco_encode(values > np.float32(threshold))
            for n in np.flatnonzero(is_clear):
                assert rles[n] == expected[n], (kind, side, height, width, threshold, boxes[n])
                assert areas[n] == (values[n] > np.float32(threshold)).sum()
            for n in np.flatnonzero(~is_clear):
                differs = decode_rle(rles[n], height, width) != (values[n] > np.float32(threshold))
                assert (np.abs(values[n][differs] - np.float32(threshold)) <= TIE).all()
            compared += int(is_clear.sum())
            tied += int((~is_clear).sum())
        assert compared >= 5000
        assert tied < 0.1 * compared

    def test_a_full_square_fills_its_box(self) -> None:
        # M = 2 and the ring of zeros: samples 0, 1, 1, 0 over a box twice as large, 0 to 7, so the pixels of
        # a row are 0, ¼, ¾, 1, 1, ¾, ¼, 0. The corners are ¾·¾ > ½.
        box = np.array([[1.75, 1.75, 5.25, 5.25]], np.float32)
        rles, areas = encode_mask_probs(np.ones((1, 2, 2), np.float32), box, 8, 8)
        expected = np.zeros((8, 8), bool)
        expected[2:6, 2:6] = True
        np.testing.assert_array_equal(decode_rle(rles[0], 8, 8), expected)
        assert areas.tolist() == [16]
        assert areas.dtype == np.int32

    def test_an_image_without_detections_has_no_masks(self) -> None:
        rles, areas = encode_mask_probs(
            np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), 480, 640
        )
        assert rles == []
        assert areas.shape == (0,)

    @pytest.mark.parametrize(
        "box",
        [
            [-50, 10, -20, 40],
            [10, -50, 40, -20],
            [300, 10, 340, 40],
            [10, 300, 40, 340],
            [1e9, 1e9, 1e9, 1e9],
            [60, 40, 20, 10],
        ],
    )
    def test_a_box_outside_the_image_or_inside_out_has_an_empty_mask(self, box: list[float]) -> None:
        rles, areas = encode_mask_probs(
            np.ones((1, 28, 28), np.float32), np.array([box], np.float32), 100, 200
        )
        assert rles == coco_encode(np.zeros((1, 100, 200), bool))
        assert areas.tolist() == [0]

    def test_a_box_far_larger_than_the_image_covers_it(self) -> None:
        box = np.array([[-1e9, -1e9, 1e9, 1e9]], np.float32)
        rles, areas = encode_mask_probs(np.ones((1, 28, 28), np.float32), box, 60, 80)
        assert rles == coco_encode(np.ones((1, 60, 80), bool))
        assert areas.tolist() == [4800]

    def test_a_mask_of_nothing_but_ties_does_not_overrun(self) -> None:
        for value in (0.5, np.nextafter(np.float32(0.5), np.float32(1))):
            probs = np.full((2, 28, 28), value, np.float32)
            rles, areas = encode_mask_probs(probs, np.array([[0, 0, 399, 299]] * 2, np.float32), 300, 400)
            assert [rle_area(rle) for rle in rles] == areas.tolist()

    def test_arrays_need_not_be_contiguous_or_writable(self) -> None:
        probs, boxes = make_probs(6, 28, "blobs", 1), make_boxes(6, 50, 70, 1)
        expected = encode_mask_probs(probs, boxes, 50, 70)[0]
        assert (
            encode_mask_probs(np.repeat(probs, 2, axis=0)[::2], np.repeat(boxes, 2, axis=0)[::2], 50, 70)[0]
            == expected
        )
        probs.setflags(write=False)
        boxes.setflags(write=False)
        assert encode_mask_probs(probs, boxes, 50, 70)[0] == expected

    def test_threads_give_the_same_strings(self) -> None:
        probs, boxes = make_probs(50, 28, "blobs", 2), make_boxes(50, 200, 300, 2)
        expected = encode_mask_probs(probs, boxes, 200, 300)[0]
        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(encode_mask_probs, probs, boxes, 200, 300) for _ in range(64)]
            assert all(run.result()[0] == expected for run in runs)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nan_and_infinity_are_refused(self, value: float) -> None:
        probs, boxes = make_probs(3, 28, "blobs", 3), make_boxes(3, 50, 50, 3)
        bad_boxes, bad_probs = boxes.copy(), probs.copy()
        bad_boxes[1, 2] = value
        bad_probs[2, 5, 6] = value
        with pytest.raises(ValueError, match="boxes hold NaN"):
            encode_mask_probs(probs, bad_boxes, 50, 50)
        with pytest.raises(ValueError, match="probs hold NaN"):
            encode_mask_probs(bad_probs, boxes, 50, 50)

    def test_what_does_not_fit_is_refused(self) -> None:
        probs, boxes = make_probs(3, 28, "blobs", 4), make_boxes(3, 50, 50, 4)
        with pytest.raises(ValueError, match="one box for each mask"):
            encode_mask_probs(probs, boxes[:2], 50, 50)
        with pytest.raises(ValueError, match=r"want \(N, M, M\)"):
            encode_mask_probs(probs[:, :14], boxes, 50, 50)
        with pytest.raises(ValueError, match=r"want \(N, M, M\)"):
            encode_mask_probs(probs[:, None], boxes, 50, 50)
        with pytest.raises(ValueError, match="at least one pixel"):
            encode_mask_probs(probs, boxes, 0, 50)
        for threshold in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="threshold"):
                encode_mask_probs(probs, boxes, 50, 50, threshold)
        with pytest.raises(TypeError, match="probs are float64"):
            encode_mask_probs(probs.astype(np.float64), boxes, 50, 50)
        with pytest.raises(TypeError, match="boxes are int64"):
            encode_mask_probs(probs, boxes.astype(np.int64), 50, 50)


class TestEncodeMasks:
    def test_runs_go_down_the_columns(self) -> None:
        mask = np.array([[[0, 1, 1], [0, 1, 0]]], bool)
        assert encode_masks(mask) == [b"231"]  # runs 2, 3, 1; a run below 16 is one character from '0' on

    @pytest.mark.parametrize("shape", [(4, 5, 7), (3, 1, 1), (3, 1, 9), (3, 9, 1), (2, 97, 131), (0, 5, 5)])
    @pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
    def test_strings_are_those_of_pycocotools(self, shape: tuple[int, int, int], density: float) -> None:
        masks = np.random.default_rng(0).random(shape) < density
        assert encode_masks(masks) == coco_encode(masks)

    def test_decoding_undoes_encoding(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(200):
            height, width = rng.integers(1, 40, 2)
            mask = rng.random((height, width)) < rng.random()
            (rle,) = encode_masks(mask[np.newaxis])
            decoded = decode_rle(rle, height, width)
            np.testing.assert_array_equal(decoded, mask)
            assert decoded.flags.c_contiguous
            assert rle_area(rle) == mask.sum()

    def test_only_bool_masks_are_taken(self) -> None:
        with pytest.raises(TypeError, match="threshold probabilities first"):
            encode_masks(np.zeros((1, 2, 2), np.uint8))
        with pytest.raises(ValueError, match=r"want \(N, H, W\)"):
            encode_masks(np.zeros((2, 2), bool))


class TestDecodeRle:
    def test_long_runs_and_negative_differences_are_read(self) -> None:
        mask = np.zeros((1000, 1200), bool)
        mask[300:900, 7] = mask[:, 500:1100] = mask[3, 1150] = True
        (rle,) = coco_encode(mask[np.newaxis])
        np.testing.assert_array_equal(decode_rle(rle, 1000, 1200), mask)

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            (b"", "empty"),
            (b"2 1", "byte 0x20 at 1"),
            (b"23\xff", "byte 0xff at 2"),
            (b"23Q", "in the middle of a run"),
            (b"oooooooo0", "run of 9 characters"),
            (b"O", "run of -1 pixels"),
            (b"2322M", "run of -1 pixels"),
        ],
    )
    def test_a_malformed_string_is_refused(self, counts: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            rle_area(counts)

    def test_a_string_of_another_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match="covers 6 pixels; an image of 2×4 has 8"):
            decode_rle(b"231", 2, 4)

    def test_damaged_strings_end_in_a_mask_or_a_value_error(self) -> None:
        rng = np.random.default_rng(2)
        (rle,) = encode_masks(rng.random((1, 30, 30)) < 0.3)
        for _ in range(500):
            damaged = bytearray(rle)
            damaged[rng.integers(0, len(rle))] = rng.integers(0, 256)
            try:
                decoded = decode_rle(bytes(damaged), 30, 30)
            except ValueError:
                continue
            assert decoded.shape == (30, 30)


def test_a_crop_of_the_runs_is_that_of_the_decoded_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 20, 2).tolist()
        mask = rng.random((height, width)) < rng.choice([0.05, 0.5, 0.95])
        (rle,) = encode_masks(mask[None])
        assert rle_num_pixels(rle) == height * width
        y0, y1 = sorted(rng.integers(0, height + 1, 2).tolist())
        x0, x1 = sorted(rng.integers(0, width + 1, 2).tolist())
        crop = decode_rle_crop(rle, height, y0, x0, y1, x1)
        assert crop.flags.c_contiguous
        assert crop.shape == (y1 - y0, x1 - x0)
        assert (crop == mask[y0:y1, x0:x1]).all()


def test_a_crop_is_refused_where_the_runs_end_before_it_or_the_rectangle_is_none() -> None:
    (rle,) = encode_masks(np.eye(4, dtype=np.bool_)[None])
    assert decode_rle_crop(rle, 4, 0, 0, 4, 4).tolist() == np.eye(4, dtype=np.bool_).tolist()
    with pytest.raises(ValueError, match="ends before the rectangle"):
        decode_rle_crop(rle, 4, 0, 0, 4, 5)
    with pytest.raises(ValueError, match="rows 3 to 2"):
        decode_rle_crop(rle, 4, 3, 0, 2, 4)
    with pytest.raises(ValueError, match="of 4 rows"):
        decode_rle_crop(rle, 4, 0, 0, 5, 4)


def test_a_crop_of_damaged_runs_is_some_mask_or_a_value_error() -> None:
    rng = np.random.default_rng(1)
    (rle,) = encode_masks(rng.random((1, 30, 30)) < 0.3)
    refused = 0
    for _ in range(500):
        damaged = bytearray(rle)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, len(rle))] = rng.integers(0, 256)
        try:
            assert decode_rle_crop(bytes(damaged), 30, 3, 2, 28, 29).shape == (25, 27)
        except ValueError:
            refused += 1
    assert 100 < refused < 500


def test_masks_are_encoded_where_no_file_can_be_written(tmp_path: Path) -> None:
    """A read-only installation and no home: numba finds no place for machine code, and says so at import."""
    source = Path(sys.modules[encode_masks.__module__].__file__ or "")
    package = tmp_path / "maskrcnn_core"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("masks.py", "machine_code.py"):
        (package / name).write_bytes((source.parent / name).read_bytes())
    (package / "__pycache__").touch()  # a file where numba wants a folder: holds for root too
    script = "import numpy, maskrcnn_core.masks as m; print(m.encode_masks(numpy.ones((1, 2, 2), bool)))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[b'04']", done.stderr
