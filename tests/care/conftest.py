"""What the tests of jobs/care share: lakes whose labels are sound down to the masks."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from maskrcnn_core.masks import encode_masks
from schemas.labels import LABEL_SCHEMA
from schemas.specs import StorageSpec

HEIGHT, WIDTH = 6, 8
SOURCE = "s3://photos/2026"
MODEL = "lite-0123456789ab"


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


@pytest.fixture
def lake(tmp_path: Path) -> str:
    return f"file://{tmp_path}/lake"


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


@pytest.fixture
def make_rows() -> Callable[..., pa.Table]:
    """Rows of LABEL_SCHEMA, see make_sound_rows."""
    return make_sound_rows


@pytest.fixture
def add_rows(table: LabelsTable, lake: str, storage: Storage) -> Callable[..., list[Fragment]]:
    """Commit each table of rows as a fragment, together, and give the fragments."""

    def add(*tables: pa.Table) -> list[Fragment]:
        committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
        fragments = [
            write_fragment(rows, [f"unit-{number}"], lake, rows["model_id"][0].as_py(), storage)
            for number, rows in enumerate(tables)
        ]
        for fragment in fragments:
            committer.add(fragment)
        committer.commit()
        return fragments

    return add


def make_sound_rows(
    image_ids: Sequence[str],
    *,
    model_id: str = MODEL,
    source: str = SOURCE,
    shard: str = "shard-000.tar",
    failed: Mapping[str, str] | None = None,
    removed: Sequence[str] = (),
    run_id: str = "run-1",
    at_s: float = 0,
    content: str = "",
    changes: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Every ok row has two detections of 4 and 2 pixels. `content` makes the bytes of all images others.

    Args:
        changes: put into the first row as they are: a column's value, or a field of its first detection.
    """
    rows: list[dict[str, Any]] = []
    for image_id in image_ids:
        kind = (failed or {}).get(image_id)
        status = "failed" if kind else "removed" if image_id in removed else "ok"
        ok = status == "ok"
        rows.append(
            {
                "image_id": image_id,
                "source": source,
                "shard": shard,
                "content_hash": blake2b((image_id + content).encode(), digest_size=16).digest(),
                "width": WIDTH if ok else None,
                "height": HEIGHT if ok else None,
                "status": status,
                "error_kind": kind,
                "error": kind,
                "model_id": model_id,
                "run_id": run_id,
                "labeled_at": datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=at_s),
                "num_detections": 2 if ok else None,
                "max_score": 0.75 if ok else None,
                "detections": [_detection(1, 0.75, 2), _detection(3, 0.5, 1)] if ok else None,
            }
        )
    for name, value in (changes or {}).items():
        target = rows[0] if name in LABEL_SCHEMA.names else rows[0]["detections"][0]
        target[name] = value
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def _detection(category_id: int, score: float, width: int) -> dict[str, Any]:
    mask = np.zeros((1, HEIGHT, WIDTH), np.bool_)
    mask[0, 1:3, 2 : 2 + width] = True
    return {
        "category_id": category_id,
        "score": score,
        "box": {"x0": 2.0, "y0": 1.0, "x1": 2.0 + width, "y1": 3.0},
        "area": 2 * width,
        "rle": encode_masks(mask)[0],
    }
