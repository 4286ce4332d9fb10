"""Masks as crops, and the mask targets cut out of them, against torchvision's RoIAlign on dense masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import roi_align

from maskrcnn_core.instance_masks import MaskCrops, align_crops


def on_dense_masks(masks: Tensor, index: Tensor, boxes: Tensor, side: int, aligned: bool) -> Tensor:
    rois = torch.cat((index[:, None].to(boxes), boxes), dim=1)
    found: Tensor = roi_align(masks[:, None].float(), rois, side, 1.0, aligned=aligned)[:, 0]
    return found


def dense(crops: MaskCrops, height: int, width: int) -> Tensor:
    masks = torch.zeros(len(crops), height, width, dtype=torch.uint8)
    start = 0
    for mask, (y, x), (h, w) in zip(masks, crops.corners.tolist(), crops.sizes.tolist(), strict=True):
        mask[y : y + h, x : x + w] = crops.pixels[start : start + h * w].reshape(h, w)
        start += h * w
    return masks


def test_crops_lie_one_after_another_row_by_row() -> None:
    crops = MaskCrops.from_crops([(2, 3, np.array([[1, 0, 1], [0, 1, 1]])), (0, 1, torch.tensor([[True]]))])
    assert crops.pixels.tolist() == [1, 0, 1, 0, 1, 1, 1]
    assert crops.pixels.dtype == torch.uint8
    assert crops.corners.tolist() == [[2, 3], [0, 1]]
    assert crops.sizes.tolist() == [[2, 3], [1, 1]]
    assert len(crops) == 2


def test_whatever_is_not_zero_is_inside() -> None:
    assert MaskCrops.from_crops([(0, 0, np.array([[255, 0, 0.5]]))]).pixels.tolist() == [1, 0, 1]


def test_dense_masks_are_cropped_to_their_tight_boxes() -> None:
    masks = torch.zeros(3, 5, 6, dtype=torch.uint8)
    masks[0, 1, 2] = masks[0, 3, 5] = 1
    masks[2, 4, 0] = 1
    crops = MaskCrops.from_dense(masks)
    assert crops.corners.tolist() == [[1, 2], [0, 0], [4, 0]]
    assert crops.sizes.tolist() == [[3, 4], [0, 0], [1, 1]]
    assert crops.pixels.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert torch.equal(dense(crops, 5, 6), masks)


def test_no_instances_make_no_crops() -> None:
    for crops in (MaskCrops.from_crops([]), MaskCrops.from_dense(torch.zeros(0, 4, 5))):
        assert len(crops) == 0
        assert crops.pixels.shape == (0,)
        assert crops.corners.shape == crops.sizes.shape == (0, 2)
        nothing = align_crops(crops, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 28, True, (4, 5))
        assert nothing.shape == (0, 28, 28)


def test_crops_that_do_not_fit_together_are_refused() -> None:
    two = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="2 pixels, and there are 3"):
        MaskCrops(torch.zeros(3, dtype=torch.uint8), two, two)
    with pytest.raises(ValueError, match=r"pixels are \(2,\) float32"):
        MaskCrops(torch.zeros(2), two, two)
    with pytest.raises(ValueError, match=r"sizes are \(1, 2\) float32"):
        MaskCrops(torch.zeros(2, dtype=torch.uint8), two, two.float())
    with pytest.raises(ValueError, match=r"mask 0 has shape \(3,\)"):
        MaskCrops.from_crops([(0, 0, np.ones(3))])


def test_crops_move_to_another_device_as_a_whole() -> None:
    moved = MaskCrops.from_crops([(0, 0, np.ones((2, 2)))]).to("meta")
    assert {moved.pixels.device.type, moved.corners.device.type, moved.sizes.device.type} == {"meta"}


BOX = torch.tensor([[8.0, 8.0, 24.0, 24.0]])


def half_of_the_box() -> MaskCrops:
    """The first is far away; the second fills the left half of BOX."""
    return MaskCrops.from_crops([(0, 0, np.ones((3, 3))), (8, 8, np.ones((16, 8)))])


def test_a_mask_target_is_the_mask_inside_its_box() -> None:
    target = align_crops(half_of_the_box(), torch.tensor([1]), BOX, 4, False, (32, 32))
    # The last row reaches half a pixel below the mask: RoIAlign as torchvision trains with it, not aligned.
    assert target[0, :, 0].tolist() == [1, 1, 1, 0.875]
    assert target[0, :, 3].tolist() == [0, 0, 0, 0]
    masks = dense(half_of_the_box(), 32, 32)
    assert torch.equal(target, project_masks_on_boxes(masks, BOX, torch.tensor([1]), 4))


def test_an_aligned_mask_target_ends_where_the_mask_does() -> None:
    target = align_crops(half_of_the_box(), torch.tensor([1]), BOX, 4, True, (32, 32))
    assert target[0, :, 0].tolist() == [1, 1, 1, 1]
    assert target[0, :, 3].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("aligned", [False, True])
def test_a_mask_that_ends_at_the_border_fills_its_box(aligned: bool) -> None:
    """There RoIAlign repeats the last row and column, so nothing fades out: hence the image's size."""
    crops = MaskCrops.from_crops([(4, 4, np.ones((12, 16)))])
    box = torch.tensor([[4.0, 4.0, 20.0, 16.0]])
    assert (align_crops(crops, torch.tensor([0]), box, 4, aligned, (16, 20)) == 1).all()
    further = align_crops(crops, torch.tensor([0]), box, 4, False, (17, 21))
    assert further[0, 3, 3] == pytest.approx((5 / 6) * (7 / 8))  # 3 and 4 samples a bin, the last halved


