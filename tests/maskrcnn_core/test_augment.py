"""Augmentation against masks worked out by hand, torch's bilinear resize, and what must always hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskrcnn_core.augment import (
    PADDING,
    Annotations,
    Augmentation,
    Placement,
    apply,
    copy_paste,
    place,
)
from maskrcnn_core.config import r50_fpn
from maskrcnn_core.instance_masks import MaskCrops
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.roi_heads import Instances
from maskrcnn_core.shapes import input_size

JITTER = Augmentation(scale_jitter=(0.1, 2.0), canvas_px=16)
L_SHAPE = """
    #...
    #...
    ##..
    ....
"""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(picture: str) -> NDArray[np.bool_]:
    """A mask from lines of # and dots."""
    return np.array([[c == "#" for c in line] for line in picture.split()])


def annotated(masks: NDArray[np.bool_], ignored: list[bool] | None = None) -> Annotations:
    """Masks (N, H, W) with their tight boxes, of classes 1, 2, …"""
    boxes = [
        (x[0], y[0], x[-1] + 1, y[-1] + 1)
        for x, y in ((np.flatnonzero(m.any(0)), np.flatnonzero(m.any(1))) for m in masks)
    ]
    return Annotations(
        masks.shape[1],
        masks.shape[2],
        np.array(boxes, np.float32).reshape(-1, 4),
        np.arange(1, len(masks) + 1),
        np.array(ignored or [False] * len(masks), np.bool_),
        encode_masks(masks),
    )


def image_of(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def dense(instances: Instances, height: int, width: int) -> NDArray[np.bool_]:
    """(G, h, w), an independent reading of MaskCrops."""
    masks = np.zeros((len(instances.masks), height, width), np.bool_)
    start = 0
    for n, ((y, x), (h, w)) in enumerate(
        zip(instances.masks.corners.tolist(), instances.masks.sizes.tolist(), strict=True)
    ):
        masks[n, y : y + h, x : x + w] = instances.masks.pixels[start : start + h * w].reshape(h, w).numpy()
        start += h * w
    return masks


def applied(placement: Placement, picture: str) -> tuple[NDArray[np.bool_], list[float]]:
    """What becomes of one mask: it and its box."""
    mask = drawn(picture)
    _, instances = apply(placement, image_of(*mask.shape), annotated(mask[None]))
    return dense(instances, *placement.output)[0], instances.boxes[0].tolist()


def test_a_mirror_image_mirrors_mask_and_box() -> None:
    mask, box = applied(Placement((4, 4), True, (0, 0), (4, 4)), L_SHAPE)
    assert mask.tolist() == drawn("...# ...# ..## ....").tolist()
    assert box == [2, 0, 4, 3]


def test_a_crop_cuts_the_mask_and_its_box_becomes_that_of_what_is_left() -> None:
    mask, box = applied(Placement((4, 4), False, (1, 1), (3, 3)), L_SHAPE)
    assert mask.tolist() == drawn("... #.. ...").tolist()
    assert box == [0, 1, 1, 2]


def test_resizing_takes_the_pixel_under_the_centre() -> None:
    mask, box = applied(Placement((8, 4), False, (0, 0), (8, 4)), L_SHAPE)
    assert mask.tolist() == np.repeat(drawn(L_SHAPE), 2, axis=0).tolist()
    assert box == [0, 0, 2, 6]
    # Centres of a half lie between pixels 0 and 1, and 2 and 3; the later one is taken.
    mask, box = applied(Placement((4, 2), False, (0, 0), (4, 2)), ".#.. .#.. #..# ....")
    assert mask.tolist() == drawn("#. #. .# ..").tolist()


def test_a_mask_that_vanishes_takes_its_instance_with_it() -> None:
    mask = drawn(L_SHAPE)
    _, instances = apply(Placement((2, 2), False, (0, 0), (2, 2)), image_of(4, 4), annotated(mask[None]))
    assert len(instances.boxes) == len(instances.class_indices) == len(instances.masks) == 0


def test_a_box_that_is_not_cut_stays_as_it_was_drawn() -> None:
    known = annotated(drawn(L_SHAPE)[None])
    known.boxes[0] = (0.25, 0.5, 1.75, 2.75)
    _, instances = apply(Placement((8, 8), False, (0, 0), (8, 8)), image_of(4, 4), known)
    assert instances.boxes.tolist() == [[0.5, 1.0, 3.5, 5.5]]


def test_ignored_annotations_become_regions_and_no_instances() -> None:
    masks = np.stack((drawn(L_SHAPE), drawn("..## ..## .... ....")))
    known = annotated(masks, ignored=[False, True])
    _, instances = apply(Placement((4, 4), False, (0, 0), (4, 4)), image_of(4, 4), known)
    assert instances.class_indices.tolist() == [1]
    assert instances.ignored_boxes.tolist() == [[2, 0, 4, 2]]


def test_an_image_without_annotations_has_no_instances() -> None:
    known = annotated(np.zeros((0, 4, 4), np.bool_))
    pixels, instances = apply(Placement((4, 4), False, (0, 0), (4, 4)), image_of(4, 4), known)
    assert (pixels == image_of(4, 4)).all()
    assert instances.boxes.shape == instances.ignored_boxes.shape == (0, 4)


def test_annotations_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="4×5 px, its annotations are for 4×4"):
        apply(Placement((4, 4), False, (0, 0), (4, 4)), image_of(4, 5), annotated(drawn(L_SHAPE)[None]))


