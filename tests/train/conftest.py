"""A small data set of rendered scenes, and training jobs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.demo.lake import write_scene_lake
from jobs.lake.storage import Storage
from jobs.train.beginning import begin
from jobs.train.recipe import make_recipe
from jobs.train.run_record import read_record
from jobs.train.worker import WorkerJob
from schemas.spec_loader import parse_spec
from schemas.train_spec import TrainSpec

MakeSpec = Callable[..., TrainSpec]
MakeJob = Callable[[TrainSpec], WorkerJob]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """annotations.json and images/ in two tars: 12 scenes of 256 px."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_lake(folder, range(10_000_000, 10_000_012), 2)
    return folder


@pytest.fixture
def make_spec(scenes: Path, tmp_path: Path) -> MakeSpec:
    """A spec of a few steps in float32 on the scenes; sections as keywords."""

    def make(**sections: dict[str, Any]) -> TrainSpec:
        recipe = {"name": "scenes", "steps": 6, "total_batch": 2, "precision": "fp32"}
        recipe |= {"shorter_sides": [128], "calibration_batches": 1}
        data = {"uri": f"coco:{scenes}/annotations.json", "images": f"{scenes}/images"}
        return parse_spec(
            TrainSpec,
            {
                "data": {"scenes": data},
                "model": {"uri": "lite"} | sections.pop("model", {}),
                "out": {"uri": str(tmp_path / "run")},
                "recipe": recipe | sections.pop("recipe", {}),
                **sections,
            },
            "spec",
        )

    return make


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """What a worker is told to take the run up, or to begin it."""

    def make(spec: TrainSpec) -> WorkerJob:
        storage, recipe = Storage(spec.storage), make_recipe(spec.recipe)
        out_uri = storage.normalize(spec.out.uri)
        record = read_record(out_uri, spec, storage) or begin(spec, recipe, out_uri, storage, print)
        return WorkerJob(record, recipe, spec, out_uri, storage, tmp_path / "sets", 1, 1, log_every_s=0.0)

    return make