@pytest.mark.parametrize("aligned", [False, True])
def test_mask_targets_are_those_of_dense_masks(aligned: bool) -> None:
    """RoIs in the crop, around it, beside it, beyond the image; crops with holes, and one that is empty."""
    torch.manual_seed(0)
    masks = torch.zeros(4, 60, 80, dtype=torch.uint8)
    masks[0, 10:50, 20:70] = torch.randint(0, 2, (40, 50))
    masks[1, 20:, 40:] = 1
    masks[2, :30, :1] = 1
    corners = torch.rand(300, 2) * torch.tensor([110.0, 90.0]) - 20
    boxes = torch.cat((corners, corners + torch.rand(300, 2) * 60), dim=1)
    index = torch.arange(300) % 4
    found = align_crops(MaskCrops.from_dense(masks), index, boxes, 14, aligned, (60, 80))
    torch.testing.assert_close(found, on_dense_masks(masks, index, boxes, 14, aligned), rtol=0, atol=1e-6)
    assert found[2::4].any()
    assert not found[3::4].any()


def test_mask_targets_do_not_depend_on_the_number_of_threads() -> None:
    crops, boxes = half_of_the_box(), BOX + torch.rand(64, 1)
    index = torch.ones(64, dtype=torch.int64)
    one = align_crops(crops, index, boxes, 28, False, (32, 32))
    torch.set_num_threads(2)
    assert torch.equal(align_crops(crops, index, boxes, 28, False, (32, 32)), one)


pixels = st.integers(0, 12)
coordinates = st.floats(-6, 20, width=32)


@settings(max_examples=60, deadline=None)
@given(
    crop=st.tuples(pixels, pixels, st.integers(0, 8), st.integers(0, 8)),
    box=st.tuples(coordinates, coordinates, st.floats(0, 24, width=32), st.floats(0, 24, width=32)),
    bits=st.integers(0, 2**64 - 1),
    margin=st.integers(0, 3),
    aligned=st.booleans(),
)
def test_any_box_on_any_crop_gives_what_the_dense_mask_gives(
    crop: tuple[int, int, int, int],
    box: tuple[float, float, float, float],
    bits: int,
    margin: int,
    aligned: bool,
) -> None:
    y, x, h, w = crop
    mask = np.array([bits >> i & 1 for i in range(h * w)], np.uint8).reshape(h, w)
    crops = MaskCrops.from_crops([(y, x, mask)])
    size = (max(y + h, 1) + margin, max(x + w, 1) + margin)
    boxes = torch.tensor([[box[0], box[1], box[0] + box[2], box[1] + box[3]]])
    index = torch.tensor([0])
    found = align_crops(crops, index, boxes, 5, aligned, size)
    expected = on_dense_masks(dense(crops, *size), index, boxes, 5, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
