"""AP by category; what AP itself is, is pycocotools' to say, and test_predictor.py asks for its ends."""

from typing import Any

import numpy as np
import pytest

from maskrcnn_core.coco_eval import METRICS, evaluate_coco, score_coco
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.predictor import Detections

SIDE = 20


def square_rle(x0: int) -> bytes:
    mask = np.zeros((1, SIDE, SIDE), np.bool_)
    mask[0, 5:15, x0 : x0 + 8] = True
    return encode_masks(mask)[0]


def truth(*squares: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """One image with squares (x0, category_id), and three categories."""
    return {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": category_id,
                "bbox": [x0, 5, 8, 10],
                "area": 80,
                "iscrowd": 0,
                "segmentation": {"size": [SIDE, SIDE], "counts": square_rle(x0)},
            }
            for number, (x0, category_id) in enumerate(squares, start=1)
        ],
        "categories": [{"id": i, "name": f"name {i}"} for i in (7, 3, 5)],
    }


def found(*squares: tuple[int, int, float]) -> dict[int, Detections]:
    """Squares (x0, category_id, score)."""
    return {
        1: Detections(
            SIDE,
            SIDE,
            np.array([[x0, 5, x0 + 8, 15] for x0, _, _ in squares], np.float32).reshape(-1, 4),
            np.array([score for _, _, score in squares], np.float32),
            np.array([category_id for _, category_id, _ in squares], np.int32),
            [square_rle(x0) for x0, _, _ in squares],
            np.full(len(squares), 80, np.int32),
        )
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_each_category_has_its_own_ap_and_one_without_instances_minus_one(kind: Any) -> None:
    # 7 is found, 3 is missed, 5 is not there
    scores = score_coco(truth((0, 7), (12, 3)), found((0, 7, 0.9)), kind)
    assert scores.by_category == {3: 0.0, 5: -1.0, 7: pytest.approx(1.0)}
    assert scores.figures["AP"] == pytest.approx(0.5)


def test_a_false_detection_with_a_better_score_halves_the_precision_of_its_category_alone() -> None:
    scores = score_coco(truth((0, 7), (12, 3)), found((12, 7, 0.9), (0, 7, 0.8), (12, 3, 0.7)), "segm")
    assert scores.by_category[7] == pytest.approx(0.5)
    assert scores.by_category[3] == pytest.approx(1.0)
    assert scores.figures["AP"] == pytest.approx(0.75)


def test_nothing_found_is_zero_for_every_category_that_is_there() -> None:
    scores = score_coco(truth((0, 7), (12, 3)), found(), "bbox")
    assert scores.by_category == {3: 0.0, 5: -1.0, 7: 0.0}
    assert tuple(scores.figures) == METRICS


def test_the_figures_alone_are_the_same() -> None:
    arguments: tuple[Any, ...] = (truth((0, 7)), found((0, 7, 0.9)), "segm")
    assert evaluate_coco(*arguments) == score_coco(*arguments).figures
