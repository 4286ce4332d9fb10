import io
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.train.samples import TILE_PX, Sample, samples_png, take_samples
from maskrcnn_core.augment import Annotations
from maskrcnn_core.config import MaskRCNNConfig, lite
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.overlay import PALETTE
from maskrcnn_core.predictor import Detections
from tests.train.rendered_images import RenderedImages, demo_model

SIDE = 40
LEFT, RIGHT, TOP = 12, TILE_PX + 24, 34  # of the first row's two pictures


def config(num_categories: int = 3) -> MaskRCNNConfig:
    return lite(tuple((10 * i, f"name {i}") for i in range(1, num_categories + 1)))


def sample(
    class_indices: list[int], scores: list[float], ignored: tuple[int, ...] = (), name: str = "a.jpg"
) -> Sample:
    """Instance k covers the left half, in rows of its own; what is found covers the same."""
    num = len(class_indices)
    masks = np.zeros((num, SIDE, SIDE), np.bool_)
    boxes = np.zeros((num, 4), np.float32)
    for k in range(num):
        y0, y1 = SIDE * k // num, SIDE * (k + 1) // num
        masks[k, y0:y1, : SIDE // 2] = True
        boxes[k] = 0, y0, SIDE // 2, y1
    rles = encode_masks(masks)
    truth = Annotations(
        SIDE,
        SIDE,
        boxes,
        np.array(class_indices, np.int64),
        np.isin(np.arange(num), ignored),
        rles,
    )
    found = Detections(
        SIDE,
        SIDE,
        boxes,
        np.array(scores, np.float32),
        np.array([10 * i for i in class_indices], np.int32),
        rles,
        masks.sum((1, 2)).astype(np.int32),
    )
    return Sample(name, np.full((SIDE, SIDE, 3), 200, np.uint8), truth, found)


def test_samples_are_taken_from_all_over_the_set_and_unreadable_images_left_out() -> None:
    images = RenderedImages(5, broken={1: b""})
    taken = take_samples(demo_model(), images, images.read, num_images=3)
    assert [sample.name for sample in taken] == ["scene 0", "scene 3"]
    assert images.num_reads == 3
    assert len(taken[0].found.rles) > 0
    assert taken[0].truth == images.annotations(0)
    assert taken[0].pixels.shape == (taken[0].truth.height, taken[0].truth.width, 3)
    few = RenderedImages(1)
    assert [sample.name for sample in take_samples(demo_model(), few, few.read)] == ["scene 0"]
    none = RenderedImages(0)
    assert take_samples(demo_model(), none, none.read) == []


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def tinted(colour: tuple[int, int, int]) -> list[int]:
    return [(200 + c) // 2 for c in colour]


def test_truth_stands_left_of_what_was_found_with_enough_score() -> None:
    sheet = pixels_of(samples_png([sample([1, 2], [0.9, 0.4])], config()))
    upper, lower, across = TOP + TILE_PX // 4, TOP + 3 * TILE_PX // 4, TILE_PX // 4
    assert sheet[upper, LEFT + across].tolist() == tinted(PALETTE[0])
    assert sheet[lower, LEFT + across].tolist() == tinted(PALETTE[1])
    assert sheet[upper, RIGHT + across].tolist() == tinted(PALETTE[0])
    assert sheet[lower, RIGHT + across].tolist() == [200, 200, 200]
    assert sheet[upper, LEFT + 3 * across].tolist() == [200, 200, 200]


def test_what_is_ignored_is_grey_and_colours_go_to_the_categories_that_are_there() -> None:
    sheet = pixels_of(samples_png([sample([3, 1], [0.9, 0.9], ignored=(1,))], config()))
    upper, lower, across = TOP + TILE_PX // 4, TOP + 3 * TILE_PX // 4, TILE_PX // 4
    assert sheet[lower, LEFT + across].tolist() == tinted((128, 128, 128))
    assert sheet[upper, LEFT + across].tolist() == tinted(PALETTE[1])  # 30 is the second of 10, 30
    assert sheet[lower, RIGHT + across].tolist() == tinted(PALETTE[0])


def test_the_legend_names_each_colour_and_takes_more_lines_for_more_categories() -> None:
    few = pixels_of(samples_png([sample([1, 2], [0.9, 0.9])], config()))
    many = pixels_of(
        samples_png(
            [sample(list(range(1, 25)), [0.9] * 24)], lite(tuple((10 * i, "x" * 300) for i in range(1, 25)))
        )
    )
    assert len(many) > len(few)
    assert few.shape[1] == many.shape[1]
    legend = few[-34:].reshape(-1, 3).tolist()
    for colour in PALETTE[:2]:
        assert list(colour) in legend
    assert list(PALETTE[2]) not in legend


def test_images_of_any_shape_without_instances_and_with_wild_names_have_their_row() -> None:
    none = sample([], [], name="x" * 3000 + "\n\u202e☃")
    narrow = replace(none, pixels=np.zeros((500, 10, 3), np.uint8))
    flat = replace(none, pixels=np.zeros((10, 500, 3), np.uint8))
    one, two = (pixels_of(samples_png(rows, config())) for rows in ([flat], [flat, narrow]))
    assert len(two) - len(one) == TILE_PX + 34  # the picture, its line of text, a gap
    middle = LEFT + TILE_PX // 2
    assert two[TOP + 5, middle].tolist() == two[len(one) + 100, middle].tolist() == [0, 0, 0]


def test_without_a_sample_the_picture_says_so() -> None:
    sheet = pixels_of(samples_png([], config()))
    assert sheet.min() == 0  # letters on white
    assert sheet.shape[1] == 2 * TILE_PX + 36
