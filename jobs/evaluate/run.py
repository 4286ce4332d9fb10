"""`masklake evaluate`: COCO AP of the labels in a table against an instances JSON.

Enters: a lake, a model_id, the JSON. Leaves: AP and AR for boxes and masks, and how many images they cover.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from jobs.evaluate.named_labels import rows_of
from jobs.lake.labels_table import LabelsTable
from jobs.lake.shards import image_name
from jobs.lake.storage import Storage
from maskrcnn_core.coco_eval import evaluate_coco
from maskrcnn_core.predictor import Detections
from schemas.errors import UsageError
from schemas.labels import Status

# What is wrong with annotations is mostly wrong with all of them.
_TRIED_IMAGES = 100


@dataclass(frozen=True)
class Evaluation:
    """bbox and segm: COCO's twelve figures. Failed images count as images without detections.

    version: of the label table.
    """

    model_id: str
    version: int
    images: int
    failed: int
    unlabelled: int  # in the JSON but not in the table
    bbox: dict[str, float]
    segm: dict[str, float]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_evaluate(
    lake_uri: str,
    annotations_uri: str,
    model_id: str | None,
    storage: Storage,
    source: str | None = None,
    version: int | None = None,
) -> Evaluation:
    """As evaluate_labels(), of a lake's label table at a version, or at its newest.

    Args:
        model_id: None where only one model labelled something.
        source: URI, in any spelling.
    """
    table = LabelsTable.open(lake_uri, storage, version)
    chosen = table.choose_model(model_id)
    return evaluate_labels(
        table, annotations_uri, chosen, storage, None if source is None else storage.normalize(source)
    )


def evaluate_labels(
    table: LabelsTable, annotations_uri: str, model_id: str, storage: Storage, source: str | None = None
) -> Evaluation:
    """Compare the newest labels of one model with the ground truth, image by image matched by name.

    Args:
        table: at the version to read.
        source: as the rows have it; None: whatever the model labelled.

    Raises:
        UsageError: the JSON is not COCO's, no image of it is labelled, or two that are have one name.
        StorageError: the store refused, or a label file is damaged.
    """
    truth = read_coco(annotations_uri, storage)
    coco_ids = _coco_ids_by_name(truth)
    found: dict[str, tuple[str, str]] = {}  # name -> source, image_id
    detections: dict[int, Detections] = {}
    num_failed = 0
    for row in rows_of(table, model_id, source, coco_ids):
        name = image_name(row["image_id"])
        if name in found:
            raise _two_images(name, found[name], (row["source"], row["image_id"]))
        found[name] = row["source"], row["image_id"]
        num_failed += row["status"] != Status.OK
        detections[coco_ids[name]] = to_detections(row)
    if not detections:
        where = table.uri if source is None else f"{source}, by the table at {table.uri}"
        raise UsageError(
            f"no image of {annotations_uri} is labelled by {model_id} in {where}; names must agree but for "
            f"folder and suffix (the JSON has {next(iter(coco_ids), 'none')!r})."
        )
    try:
        bbox, segm = (evaluate_coco(truth, detections, kind) for kind in ("bbox", "segm"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    unlabelled = len(coco_ids) - len(detections)
    return Evaluation(model_id, table.version, len(detections), num_failed, unlabelled, bbox, segm)


def check_annotations(
    annotations_uri: str, storage: Storage, image_ids: Iterable[str], are_all: bool
) -> None:
    """Refuse what evaluate_labels() would, before images are labelled.

    Args:
        image_ids: of one source, each once. are_all: whether it has no others.

    Raises:
        UsageError: the JSON is not COCO's, or has none of all images, or two images have one of its names.
        StorageError: the store refused.
    """
    truth = read_coco(annotations_uri, storage)
    coco_ids = _coco_ids_by_name(truth)
    found: dict[str, str] = {}
    for image_id in image_ids:
        name = image_name(image_id)
        if name not in coco_ids:
            continue
        if name in found:
            raise _two_images(name, ("", found[name]), ("", image_id))
        found[name] = image_id
    if are_all and not found:
        raise UsageError(
            f"no image of {annotations_uri} is in the source; names must agree but for folder and suffix "
            f"(the JSON has {next(iter(coco_ids))!r})."
        )
    nothing = to_detections({"height": 0, "width": 0, "detections": []})
    try:
        annotated = {annotation["image_id"] for annotation in truth["annotations"]}
        ids = (coco_ids[name] for name in (found if are_all else coco_ids))
        tried = islice((coco_id for coco_id in ids if coco_id in annotated), _TRIED_IMAGES)
        evaluate_coco(truth, dict.fromkeys(tried, nothing), "segm")
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{annotations_uri} cannot be evaluated: {error}") from error


def _two_images(name: str, *images: tuple[str, str]) -> UsageError:
    """images: (source, image_id) of both."""
    sources = sorted({source for source, _ in images})
    if len(sources) > 1:
        return UsageError(
            f"images of {' and of '.join(sources)} are called {name!r}: name the source that the annotations "
            "are of (--source)."
        )
    ids = " and ".join(sorted(image_id for _, image_id in images))
    return UsageError(f"two images are called {name!r}: {ids}; evaluate folder by folder.")


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
