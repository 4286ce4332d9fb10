"""RoIAlign: Mask R-CNN's answer to RoIPool's rounding, over all levels at once."""

from collections.abc import Callable

import pytest
import torch
from torchvision.ops import RoIPool
from torchvision.ops import roi_align as torchvision_roi_align

from maskrcnn_core.ops import roi_align

STRIDES = [4, 8, 16, 32]


def pyramid(dtype: torch.dtype = torch.float32, channels: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, 256 // s, 320 // s).to(dtype) for s in STRIDES]


def some_rois(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RoIs of both images, some of them partly or wholly outside, and the level of each."""
    torch.manual_seed(1)
    corners = torch.rand(count, 2) * 400 - 60
    index = torch.randint(0, 2, (count, 1)).float()
    rois = torch.cat((index, corners, corners + torch.rand(count, 2) * 150), dim=1)
    return rois, torch.randint(0, 4, (count,))


def level_by_level(
    features: list[torch.Tensor], rois: torch.Tensor, levels: torch.Tensor, ratio: int, aligned: bool
) -> torch.Tensor:
    pooled = torch.zeros(len(rois), features[0].shape[1], 7, 7)
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        of_level = levels == level
        pooled[of_level] = torchvision_roi_align(
            feature, rois[of_level], 7, 1 / stride, sampling_ratio=ratio, aligned=aligned
        )
    return pooled


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
def test_all_levels_at_once_are_what_torchvision_gives_level_by_level(
    ratio: int, aligned: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    rois, levels = some_rois(150)
    expected = level_by_level(pyramid(), rois, levels, ratio, aligned)
    found = roi_align(pyramid(), rois, levels, STRIDES, 7, ratio, aligned)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    rois, levels = some_rois(60)
    features = pyramid(torch.bfloat16)
    exact = roi_align([f.float() for f in features], rois, levels, STRIDES, 7, 2, False)
    found = roi_align(features, rois, levels, STRIDES, 7, 2, False)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30, 1e30])
def test_a_coordinate_that_is_no_place_reads_no_memory(bad: float) -> None:
    rois = torch.tensor([[0.0, bad, 3.0, 9.0, 9.0], [1.0, 3.0, 3.0, bad, bad]])
    found = roi_align(pyramid(), rois, torch.zeros(2, dtype=torch.int64), STRIDES, 7, 2, False)
    assert found.shape == (2, 8, 7, 7)


def test_no_roi_gives_no_feature() -> None:
    found = roi_align(pyramid(), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), STRIDES, 7, 2, False)
    assert found.shape == (0, 8, 7, 7)


def gradients_of(align: Callable[[list[torch.Tensor]], torch.Tensor], channels: int) -> list[torch.Tensor]:
    features = [f.requires_grad_() for f in pyramid(channels=channels)]
    align(features).square().sum().backward()
    found = [f.grad for f in features if f.grad is not None]
    assert len(found) == len(features)
    return found


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
def test_its_gradient_is_torchvisions(ratio: int, aligned: bool) -> None:
    """Also with more channels than one piece of work has, and a level without RoIs."""
    rois, levels = some_rois(40)
    levels[levels == 3] = 0
    found = gradients_of(lambda f: roi_align(f, rois, levels, STRIDES, 7, ratio, aligned), 70)
    expected = gradients_of(lambda f: level_by_level(f, rois, levels, ratio, aligned), 70)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert not found[3].any()


def test_its_gradient_does_not_depend_on_the_number_of_threads() -> None:
    rois, levels = some_rois(40)

    def gradients(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        return gradients_of(lambda f: roi_align(f, rois, levels, STRIDES, 7, 2, False).tanh(), 70)

    for one, two in zip(gradients(1), gradients(2), strict=True):
        assert torch.equal(one, two)


def test_no_roi_has_no_gradient() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = gradients_of(lambda f: roi_align(f, torch.zeros(0, 5), none, STRIDES, 7, 2, False), 8)
    assert not any(gradient.any() for gradient in found)


def test_its_gradient_in_bfloat16_is_the_float32_one_rounded() -> None:
    rois, levels = some_rois(40)
    features = [f.requires_grad_() for f in pyramid(torch.bfloat16)]
    exact = [f.detach().float().requires_grad_() for f in features]
    for of_type in (features, exact):
        roi_align(of_type, rois, levels, STRIDES, 7, 2, True).float().sum().backward()
    for found, expected in zip(features, exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert torch.equal(found.grad, expected.grad.to(torch.bfloat16))


def ramp_pyramid() -> list[torch.Tensor]:
    """Level 0 holds each pixel's x in input pixels, at its centre: 2, 6, 10, …"""
    x = torch.arange(64.0) * 4 + 2
    return [x.expand(1, 1, 64, 64)]


def test_roi_align_is_exact_on_a_linear_ramp_where_roi_pool_is_not() -> None:
    roi = torch.tensor([[0.0, 17.3, 26.7, 79.9, 84.1]])
    level = torch.zeros(1, dtype=torch.int64)
    bin_w = (79.9 - 17.3) / 4
    centres = torch.tensor([17.3 + bin_w * (i + 0.5) for i in range(4)])
    aligned = roi_align(ramp_pyramid(), roi, level, [4], 4, 2, True)[0, 0, 0]
    assert torch.allclose(aligned, centres, atol=1e-4)
    # Not aligned it is as linear, and half a feature pixel off, the same for every box.
    shifted = roi_align(ramp_pyramid(), roi, level, [4], 4, 2, False)[0, 0, 0]
    assert torch.allclose(shifted, centres + 2, atol=1e-4)
    pooled = RoIPool(4, 1 / 4)(ramp_pyramid()[0], roi)[0, 0, 0]
    assert (pooled - centres).abs().max() > 2


def test_roi_align_moves_continuously_with_the_box_where_roi_pool_jumps() -> None:
    torch.manual_seed(2)
    feature = torch.randn(1, 1, 64, 64)
    steps = torch.arange(0, 9, 0.01)
    rois = torch.stack([torch.tensor([0.0, 40 + s, 40, 90 + s, 90]) for s in steps])
    aligned = roi_align([feature], rois, torch.zeros(len(rois), dtype=torch.int64), [4], 4, 2, True)
    pooled = RoIPool(4, 1 / 4)(feature, rois)
    # 0.01 input pixels are 0.0025 feature pixels, and the feature changes by at most its range a pixel
    largest = (feature.max() - feature.min()) * 0.0025
    assert aligned.diff(dim=0).abs().max() <= largest * 1.01
    assert pooled.diff(dim=0).abs().max() > 100 * largest
