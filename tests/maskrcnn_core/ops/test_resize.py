import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskrcnn_core.ops import resize_normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def noise(height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(height * 10_000 + width)
    return torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def resized(
    images: list[torch.Tensor], sizes: list[tuple[int, int]], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    pixels = torch.cat([image.flatten() for image in images])
    rows, offset = [], 0
    for image, size in zip(images, sizes, strict=True):
        rows.append((offset, image.shape[0], image.shape[1], *size))
        offset += image.numel()
    result: torch.Tensor = resize_normalize(pixels, torch.tensor(rows), *shape, MEAN, STD, dtype)
    return result


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (37, 91), (300, 200), (2, 2)])
def test_it_is_torchvisions_transform_to_the_last_bit(height: int, width: int) -> None:
    torch.set_num_threads(2)  # with one thread torch's own resize takes another way, 1e-4 off
    image = noise(height, width)
    (expected,) = GeneralizedRCNNTransform(80, 133, MEAN, STD)([image.permute(2, 0, 1).contiguous() / 255])[
        0
    ].tensors
    sizes = GeneralizedRCNNTransform(80, 133, MEAN, STD)([image.permute(2, 0, 1).contiguous() / 255])[
        0
    ].image_sizes
    found = resized([image], sizes, (expected.shape[1], expected.shape[2]), torch.float32)
    assert torch.equal(found[0], expected)


def test_images_of_a_batch_do_not_touch_each_other_and_padding_is_zero() -> None:
    images, sizes = [noise(20, 30), noise(30, 20)], [(40, 60), (60, 40)]
    together = resized(images, sizes, (64, 64), torch.float32)
    for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
        alone = resized([image], [size], (64, 64), torch.float32)
        assert torch.equal(together[index], alone[0])
        assert not together[index, :, size[0] :].any()
        assert not together[index, :, :, size[1] :].any()
        assert together[index, :, size[0] - 1].any()
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_the_float32_result_rounded() -> None:
    exact = resized([noise(33, 47)], [(50, 71)], (64, 96), torch.float32)
    assert torch.equal(
        resized([noise(33, 47)], [(50, 71)], (64, 96), torch.bfloat16), exact.to(torch.bfloat16)
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    torch.set_num_threads(threads)
    found = resized([noise(100, 140)], [(300, 420)], (320, 448), torch.float32)
    torch.set_num_threads(2)
    assert torch.equal(found, resized([noise(100, 140)], [(300, 420)], (320, 448), torch.float32))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(1, 1, (64, 64)), (1, 900, (1, 64)), (900, 1, (64, 1))]
)
def test_a_line_of_pixels_is_resized_too(height: int, width: int, size: tuple[int, int]) -> None:
    found = resized([torch.full((height, width, 3), 255, dtype=torch.uint8)], [size], (64, 64), torch.float32)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(found[0, :, : size[0], : size[1]], white[:, None, None].expand(3, *size))
