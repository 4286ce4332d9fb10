"""Average precision as COCO defines it, by pycocotools.

Enters: ground truth in COCO's form and detections. Leaves: the twelve figures of COCO, for boxes or masks,
and AP by category.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from maskrcnn_core.predictor import Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoScores:
    """figures: METRICS; by_category: category_id -> AP. Each is in [0, 1]; -1 where there is no instance."""

    figures: dict[str, float]
    by_category: dict[int, float]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    detections: Mapping[int, Detections],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    """The figures of score_coco alone."""
    return score_coco(ground_truth, detections, kind).figures


def score_coco(
    ground_truth: Mapping[str, Any],
    detections: Mapping[int, Detections],
    kind: Literal["bbox", "segm"],
) -> CocoScores:
    """COCO's AP and AR, averaged over IoU 0.50 ... 0.95, areas and categories; and AP of each category.

    Args:
        ground_truth: `images`, `annotations`, `categories` as in an instances JSON; not changed.
        detections: by the ground truth's image id. Only these images are evaluated.

    Raises:
        ValueError: no image is evaluated, or the ground truth has no annotation for them.

    Source: cocoapi, PythonAPI/pycocotools/cocoeval.py; its mean over categories is that of by_category.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_ids = sorted(detections)
    wanted = set(image_ids)
    annotations = [a for a in ground_truth["annotations"] if a["image_id"] in wanted]
    if not annotations:
        raise ValueError(
            f"no annotation belongs to the {len(image_ids)} labelled images; is it the right JSON?"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        dataset: Any = {
            "info": {},  # loadRes wants it
            "images": [i for i in ground_truth["images"] if i["id"] in wanted],
            "annotations": [dict(a) for a in annotations],
            "categories": list(ground_truth["categories"]),
        }
        truth.dataset = dataset
        truth.createIndex()
        results = to_coco_results(detections)
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoScores(
        dict(zip(METRICS, map(float, evaluation.stats), strict=True)),
        dict(zip(map(int, evaluation.params.catIds), _by_category(evaluation), strict=True)),
    )


def _by_category(evaluation: Any) -> list[float]:
    """AP over all areas with the most detections an image, for each of the evaluated categories, in order."""
    # IoU thresholds, recalls, categories, areas (all first), detections an image (most last); -1: no instance
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    means = []
    for category in range(precision.shape[2]):
        measured = precision[:, :, category]
        measured = measured[measured > -1]
        means.append(float(measured.mean()) if measured.size else -1.0)
    return means


def to_coco_results(detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """COCO's result records: box as (x, y, width, height), mask as {size, counts}."""
    return [
        {
            "image_id": image_id,
            "category_id": int(category_id),
            "score": float(score),
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "segmentation": {"size": [found.height, found.width], "counts": rle},
        }
        for image_id, found in detections.items()
        for box, score, category_id, rle in zip(
            found.boxes, found.scores, found.category_ids, found.rles, strict=True
        )
    ]
