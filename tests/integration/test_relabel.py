"""`masklake plan` and `masklake relabel` whole, on Ray, from the registry to the promoted labels."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from PIL import Image

from jobs.demo.scenes import render_scene
from jobs.infer.progress import JsonWatcher
from jobs.lake.aliases import Aliases
from jobs.lake.current import read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import Storage
from jobs.lake.views import current_labels
from jobs.relabel.forecast import run_forecast
from jobs.relabel.run import RelabelSummary, run_relabel
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from schemas.errors import GateRefused
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec
from schemas.specs import StorageSpec

pc: Any = pyarrow.compute  # whose stubs know no arrays of unknown type

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class Lake:
    """A folder of rendered scenes, and a lake whose alias `champion` says which model labels them."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "images"
        self.images.mkdir()
        self.uri = f"file://{folder}/lake"
        self.storage = Storage(StorageSpec())
        content, where = read_checkpoint_bytes("demo", self.storage)
        self.good = content
        model = parse_checkpoint(content, where).build()
        with torch.no_grad():
            model.state_dict()["roi_heads.box_predictor.cls_score.bias"][0] += 100.0  # all is background
        self.blind = dump_checkpoint(model, "blind")

    def render(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            data = io.BytesIO()
            Image.fromarray(render_scene(seed).image).save(data, "JPEG", quality=95)
            (self.images / f"{seed:03d}.jpg").write_bytes(data.getvalue())

    def crown(self, name: str, content: bytes) -> ModelVersion:
        checkpoint = parse_checkpoint(content, name)
        registry = ModelRegistry(self.uri, self.storage)
        version = registry.register(name, content, checkpoint.fingerprint, {})
        Aliases(self.uri, self.storage).move("champion", version, "a test", "")
        return version

    def spec(self, *overrides: str) -> RelabelSpec:
        uris = {"source.uri": str(self.images), "model.uri": "alias:champion", "lake.uri": self.uri}
        return load_spec(RelabelSpec, None, ["unit.max_images=4", *overrides], **uris)

    def relabel(self, *overrides: str) -> RelabelSummary:
        return run_relabel(self.spec(*overrides), JsonWatcher())

    def current(self) -> pa.Table:
        return current_labels(self.uri, self.storage).reader().read_all().sort_by("image_id")

    def table(self) -> LabelsTable:
        return LabelsTable.open(self.uri, self.storage)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path)


def test_a_lake_is_labelled_kept_up_to_date_and_a_worse_model_stays_outside(lake: Lake) -> None:
    lake.render(range(12))
    good = lake.crown("scenes", lake.good)

    planned = run_forecast(lake.spec(), sample=4)
    assert planned.images == 12
    assert not Path(lake.uri.removeprefix("file://"), "labels").exists()  # a plan writes nothing

    first = lake.relabel()
    assert (first.status, first.images, first.model) == ("promoted", 12, str(good))
    before = lake.current()
    assert before["status"].to_pylist() == ["ok"] * 12
    assert pc.sum(pc.list_value_length(before["detections"])).as_py() > 12

    nothing = lake.relabel()
    assert (nothing.status, nothing.images) == ("up_to_date", 0)
    assert lake.table().version == first.version

    lake.render(range(12, 15))  # 3 new
    shutil.copy(lake.images / "012.jpg", lake.images / "001.jpg")  # 1 changed
    (lake.images / "000.jpg").unlink()  # 1 gone
    planned = run_forecast(lake.spec(), sample=0)
    (part,) = planned.passes
    assert (part.counts["new"], part.counts["changed"], part.removed) == (3, 1, 1)
    second = lake.relabel()
    assert (second.status, second.images) == ("up_to_date", 4)
    labels = {row["image_id"]: row["detections"] for row in lake.current().to_pylist()}
    assert sorted(labels) == [f"{seed:03d}.jpg" for seed in range(1, 15)]
    assert labels["001.jpg"] == labels["012.jpg"]

    lake.crown("blind", lake.blind)
    with pytest.raises(GateRefused, match="max_lost"):
        lake.relabel("gate.max_lost=5%")
    (kept,) = read_current(lake.table()).values()
    assert kept.model == str(good)
    assert {row["image_id"]: row["detections"] for row in lake.current().to_pylist()} == labels
