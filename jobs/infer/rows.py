"""Detections and failures of a unit -> rows of the label table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.lake.shards import SourceImage, content_hash
from maskrcnn_core.predictor import Detections
from schemas.labels import BOX_TYPE, DETECTION_TYPE, LABEL_SCHEMA, ErrorKind, Status


@dataclass(frozen=True)
class Failure:
    """Why an image has no labels: kind for counting, message for reading."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True)
class Lineage:
    """What all rows of a run share.

    since: when the run began, by its driver's clock; no row is older, whatever its actor's clock says.
    """

    source: str
    model_id: str
    run_id: str
    since: datetime


def label_rows(
    images: Sequence[SourceImage],
    outcomes: Sequence[Detections | Failure],
    lineage: Lineage,
    labeled_at: datetime,
) -> pa.Table:
    """One row an image, in input order, with LABEL_SCHEMA.

    Args:
        images: as read; N may be 0.
        outcomes: what became of each.
        labeled_at: with time zone.
    """
    num = len(images)
    found = [o if isinstance(o, Detections) else None for o in outcomes]
    failures = [o if isinstance(o, Failure) else None for o in outcomes]
    columns: dict[str, list[Any]] = {
        "image_id": [i.image_id for i in images],
        "source": [lineage.source] * num,
        "shard": [i.shard for i in images],
        "object_version": [i.version or None for i in images],
        "content_hash": [None if i.data is None else content_hash(i.data) for i in images],
        "width": [d and d.width for d in found],
        "height": [d and d.height for d in found],
        "status": [Status.OK if d else Status.FAILED for d in found],
        "error_kind": [f and f.kind for f in failures],
        "error": [f and f.message for f in failures],
        "model_id": [lineage.model_id] * num,
        "run_id": [lineage.run_id] * num,
        "labeled_at": [labeled_at] * num,
        "num_detections": [None if d is None else len(d.rles) for d in found],
        "max_score": [None if d is None or not d.rles else float(d.scores[0]) for d in found],
    }
    arrays = [pa.array(values, LABEL_SCHEMA.field(name).type) for name, values in columns.items()]
    return pa.Table.from_arrays([*arrays, _detection_lists(found)], schema=LABEL_SCHEMA)


def _detection_lists(found: Sequence[Detections | None]) -> pa.Array[Any]:
    """list<struct> built from whole arrays; an image that failed is null, one without detections is empty."""
    present = [d for d in found if d is not None]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(d.boxes for d in present)])
    box_array = pa.StructArray.from_arrays([pa.array(boxes[:, i]) for i in range(4)], fields=list(BOX_TYPE))
    structs = pa.StructArray.from_arrays(
        [
            pa.array(np.concatenate([np.zeros(0, np.int32), *(d.category_ids for d in present)])),
            pa.array(np.concatenate([np.zeros(0, np.float32), *(d.scores for d in present)])),
            box_array,
            pa.array(np.concatenate([np.zeros(0, np.int32), *(d.areas for d in present)])),
            pa.array([rle for d in present for rle in d.rles], pa.binary()),
        ],
        fields=list(DETECTION_TYPE),
    )
    offsets: list[int | None] = []
    end = 0
    for detections in found:
        offsets.append(None if detections is None else end)  # a null offset makes a null list
        end += 0 if detections is None else len(detections.rles)
    return pa.ListArray.from_arrays(
        pa.array([*offsets, end], pa.int32()), structs, type=LABEL_SCHEMA.field("detections").type
    )
