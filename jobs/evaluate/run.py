"""`masklake evaluate`: COCO AP of the labels in a table against an instances JSON.

Enters: a lake, a model_id, the JSON. Leaves: AP and AR for boxes and masks, and how many images they cover.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.lake.labels_table import LabelsTable
from jobs.lake.shards import image_name
from jobs.lake.storage import Storage
from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.predictor import Detections
from schemas.errors import UsageError
from schemas.labels import Status


@dataclass(frozen=True)
class Evaluation:
    """bbox and segm: COCO's twelve figures. Failed images count as images without detections."""

    model_id: str
    images: int
    failed: int
    unlabelled: int  # in the JSON but not in the table
    bbox: dict[str, float]
    segm: dict[str, float]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_evaluate(lake_uri: str, annotations_uri: str, model_id: str | None, storage: Storage) -> Evaluation:
    """Compare the current labels of one model with the ground truth, image by image matched by name.

    Raises:
        UsageError: the JSON is not COCO's, no image of it is in the table, or the model must be named.
    """
    truth = read_coco(annotations_uri, storage)
    table = LabelsTable.open(lake_uri, storage)
    chosen = table.choose_model(model_id)
    rows = table.to_current(chosen).select("image_id, status, width, height, detections").to_arrow_table()
    coco_ids = _coco_ids_by_name(truth)
    detections: dict[int, Detections] = {}
    num_failed = 0
    for row in _rows(rows):
        coco_id = coco_ids.get(image_name(row["image_id"]))
        if coco_id is None:
            continue
        if coco_id in detections:
            raise UsageError(
                f"two labelled images are called {image_name(row['image_id'])!r}; evaluate one source at a "
                "time."
            )
        num_failed += row["status"] != Status.OK
        detections[coco_id] = to_detections(row)
    if not detections:
        raise UsageError(
            f"no image of {annotations_uri} is labelled by {chosen} in {lake_uri}; names must agree but for "
            f"folder and suffix (the JSON has {next(iter(coco_ids), 'none')!r})."
        )
    try:
        bbox, segm = (evaluate_coco(truth, detections, kind) for kind in ("bbox", "segm"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    unlabelled = len(coco_ids) - len(detections)
    return Evaluation(chosen, len(detections), num_failed, unlabelled, bbox, segm)


def to_detections(row: Mapping[str, Any]) -> Detections:
    """A row of the label table as Detections; a failed image has none, at size 0 x 0."""
    found = row["detections"] or []
    boxes = [[d["box"][side] for side in ("x0", "y0", "x1", "y1")] for d in found]
    return Detections(
        row["height"] or 0,
        row["width"] or 0,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([d["score"] for d in found], dtype=np.float32),
        np.array([d["category_id"] for d in found], dtype=np.int32),
        [d["rle"] for d in found],
        np.array([d["area"] for d in found], dtype=np.int32),
    )


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def read_coco(uri: str, storage: Storage) -> dict[str, Any]:
    """Load an instances JSON; UsageError where it is none."""
    location = storage.normalize(uri)
    storage.check_reachable(location, "annotations")
    try:
        truth = json.loads(storage.read_bytes(storage.stat(location)))
        names = [image["file_name"] for image in truth["images"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{location} is not a COCO instances JSON (images, annotations, categories): {error}"
        ) from error
    if not names or "annotations" not in truth or "categories" not in truth:
        raise UsageError(
            f"{location} is not a COCO instances JSON: it needs images, annotations and categories."
        )
    return dict(truth)


def _coco_ids_by_name(truth: Mapping[str, Any]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for image in truth["images"]:
        name = image_name(image["file_name"])
        if name in ids:
            raise UsageError(f"two images of the annotations are called {name!r}; evaluate folder by folder.")
        ids[name] = int(image["id"])
    return ids
