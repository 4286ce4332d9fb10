"""The label table as training data: which rows, which detections, and the way back to the bytes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.train.image_locations import ImageReader
from jobs.train.label_rows import LabelRows
from jobs.train.training_set import TrainingSet, build
from maskrcnn_core.masks import encode_masks
from schemas.errors import UsageError
from schemas.labels import LABEL_SCHEMA
from schemas.specs import SourceSpec
from tests.lake.tars import make_tar
from tests.train.coco_files import CATEGORIES, HEIGHT, WIDTH, picture, storage, write_files

MASK = np.zeros((HEIGHT, WIDTH), np.bool_)
MASK[3:13, 2:12] = True
(RLE,) = encode_masks(MASK[None])
TAR = {"a.tar": make_tar({f"{n}.png": picture(n) for n in range(4)})}


def detection(score: float, category_id: int = 3, **changes: Any) -> dict[str, Any]:
    box = {"x0": 2.0, "y0": 3.0, "x1": 12.0, "y1": 13.0}
    return {"category_id": category_id, "score": score, "box": box, "area": 100, "rle": RLE} | changes


def row(
    image_id: str, found: Sequence[Mapping[str, Any]], source: str, *, day: int = 1, **changes: Any
) -> dict[str, Any]:
    entry = {
        "image_id": image_id,
        "source": source,
        "shard": image_id.rpartition("/")[0],
        "content_hash": bytes(16),
        "width": WIDTH,
        "height": HEIGHT,
        "status": "ok",
        "error_kind": None,
        "error": None,
        "model_id": "m-000000000000",
        "run_id": "run-1",
        "labeled_at": datetime(2026, 1, day, tzinfo=UTC),
        "num_detections": len(found),
        "max_score": None,
        "detections": found,
    }
    return entry | changes


def failed(image_id: str, source: str, *, day: int = 1, status: str = "failed") -> dict[str, Any]:
    return row(image_id, [], source, day=day, status=status, detections=None, width=None, height=None)


class Lake:
    """A lake on disk over a folder of images; add() commits rows as a new version."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self.source = f"file://{write_files(folder / 'images', files)}"
        self.uri = f"file://{folder}/lake"
        self._path = folder / "set.arrow"
        self._table = LabelsTable.open_or_create(self.uri, storage())

    def add(self, *rows: Mapping[str, Any]) -> int:
        committer = Committer(DeltaStore(self._table), app_id("tests", ""), {}, every_s=60, every_images=1)
        model_id = rows[0]["model_id"]
        table = pa.Table.from_pylist(list(rows), schema=LABEL_SCHEMA)
        committer.add(write_fragment(table, [uuid.uuid4().hex], self.uri, model_id, storage()))
        version = committer.commit()
        assert version is not None
        return version

    def records(self, **settings: Any) -> LabelRows:
        scores = {"min_score": 0.3, "ignore_below": 0.7}
        return LabelRows(self.uri, storage(), **(scores | settings))

    def train_on(self, strict: bool = False, **settings: Any) -> TrainingSet:
        return build(self._path, self.records(**settings), CATEGORIES, storage(), strict=strict)


def test_scores_tell_instances_from_regions_to_ignore_and_from_background(tmp_path: Path) -> None:
    lake = Lake(tmp_path, TAR)
    scores = [(0.7, 3), (0.69, 7), (0.3, 3), (0.29, 3), (0.95, 7)]
    version = lake.add(
        row("a.tar/0", [detection(*pair) for pair in scores], lake.source), row("a.tar/1", [], lake.source)
    )
    made = lake.train_on(strict=True)
    known = made.annotations(0)
    assert known.class_indices.tolist() == [1, 2, 1, 2]
    assert known.ignored.tolist() == [False, True, True, False]
    assert known.boxes.tolist() == [[2, 3, 12, 13]] * 4
    assert known.rles == [RLE] * 4
    assert len(made.annotations(1).rles) == 0
    assert made.description == {
        "lake": lake.uri,
        "version": version,
        "model_id": "m-000000000000",
        "min_score": 0.3,
        "ignore_below": 0.7,
    }


