"""Lakes that two models labelled, for the tests of the diff and what comes after it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from maskrcnn_core.masks import encode_masks
from schemas.labels import LABEL_SCHEMA

HEIGHT, WIDTH = 60, 80
SOURCE = "s3://photos/2026"
OLD, NEW = "lite-000000000000", "lite-111111111111"

Box = tuple[int, int, int, int]  # x0 y0 x1 y1


def found(category_id: int, box: Box, score: float = 0.9, mask: Box | None = None) -> dict[str, Any]:
    """A detection whose mask is its box, or another box."""
    x0, y0, x1, y1 = mask or box
    pixels = np.zeros((1, HEIGHT, WIDTH), np.bool_)
    pixels[0, y0:y1, x0:x1] = True
    return {
        "category_id": category_id,
        "score": score,
        "box": dict(zip(("x0", "y0", "x1", "y1"), map(float, box), strict=True)),
        "area": (x1 - x0) * (y1 - y0),
        "rle": encode_masks(pixels)[0],
    }


def label_rows(
    images: Mapping[str, Sequence[Mapping[str, Any]] | None],
    model_id: str,
    *,
    source: str = SOURCE,
    shard: str = ".",
    content: Mapping[str, bytes] | None = None,
    removed: Sequence[str] = (),
    at_s: float = 0,
) -> pa.Table:
    """Rows of LABEL_SCHEMA: image_id -> its detections, None where it failed. content: hashes of some."""
    rows = []
    for image_id, detections in images.items():
        status = "removed" if image_id in removed else "failed" if detections is None else "ok"
        is_ok = status == "ok"
        row = {
            "image_id": image_id,
            "source": source,
            "shard": shard,
            "content_hash": (content or {}).get(image_id, b"same").ljust(16),
            "width": WIDTH if is_ok else None,
            "height": HEIGHT if is_ok else None,
            "status": status,
            "error_kind": "corrupt" if status == "failed" else None,
            "model_id": model_id,
            "run_id": "run-1",
            "labeled_at": datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=at_s),
            "num_detections": len(detections or ()) if is_ok else None,
            "detections": detections if is_ok else None,
        }
        rows.append({name: row.get(name) for name in LABEL_SCHEMA.names})
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def add_rows(table: LabelsTable, storage: Storage, *tables: pa.Table) -> None:
    """Commit each table of rows as a fragment of its own, in one version."""
    committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
    lake_uri = table.uri.removesuffix("/labels")
    for rows in tables:
        committer.add(
            write_fragment(rows, [str(committer.num_pending)], lake_uri, rows["model_id"][0].as_py(), storage)
        )
    committer.commit()
