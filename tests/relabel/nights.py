"""A lake whose nights take milliseconds: the product's own, but for Ray and the network.

A stub model is a JSON file in the registry, and says what it finds: in every image a 4x4 box of a category.
The bytes of an image are any.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import jobs.infer.job
import jobs.infer.run
import jobs.relabel.run
from cluster.session import ClusterInfo
from jobs.infer.job import prepare
from jobs.infer.pipeline import Pipeline
from jobs.infer.rows import Failure, label_rows
from jobs.infer.summary import Summary
from jobs.infer.units import LABELLED_SCHEMA, UnitReport, images_of, table_to_bytes
from jobs.lake.aliases import Aliases
from jobs.lake.current import promote, read_current, rollback
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import record_model_id
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.sources import SourceImage, list_shards
from jobs.lake.storage import AccessDeniedError, ObjectInfo, Storage
from jobs.lake.views import current_labels
from jobs.relabel.night import Night, plan_night
from jobs.relabel.run import RelabelSummary, run_relabel
from maskrcnn_core.masks import encode_masks
from maskrcnn_core.predictor import Detections
from schemas.labels import ErrorKind
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec
from schemas.specs import ModelSpec, StorageSpec
from tests.relabel.two_models import add_rows
from tests.straight_pipeline import WITHOUT_RAY, run_straight

_SETTINGS: Mapping[str, Any] = {
    "score_threshold": 0.05,
    "nms_threshold": 0.5,
    "mask_threshold": 0.5,
    "max_detections": 100,
    "min_size_px": 64,
    "max_size_px": 96,
}


@dataclass(frozen=True)
class StubCheckpoint:
    """As maskrcnn_core.checkpoint.Checkpoint, as far as a label job looks into it."""

    name: str
    categories: Sequence[tuple[int, str]]
    finds: int | None  # a category_id
    fails_on: Collection[str]  # contents of images
    fingerprint: str
    config: Any = field(default_factory=lambda: SimpleNamespace(preset="lite"))

    def build(self, **overrides: Any) -> Any:
        return SimpleNamespace(config=SimpleNamespace(**_SETTINGS, categories=self.categories))

    def model_id(self, precision: str, **overrides: Any) -> str:
        return f"{self.name}-{self.fingerprint[:12]}"

    def look(self, image: SourceImage) -> Detections | Failure:
        if image.error_kind is not None:
            return Failure(image.error_kind, image.error or "")
        if image.data is not None and image.data.decode(errors="replace") in self.fails_on:
            return Failure(ErrorKind.CORRUPT, "so the test wants it")
        return _look(self.finds)


def parse_stub(content: bytes, where: str) -> StubCheckpoint:
    values = json.loads(content)
    categories = [(int(category_id), name) for category_id, name in values["categories"]]
    fingerprint = hashlib.sha256(content).hexdigest()
    return StubCheckpoint(values["name"], categories, values["finds"], values["fails_on"], fingerprint)


class Watcher:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.num_tasks = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, num_shards: int, num_bytes: int) -> None:
        self.num_tasks += num_shards

    def update(self, summary: Summary) -> None: ...

    def stop(self, summary: Summary) -> None: ...


class Nights:
    """A folder of images, a lake, and what was seen of its nights.

    labelled, read: ids of images that the (stub) network got, that were read from the source, since the start
    of the last night. notes, num_tasks: of the last night, what was said and how many shards or slices were
    to be read; ray_starts: how often Ray would have been started. denied: images that cannot be read.
    meanwhile: called before each unit is labelled. now_s: the time, as budgets have it; stands still by
    itself.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = folder / "images"
        self.source.mkdir()
        self.storage = Storage(StorageSpec())
        self.source_uri = self.storage.normalize(str(self.source))
        self.lake = self.storage.normalize(str(folder / "lake"))
        self.registry = ModelRegistry(self.lake, self.storage)
        self.labelled: list[str] = []
        self.read: list[str] = []
        self.notes: list[str] = []
        self.num_tasks = 0
        self.ray_starts = 0
        self._connections = 0
        self.denied: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        self.now_s = 1000.0
        self._clock_ns = 1_700_000_000 * 10**9
        read_bytes = Storage.read_bytes

        def read_and_count(storage: Storage, info: ObjectInfo) -> bytes:
            if info.uri.startswith(f"{self.source_uri}/"):
                name = info.uri.rpartition("/")[2]
                if name.removesuffix(".jpg") in self.denied:
                    raise AccessDeniedError(f"{info.uri}: access denied")
                self.read.append(name)
            return read_bytes(storage, info)

        monkeypatch.setattr(Storage, "read_bytes", read_and_count)
        monkeypatch.setattr(jobs.infer.job, "parse_checkpoint", parse_stub)  # a real one takes 0.7 s
        for name, stand_in in {**WITHOUT_RAY, "run_pipeline": self._run_pipeline}.items():
            monkeypatch.setattr(jobs.infer.run, name, stand_in)
        for module in (jobs.infer.run, jobs.relabel.run):
            monkeypatch.setattr(module, "connect", self._connect)
            monkeypatch.setattr(module, "shutdown", self._shutdown)
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def put(self, **images: str) -> None:
        """Write a.jpg for `a="content"`."""
        for name, content in images.items():
            (self.source / f"{name}.jpg").write_text(content)
            self.touch(name)

    def touch(self, name: str) -> None:
        """The same content at another time."""
        self._clock_ns += 10**9
        os.utime(self.source / f"{name}.jpg", ns=(self._clock_ns, self._clock_ns))

    def delete(self, name: str) -> None:
        (self.source / f"{name}.jpg").unlink()

    def register(
        self,
        name: str,
        finds: int | None = 1,
        categories: Sequence[tuple[int, str]] = ((1, "door"),),
        fails_on: Sequence[str] = (),
    ) -> ModelVersion:
        values = {"name": name, "categories": list(categories), "finds": finds, "fails_on": list(fails_on)}
        content = json.dumps(values).encode()
        return self.registry.register(name, content, parse_stub(content, "").fingerprint)

    def choose(self, version: ModelVersion) -> ModelVersion:
        """Let the alias champion mean it."""
        Aliases(self.lake, self.storage).move("champion", version, "a test", "")
        return version

    def spec(self, *settings: str) -> RelabelSpec:
        uris = {"source.uri": str(self.source), "model.uri": "alias:champion", "lake.uri": self.lake}
        return load_spec(RelabelSpec, None, ["unit.max_images=2", "commit.compact=false", *settings], **uris)

    def argv(self, *settings: str) -> list[str]:
        """The same on a command line."""
        uris = ["--source", str(self.source), "--model", "alias:champion", "--lake", self.lake]
        settings = ("unit.max_images=2", "commit.compact=false", *settings)
        return ["relabel", *uris, *(word for setting in settings for word in ("--set", setting))]

    def night(self, *settings: str) -> RelabelSummary:
        self.begin()
        watcher = Watcher()
        try:
            return run_relabel(self.spec(*settings), watcher)
        finally:
            self.notes, self.num_tasks = watcher.notes, watcher.num_tasks

    def begin(self) -> None:
        self.labelled.clear()
        self.read.clear()
        self.ray_starts = 0

    def given(self, version: ModelVersion, *names: str, at: datetime | None = None) -> str:
        """Labels of these images, or all, as a night with the model would have left them; its model_id."""
        job = prepare(self.spec().infer_spec(ModelSpec(uri=f"registry:{version}")))
        model = parse_stub(job.checkpoint, "")
        images = [
            SourceImage(image_id, ".", self.storage.read_bytes(info), None, None, info.version)
            for shard in list_shards(job.spec.source, self.storage)
            for image_id, info in shard.objects
            if info is not None and (not names or image_id.removesuffix(".jpg") in names)
        ]
        outcomes = [model.look(image) for image in images]
        rows = label_rows(images, outcomes, job.lineage, at or datetime.now(UTC))
        add_rows(LabelsTable.open_or_create(self.lake, self.storage), self.storage, rows)
        record_model_id(self.storage, self.lake, job.record)
        return job.model_id

    def promote(self, version: ModelVersion) -> None:
        promote(self.table, [self.source_uri], self.model_id(version), str(version), "ana", "")

    def rollback(self) -> None:
        rollback(self.table, [self.source_uri], "ana", "it is no good")

    def plan(self, *settings: str) -> Night:
        spec = self.spec(*settings)
        return plan_night(spec, prepare(spec.infer_spec()))

    def current(self) -> str | None:
        """The model_id that the table names."""
        said = read_current(self.table).get(self.source_uri)
        return None if said is None else said.model_id

    def model_id(self, version: ModelVersion) -> str:
        return f"{version.name}-{version.fingerprint[:12]}"

    @property
    def table(self) -> LabelsTable:
        return LabelsTable.open(self.lake, self.storage)

    def seen(self) -> dict[str, str]:
        """What readers see: `a` -> "m1 content", whose labels of which content."""
        contents = {}
        for path in self.source.iterdir():
            data = path.read_bytes()
            contents[hashlib.blake2b(data, digest_size=16).digest()] = data.decode()
        rows = current_labels(self.lake, self.storage).relation().select("image_id, model_id, content_hash")
        return {
            image_id.removesuffix(".jpg"): f"{model_id.partition('-')[0]} {contents.get(content, 'gone')}"
            for image_id, model_id, content in rows.fetchall()
        }

    def runs(self) -> list[str]:
        """Folders of runs that re-labelled."""
        folder = Path(self.lake.removeprefix("file://"), "runs")
        return sorted(path.name for path in folder.glob("relabel-*"))

    def files(self) -> set[str]:
        """Every file of the lake but leases."""
        folder = Path(self.lake.removeprefix("file://"))
        found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return {path for path in found if not path.startswith("leases/")}

    def _connect(self) -> ClusterInfo:
        self.ray_starts += self._connections == 0
        self._connections += 1
        return ClusterInfo(({"CPU": 2.0},), False)

    def _shutdown(self) -> None:
        self._connections -= 1

    def _run_pipeline(self, pipeline: Pipeline) -> Any:
        model = parse_stub(pipeline.checkpoint, "")

        def label(row: pa.Table) -> pa.Table:
            report = UnitReport.from_json(row["report"][0].as_py())
            images = list(images_of(row))
            if images:
                self.meanwhile()
            self.labelled += [image.image_id for image in images]
            outcomes = [model.look(image) for image in images]
            rows = label_rows(images, outcomes, pipeline.lineage, datetime.now(UTC))
            report.count_failures(rows["error_kind"].to_pylist())
            return pa.table(
                {
                    "unit_id": row["unit_id"],
                    "report": [report.to_json()],
                    "rows": pa.array([table_to_bytes(rows)], pa.large_binary()),
                },
                schema=LABELLED_SCHEMA,
            )

        return run_straight(pipeline, label)


def _look(finds: int | None) -> Detections:
    num = 0 if finds is None else 1
    pixels = np.zeros((num, 8, 8), np.bool_)
    pixels[:, 2:6, 2:6] = True
    return Detections(
        8,
        8,
        np.tile(np.array([[2, 2, 6, 6]], np.float32), (num, 1)),
        np.full(num, 0.9, np.float32),
        np.full(num, finds or 0, np.int32),
        encode_masks(pixels),
        np.full(num, 16, np.int32),
    )