@pytest.mark.parametrize("size", [(23, 31), (7, 90), (64, 9), (1, 1)])
def test_pixels_are_resized_as_torch_does_bilinearly_without_antialiasing(size: tuple[int, int]) -> None:
    image = image_of(23, 31)
    pixels, _ = apply(Placement(size, False, (0, 0), size), image, annotated(np.zeros((0, 23, 31), np.bool_)))
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(), size, mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    assert np.abs(pixels - wanted.numpy()).max() <= 0.501


@given(st.data())
def test_a_crop_of_the_mirror_image_is_cut_from_the_whole_mirror_image(data: st.DataObject) -> None:
    image = image_of(11, 14)
    resized = data.draw(st.tuples(st.integers(4, 30), st.integers(4, 30)))
    offset = data.draw(st.tuples(st.integers(0, resized[0] - 1), st.integers(0, resized[1] - 1)))
    canvas = data.draw(st.integers(1, 20))
    none = annotated(np.zeros((0, 11, 14), np.bool_))
    whole, _ = apply(Placement(resized, False, (0, 0), resized), image, none)
    part, _ = apply(Placement(resized, True, offset, (canvas, canvas)), image, none)
    wanted = whole[:, ::-1][offset[0] : offset[0] + canvas, offset[1] : offset[1] + canvas]
    assert (part[: len(wanted), : wanted.shape[1]] == wanted).all()
    assert (part[len(wanted) :] == PADDING).all()
    assert (part[:, wanted.shape[1] :] == PADDING).all()


