import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from maskrcnn_core.anchors import cell_anchors, pyramid_anchors
from maskrcnn_core.config import r50_fpn

CPU = torch.device("cpu")


def grids_of(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """P2 ... P6 of a padded input; P6 takes every second position of P5."""
    p5 = (height // 32, width // 32)
    return (*((height // s, width // s) for s in (4, 8, 16)), p5, ((p5[0] + 1) // 2, (p5[1] + 1) // 2))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (800, 1088)])
def test_anchors_are_torchvisions(height: int, width: int) -> None:
    config = r50_fpn()
    grids = grids_of(height, width)
    generator = AnchorGenerator(tuple((s,) for s in config.anchor_sizes), (config.anchor_ratios,) * 5)
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    expected = generator(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
    assert torch.equal(torch.cat(pyramid_anchors(config, grids, CPU)), expected)


def test_nominal_strides_put_p6_anchors_64_px_apart() -> None:
    grids = grids_of(96, 96)  # P6 has 2×2 positions, 48 px apart where measured
    by_name = {
        name: pyramid_anchors(r50_fpn().replace(anchor_strides=name), grids, CPU)[4]
        for name in ("measured", "nominal")
    }
    assert by_name["nominal"][3, 0] - by_name["nominal"][0, 0] == 64
    assert by_name["measured"][3, 0] - by_name["measured"][0, 0] == 48


def test_an_anchor_has_the_area_and_the_ratio_it_is_made_for() -> None:
    anchors = cell_anchors(64, (0.5, 1.0, 2.0), rounding=False)
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    assert torch.allclose(width * height, torch.tensor(64.0**2))
    assert torch.allclose(height / width, torch.tensor([0.5, 1.0, 2.0]))
    assert torch.allclose(anchors[:, :2], -anchors[:, 2:])


def test_rounding_makes_corners_whole() -> None:
    anchors = cell_anchors(32, (0.5, 1.0, 2.0), rounding=True)
    assert anchors.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_training_may_use_anchors_that_labelling_made() -> None:
    grids = grids_of(32, 32)
    with torch.inference_mode():
        pyramid_anchors(r50_fpn(), grids, CPU)
    anchors = pyramid_anchors(r50_fpn(), grids, CPU)[0]
    weight = torch.ones(4, requires_grad=True)
    (anchors * weight).sum().backward()
    assert weight.grad is not None
