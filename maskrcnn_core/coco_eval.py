"""Average precision as COCO defines it, by pycocotools.

Enters: ground truth in COCO's form and detections. Leaves: the twelve figures of COCO, for boxes or masks.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Literal

from maskrcnn_core.predictor import Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    detections: Mapping[int, Detections],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    """COCO's AP and AR, averaged over IoU 0.50 ... 0.95, areas and categories.

    Args:
        ground_truth: `images`, `annotations`, `categories` as in an instances JSON; not changed.
        detections: by the ground truth's image id. Only these images are evaluated.

    Returns:
        METRICS, each in [0, 1]; -1 where no instance falls into an area range.

    Raises:
        ValueError: no image is evaluated, or the ground truth has no annotation for them.
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
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True))


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