def blobs(draw: st.DrawFn) -> NDArray[np.bool_]:
    """(N, H, W) masks of rectangles with holes, which do not overlap and are not empty."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    label = rng(draw(st.integers(0, 999))).integers(0, draw(st.integers(1, 4)) + 1, (height, width))
    masks = np.stack([label == n for n in range(1, 5)])
    kept: NDArray[np.bool_] = masks[masks.any(axis=(1, 2))]
    return kept


MASKS = st.composite(blobs)()
AUGMENTATIONS = st.sampled_from(
    (
        JITTER,
        Augmentation(scale_jitter=(0.8, 1.25), canvas_px=11),
        Augmentation(shorter_sides=(5, 17), max_size_px=29),
        Augmentation(shorter_sides=(9,), max_size_px=9, flip=0.0),
    )
)


@given(MASKS, AUGMENTATIONS, st.integers(0, 99))
def test_boxes_lie_inside_the_image_and_every_mask_pixel_inside_its_box(
    masks: NDArray[np.bool_], augmentation: Augmentation, seed: int
) -> None:
    height, width = masks.shape[1:]
    placement = place(augmentation, height, width, rng(seed))
    pixels, instances = apply(placement, image_of(height, width), annotated(masks))
    assert pixels.shape == (*placement.output, 3)
    visible_h, visible_w = placement.visible
    for (x0, y0, x1, y1), mask in zip(
        instances.boxes.tolist(), dense(instances, *placement.output), strict=True
    ):
        assert 0 <= x0 <= x1 - 1
        assert 0 <= y0 <= y1 - 1
        assert x1 <= visible_w
        assert y1 <= visible_h
        rows, columns = np.nonzero(mask)
        assert len(rows)
        assert (columns + 0.5 >= x0 - 1e-3).all()
        assert (columns + 0.5 <= x1 + 1e-3).all()
        assert (rows + 0.5 >= y0 - 1e-3).all()
        assert (rows + 0.5 <= y1 + 1e-3).all()


@given(MASKS, st.integers(0, 99))
def test_without_resizing_boxes_are_tight_after_any_crop_and_flip(
    masks: NDArray[np.bool_], seed: int
) -> None:
    height, width = masks.shape[1:]
    random = rng(seed)
    offset = int(random.integers(height)), int(random.integers(width))
    placement = Placement((height, width), bool(random.integers(2)), offset, (8, 8))
    _, instances = apply(placement, image_of(height, width), annotated(masks))
    found = dense(instances, 8, 8)
    wanted = masks[:, :, ::-1] if placement.flip else masks
    wanted = wanted[:, offset[0] : offset[0] + 8, offset[1] : offset[1] + 8]
    wanted = wanted[wanted.any(axis=(1, 2))]
    assert (found[:, : wanted.shape[1], : wanted.shape[2]] == wanted).all()
    assert instances.boxes.tolist() == annotated(found).boxes.tolist()


@pytest.mark.parametrize("size", [(480, 640), (1333, 800), (37, 37), (5, 4000)])
def test_one_shorter_side_gives_the_size_of_inference(size: tuple[int, int]) -> None:
    config = r50_fpn()
    augmentation = Augmentation((config.min_size_px,), config.max_size_px, flip=0.0)
    placement = place(augmentation, *size, rng())
    wanted = input_size(config, *size)
    assert placement == Placement(wanted, False, (0, 0), wanted)


def test_large_scale_jitter_fits_the_image_to_a_share_of_the_canvas_and_crops_or_pads_to_it() -> None:
    augmentation = Augmentation(scale_jitter=(0.1, 2.0), canvas_px=1024)
    placements = [place(augmentation, 480, 640, rng(seed)) for seed in range(2000)]
    factors = np.array([p.resized[1] / 1024 for p in placements])  # of the longer side
    assert 0.1 <= factors.min() < 0.11
    assert 1.99 < factors.max() <= 2.001
    assert abs(factors.mean() - 1.05) < 0.03  # uniform
    assert all(abs(p.resized[0] / p.resized[1] - 0.75) < 0.01 for p in placements)
    assert {p.output for p in placements} == {(1024, 1024)}
    assert abs(np.mean([p.flip for p in placements]) - 0.5) < 0.04
    for p in placements:
        assert 0 <= p.offset[0] <= max(0, p.resized[0] - 1024)
        assert 0 <= p.offset[1] <= max(0, p.resized[1] - 1024)
    largest = [p.offset[1] / (p.resized[1] - 1024) for p in placements if p.resized[1] > 1900]
    assert min(largest) < 0.1
    assert max(largest) > 0.9


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({}, "shorter_sides"),
        ({"shorter_sides": (0,), "max_size_px": 9}, "shorter_sides"),
        ({"shorter_sides": (10,), "max_size_px": 9}, "max_size_px"),
        ({"shorter_sides": (10,)}, "max_size_px"),
        ({"shorter_sides": (8,), "max_size_px": 9, "canvas_px": 9}, "canvas_px"),
        ({"scale_jitter": (0.0, 1.0), "canvas_px": 9}, "scale_jitter"),
        ({"scale_jitter": (2.0, 1.0), "canvas_px": 9}, "scale_jitter"),
        ({"scale_jitter": (0.1, 2.0)}, "canvas_px"),
        ({"scale_jitter": (0.1, 2.0), "canvas_px": 9, "shorter_sides": (8,)}, "shorter_sides"),
        ({"scale_jitter": (0.1, 2.0), "canvas_px": 9, "flip": 1.5}, "flip"),
    ],
)
def test_an_augmentation_that_cannot_be_is_refused(wrong: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"Augmentation.{field} is"):
        Augmentation(**wrong)  # type: ignore[arg-type]


def instances_of(masks: NDArray[np.bool_], first_class: int = 1) -> Instances:
    known = annotated(masks)
    return Instances(
        torch.from_numpy(known.boxes),
        torch.from_numpy(known.class_indices) + first_class - 1,
        MaskCrops.from_dense(torch.from_numpy(masks.astype(np.uint8))),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
    )


def test_a_pasted_object_hides_what_is_below_it() -> None:
    below = np.stack((drawn("###. ###. .... ...."), drawn(".... .... .... ...#")))
    above = drawn(".##. .##. .... ...#")[None]
    image, other = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)
    chosen = rng(3)  # its first number is 0.09: the object is taken
    pasted, both = copy_paste(image, instances_of(below), other, instances_of(above, 7), chosen)
    assert both.class_indices.tolist() == [1, 7]  # the second was hidden whole
    assert dense(both, 4, 4).tolist() == [drawn("#... #... .... ....").tolist(), above[0].tolist()]
    assert both.boxes.tolist() == [[0, 0, 1, 2], [1, 0, 4, 4]]
    assert both.ignored_boxes.tolist() == [[0, 0, 1, 1]]
    assert (pasted[..., 0] == 200 * above[0]).all()
    assert not image.any()


@given(MASKS, st.integers(0, 99))
def test_copy_paste_never_leaves_overlapping_masks_or_loose_boxes(
    masks: NDArray[np.bool_], seed: int
) -> None:
    other = masks[:, ::-1]
    image = image_of(*masks.shape[1:])
    pasted, both = copy_paste(image, instances_of(masks), image[::-1], instances_of(other, 9), rng(seed))
    found = dense(both, *masks.shape[1:])
    assert found.any(axis=(1, 2)).all()
    assert (found.sum(axis=0) <= 1).all()
    assert both.boxes.tolist() == annotated(found).boxes.tolist()
    is_pasted = found[both.class_indices.numpy() >= 9].any(axis=0)
    assert (pasted[is_pasted] == image[::-1][is_pasted]).all()
    assert (pasted[~is_pasted] == image[~is_pasted]).all()


def test_nothing_to_paste_changes_nothing() -> None:
    image, own = image_of(4, 4), instances_of(drawn(L_SHAPE)[None])
    none = instances_of(np.zeros((0, 4, 4), np.bool_))
    pasted, both = copy_paste(image, own, image_of(4, 4, 1), none, rng())
    assert (pasted == image).all()
    assert both.boxes.tolist() == own.boxes.tolist()


def test_images_of_two_sizes_are_not_pasted() -> None:
    own = instances_of(drawn(L_SHAPE)[None])
    with pytest.raises(ValueError, match="wants one size"):
        copy_paste(image_of(4, 4), own, image_of(4, 5), own, rng())
