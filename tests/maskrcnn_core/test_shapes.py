import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskrcnn_core.config import MaskRCNNConfig, lite, r50_fpn
from maskrcnn_core.shapes import common_shape, common_shapes, input_size, tight_shape


@pytest.mark.parametrize("height", [1, 33, 427, 480, 634, 640, 999, 1333, 3000])
def test_sizes_are_torchvisions_to_the_pixel(height: int) -> None:
    transform = GeneralizedRCNNTransform(80, 133, [0.0] * 3, [1.0] * 3)
    config = r50_fpn().replace(min_size_px=80, max_size_px=133)
    for width in (320, 333, 427, 500, 640, 641):
        if max(height, width) / min(height, width) > 100:
            continue  # torchvision would make a side of 0 and fail
        images, _ = transform([torch.zeros(3, height, width)])
        assert input_size(config, height, width) == images.image_sizes[0]
        assert tight_shape(images.image_sizes[0]) == tuple(images.tensors.shape[2:])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 20_000), (20_000, 1)])
def test_no_side_becomes_zero(height: int, width: int) -> None:
    assert min(input_size(r50_fpn(), height, width)) >= 1


@pytest.mark.parametrize("config", [r50_fpn(), lite(), r50_fpn().replace(min_size_px=600, max_size_px=600)])
def test_every_image_fits_into_one_of_seven_shapes(config: MaskRCNNConfig) -> None:
    shapes = common_shapes(config)
    assert len(shapes) <= 7
    assert all(side % 32 == 0 for shape in shapes for side in shape)
    for long_side in [*range(100, 300), 20_000, 2_000_000]:
        for height, width in ((100, long_side), (long_side, 100)):
            size = input_size(config, height, width)
            shape = common_shape(config, size)
            assert shape in shapes
            assert shape[0] >= size[0]
            assert shape[1] >= size[1]


def test_the_smallest_shape_that_fits_is_taken() -> None:
    assert common_shape(r50_fpn(), (800, 1066)) == (800, 1088)
    assert common_shape(r50_fpn(), (800, 1089)) == (800, 1216)
    assert common_shape(r50_fpn(), (1066, 800)) == (1088, 800)
    assert common_shape(r50_fpn(), (1, 1333)) == (800, 1344)