def test_only_the_newest_row_of_an_image_counts_and_only_if_it_has_labels(tmp_path: Path) -> None:
    lake = Lake(tmp_path, TAR)
    lake.add(*(row(f"a.tar/{n}", [detection(0.9)], lake.source) for n in range(4)))
    lake.add(
        row("a.tar/0", [detection(0.9)] * 2, lake.source, day=2),
        failed("a.tar/1", lake.source, day=2),
        failed("a.tar/2", lake.source, day=2, status="removed"),
    )
    made = lake.train_on()
    assert {made.name(k): len(made.annotations(k).rles) for k in range(len(made))} == {
        "a.tar/0": 2,
        "a.tar/3": 1,
    }
    assert made.problems == {"failed_image": 1}


def test_a_pinned_version_gives_the_same_set_after_the_lake_has_moved_on(tmp_path: Path) -> None:
    lake = Lake(tmp_path, TAR)
    version = lake.add(row("a.tar/0", [detection(0.9)], lake.source))
    before = lake.train_on(version=version)
    lake.add(row("a.tar/0", [], lake.source, day=2), row("a.tar/1", [detection(0.9)], lake.source))
    again = lake.train_on(version=version)
    assert again.fingerprint == before.fingerprint
    assert again.description == before.description
    assert len(lake.train_on()) == 2


@pytest.mark.parametrize(
    ("files", "settings", "image_id"),
    [
        ({"deep/one.png": picture(0)}, {}, "deep/one.png"),
        ({"images.csv": b"uri\nz/p.png\n", "z/p.png": picture(0)}, {"uri": "images.csv"}, "z/p.png"),
        (TAR, {}, "a.tar/0"),
        ({"x.bin": TAR["a.tar"]}, {"format": "tar", "include": "*.bin"}, "x.bin/0"),
    ],
)
def test_rows_lead_back_to_the_bytes_by_the_settings_of_the_run_that_made_them(
    tmp_path: Path, files: dict[str, bytes], settings: dict[str, str], image_id: str
) -> None:
    lake = Lake(tmp_path, files)
    source = f"{lake.source}/{settings['uri']}" if "uri" in settings else lake.source
    shards = {"deep/one.png": ".", "z/p.png": "images.csv"}
    found = row(image_id, [detection(0.9)], source)
    lake.add(found | {"shard": shards.get(image_id, found["shard"])})
    spec = SourceSpec.model_validate({"uri": "was/relative"} | settings).model_dump(mode="json")
    record = write_files(
        tmp_path / "lake", {"runs/run-1/spec.yaml": yaml.safe_dump({"source": spec}).encode()}
    )
    assert record.is_dir()
    made = lake.train_on(strict=True)
    assert ImageReader(storage()).read(made.location(0)) == picture(0)


def test_an_image_that_is_gone_is_not_taken_for_another_of_the_same_name(tmp_path: Path) -> None:
    lake = Lake(tmp_path, {"b/1.png": picture(1)})
    lake.add(
        row("a/1.png", [detection(0.9)], lake.source, shard="."),
        row("b/1.png", [detection(0.9)], lake.source, shard="."),
    )
    made = lake.train_on()
    assert [made.name(k) for k in range(len(made))] == ["b/1.png"]
    assert made.problems == {"missing_image": 1}


def test_labels_that_are_no_good_are_counted_like_drawn_ones(tmp_path: Path) -> None:
    lake = Lake(tmp_path, TAR)
    flat = {"x0": 2.0, "y0": 3.0, "x1": 2.0, "y1": 13.0}
    wrong = [
        detection(0.9, box=flat),
        detection(0.9, 99),
        detection(0.9, rle=b"1"),
        detection(0.9, rle=b"~~"),
    ]
    lake.add(row("a.tar/0", [detection(0.9), *wrong], lake.source))
    made = lake.train_on()
    assert made.problems == {"box_without_area": 1, "unknown_category": 1, "bad_rle": 2}
    assert made.annotations(0).class_indices.tolist() == [1]


def test_scores_in_the_wrong_order_and_unknown_models_are_refused(tmp_path: Path) -> None:
    lake = Lake(tmp_path, TAR)
    lake.add(row("a.tar/0", [detection(0.9)], lake.source))
    lake.add(row("a.tar/0", [], lake.source, model_id="n-000000000000"))
    with pytest.raises(UsageError, match=r"min_score is 0\.8 and ignore_below 0\.7"):
        lake.records(min_score=0.8)
    with pytest.raises(UsageError, match="name one of them"):
        lake.records()
    with pytest.raises(UsageError, match="has no version 9"):
        lake.records(version=9)
    assert lake.records(model_id="n-000000000000").model_id == "n-000000000000"
