import numpy as np
import pytest

from maskrcnn_core.masks import encode_masks
from maskrcnn_core.overlay import PALETTE, draw_boxes, draw_masks, picture_size

RED, BLUE = (255, 0, 0), (0, 0, 255)


def rle_of(height: int, width: int, y0: int, x0: int, y1: int, x1: int) -> bytes:
    mask = np.zeros((1, height, width), np.bool_)
    mask[0, y0:y1, x0:x1] = True
    return encode_masks(mask)[0]


def grey(height: int, width: int) -> np.typing.NDArray[np.uint8]:
    return np.full((height, width, 3), 100, np.uint8)


def test_a_mask_is_tinted_with_an_edge_of_its_colour_and_a_dark_line_around_it() -> None:
    picture = np.asarray(draw_masks(grey(10, 10), [rle_of(10, 10, 3, 3, 7, 7)], [RED], 10))
    assert picture[5, 5].tolist() == [177, 50, 50]  # half way from grey to red
    assert picture[3, 3].tolist() == [255, 0, 0]
    assert picture[2, 4].tolist() == picture[4, 7].tolist() == [0, 0, 0]
    assert picture[1, 4].tolist() == picture[2, 2].tolist() == [100, 100, 100]


def test_the_first_mask_lies_on_top() -> None:
    rles = [rle_of(8, 8, 0, 0, 8, 8), rle_of(8, 8, 0, 0, 8, 8)]
    picture = np.asarray(draw_masks(grey(8, 8), rles, [RED, BLUE], 8))
    # first half blue, then half red; at the image's border a mask has no edge
    assert picture[4, 4].tolist() == picture[0, 0].tolist() == [152, 25, 88]


def test_a_picture_is_scaled_to_its_side_and_the_mask_with_it() -> None:
    picture = np.asarray(draw_masks(grey(10, 20), [rle_of(10, 20, 0, 0, 10, 10)], [RED], 40))
    assert picture.shape == (20, 40, 3)
    assert picture[10, 15].tolist() == [177, 50, 50]
    assert picture[10, 30].tolist() == [100, 100, 100]


def test_no_mask_leaves_the_image_and_it_is_not_written_to() -> None:
    image = grey(6, 4)
    assert np.array_equal(np.asarray(draw_masks(image, [], [], 6)), image)
    draw_masks(image, [rle_of(6, 4, 0, 0, 3, 3)], [RED], 6)
    assert (image == 100).all()


def test_a_mask_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="RLE covers"):
        draw_masks(grey(10, 10), [rle_of(5, 5, 0, 0, 2, 2)], [RED], 10)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 200), (160, 320)), ((1, 5000), (1, 320)), ((320, 320), (320, 320))]
)
def test_a_picture_s_longer_side_is_given(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert picture_size(*size, 320) == expected


def test_boxes_are_outlined_and_captioned_the_first_on_top() -> None:
    picture = draw_masks(grey(60, 60), [], [], 60)
    boxes = np.array([[10, 20, 50, 50], [10, 20, 50, 50]], np.float32)
    draw_boxes(picture, boxes, [RED, BLUE], ["first", "second"])
    pixels = np.asarray(picture)
    assert pixels[50, 30].tolist() == list(RED)
    assert (pixels[8:20, 10:40].min(axis=2) > 200).any()  # the caption's letters
    assert pixels[35, 30].tolist() == [100, 100, 100]
    untouched = draw_masks(grey(60, 60), [], [], 60)
    draw_boxes(untouched, np.zeros((0, 4), np.float32), [], [])
    assert (np.asarray(untouched) == 100).all()


def test_colours_are_far_from_each_other_and_from_black_and_grey() -> None:
    colours = np.array([*PALETTE, (0, 0, 0), (128, 128, 128)], float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 60
    assert len(PALETTE) >= 10
