"""A bucket over which `masklake relabel` runs night by night, as an oracle says, through kills and refusals.

Enters: a calendar: which model is wanted when, which nights are killed. Leaves: after each night, and after
each kill, whether what a reader sees is exactly what the oracle says, down to the detections.
"""

from __future__ import annotations

import random
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.lake.aliases import Aliases
from jobs.lake.failpoints import VARIABLE as FAILPOINTS
from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import Storage
from jobs.lake.views import current_labels
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from schemas.specs import StorageSpec
from tests.chaos.harness import Drivers, Ended, make_images, make_source, write_source
from tests.chaos.judge import Row, read_table
from tests.chaos.night_oracle import UNIT, Images, Oracle, digest
from tests.integration.conftest import S3Server

BROKEN = b"no image at all"
_SETTINGS = (
    f"unit.max_images={UNIT}",
    "commit.every_images=6",
    "model.min_size_px=64",
    "model.max_size_px=96",
    "model.max_detections=5",
    "pool.cpus_per_actor=1",
    "failures.budget=100%",
)


@dataclass(frozen=True)
class Words:
    """A command line."""

    words: tuple[str, ...]

    def argv(self) -> list[str]:
        return list(self.words)


def command(name: str, source: str, model: str, lake: str, *settings: str) -> Words:
    flags = ("--source", source, "--model", model, "--lake", lake, "--json")
    return Words((name, *flags, *(word for setting in settings for word in ("--set", setting))))


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a failpoint, on the first night from `night` on that would label so many images, at least,
    and end with the status.
    """

    night: int
    failpoint: str
    images: int = 0
    status: str | None = None

    def is_due(self, night: int, would: Oracle, status: str) -> bool:
        return night >= self.night and len(would.steps) >= self.images and self.status in (None, status)


@dataclass(frozen=True)
class Calendar:
    """nights: how many. champions: from which night on the alias means which model. two_at_once: the night on
    which two runs start; rolled_back: the one before which `masklake rollback` is run.
    """

    nights: int
    champions: Mapping[int, str]
    kills: tuple[Kill, ...] = ()
    two_at_once: int | None = None
    rolled_back: int | None = None


class Month:
    """The bucket, its models, and what is current in it.

    Args:
        folder: for a run of `masklake infer` with each model over every image there will be: what a label job
            finds that knows nothing of nights.
        budget: images a night.
        num_images: that can come.
    """

    def __init__(
        self,
        server: S3Server,
        drivers: Drivers,
        folder: Path,
        seed: int,
        budget: int,
        num_images: int = 140,
        settings: tuple[str, ...] = (),
    ) -> None:
        self.drivers = drivers
        self.client = server.client()
        self.name = f"month-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.name)
        self.source, self.lake = f"s3://{self.name}/images", f"s3://{self.name}/lake"
        self.storage = Storage(StorageSpec(endpoint_url=server.endpoint_url))
        self.env = {"AWS_ENDPOINT_URL": server.endpoint_url}
        self.rng = random.Random(seed)
        images = make_images(num_images, seed)
        self.fresh = iter(images.values())
        registry = ModelRegistry(self.lake, self.storage)
        self.models: dict[str, ModelVersion] = {}
        self.straight: dict[tuple[str, bytes], dict[str, Any]] = {}
        pool = write_source(folder / "pool", images | {"broken.jpg": BROKEN})
        for name, data, fingerprint in _checkpoints():
            self.models[name] = registry.register(name, data, fingerprint)
            (folder / f"{name}.safetensors").write_bytes(data)
            self._label_straight(name, pool, folder)
        self.night = command(
            "relabel",
            self.source,
            "alias:champion",
            self.lake,
            *_SETTINGS,
            f"budget.max_images={budget}",
            "gate.max_lost=40%",
            "gate.min_score=0.05",
            *settings,
        )
        self.target = ""

    @property
    def table(self) -> LabelsTable:
        return LabelsTable.open(self.lake, self.storage)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"images/{key}", Body=data)

    def put_shard(self, form: str, name: str, images: Mapping[str, bytes]) -> Images:
        """Write a tar or Parquet shard; gives image_id -> content."""
        (data,) = make_source(form, images, num_shards=1).values()
        self.put(name, data)
        if form == "tar":
            return {f"{name}/{key.removesuffix('.jpg')}": content for key, content in images.items()}
        return {f"{name}/{row:09d}": content for row, content in enumerate(images.values())}

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"images/{key}")

    def choose(self, name: str) -> None:
        Aliases(self.lake, self.storage).move("champion", self.models[name], "the test", "it is time")
        self.target = name

    def live(self, calendar: Calendar, oracle: Oracle, day: Callable[[int], None]) -> list[str]:
        """All nights, each checked; gives their statuses.

        Args:
            day: changes the source and tells the oracle, before each night.
        """
        statuses: list[str] = []
        kills = list(calendar.kills)
        for night in range(calendar.nights):
            day(night)
            if night in calendar.champions:
                self.choose(calendar.champions[night])
            if night == calendar.rolled_back:
                self.roll_back(oracle)
            would, status = oracle.foretell(self.target)
            is_alone = night != calendar.two_at_once
            kill = next((kill for kill in kills if is_alone and kill.is_due(night, would, status)), None)
            if kill is not None:
                kills.remove(kill)
                self._kill(kill, oracle, would)
                print(f"night {night}: killed at {kill.failpoint}")
            ended = self.drivers.run(self.night, self.env) if is_alone else self._two_at_once()
            statuses.append(oracle.night(self.target))
            print(f"night {night}: {self.target} {statuses[-1]}, {len(oracle.images())} images")
            _check_end(ended, statuses[-1])
            self.check(oracle)
        assert kills == [], "no night had such work"
        return statuses

    def roll_back(self, oracle: Oracle) -> None:
        """As somebody does who found the new labels to be no good."""
        before = self.table.version
        words = ("rollback", "--lake", self.lake, "--why", "it is no good", "--json")
        ended = self.drivers.run(Words(words), self.env)
        assert ended.status == 0, ended.stderr
        assert (ended.summary["version"], ended.summary["changed"]) == (before + 1, True)
        (current,) = ended.summary["current"].values()
        oracle.roll_back(current.rpartition("-")[0])
        self.check(oracle)

    def check(self, oracle: Oracle) -> None:
        """What a reader sees against the oracle, and the table as a whole."""
        labels = current_labels(self.lake, self.storage).relation().to_arrow_table().to_pylist()
        found = sorted((row["image_id"], _name(row), row["content_hash"]) for row in labels)
        assert found == oracle.must_be_current()
        for row in labels:
            assert _labels(row) == self.straight[_name(row), row["content_hash"]], row["image_id"]
        assert read_table(self.lake, self.storage).problems == []

    def _label_straight(self, model: str, pool: str, folder: Path) -> None:
        lake = str(folder / f"{model}-lake")
        job = command("infer", pool, str(folder / f"{model}.safetensors"), lake, *_SETTINGS)
        ended = self.drivers.run(job)
        assert ended.status == 0, ended.stderr
        for row in read_table(lake, Storage(StorageSpec())).rows:
            self.straight[model, row["content_hash"]] = _labels(row)
        assert self.straight[model, digest(BROKEN)]["status"] == "failed"

    def _kill(self, kill: Kill, oracle: Oracle, would: Oracle) -> None:
        """Readers see the night before, and a beginning of this one: what it committed."""
        runs = {row["run_id"] for row in read_table(self.lake, self.storage).rows}
        killed = self.drivers.run(self.night, self.env | {FAILPOINTS: kill.failpoint})
        assert killed.status == -signal.SIGKILL, f"{kill}: {killed.status}, {killed.stderr}"
        table = read_table(self.lake, self.storage)
        assert table.problems == []
        oracle.killed(would, [row for row in table.rows if row["run_id"] not in runs])
        if kill.failpoint == "current_put":
            oracle.promoted(self.target)
        self.check(oracle)

    def _two_at_once(self) -> Ended:
        started = [self.drivers.start(self.night, self.env) for _ in range(2)]
        first, second = sorted((driver.wait() for driver in started), key=lambda end: end.status)
        assert (first.status, second.status) == (0, 5), (first.stderr, second.stderr)
        assert first.summary["run_id"] in second.last_line
        return first


def _check_end(ended: Ended, wanted: str) -> None:
    reasons = {"refused": "max_lost", "rolled back": "was rolled back"}
    if wanted in reasons:
        ended.check_clear_end(4)
        assert reasons[wanted] in ended.last_line
    else:
        assert ended.status == 0, ended.stderr
        assert ended.summary["status"] == wanted, ended.summary


def _name(row: Row) -> str:
    """Of the model."""
    return str(row["model_id"]).rpartition("-")[0]


def _labels(row: Row) -> dict[str, Any]:
    columns = ("status", "error_kind", "width", "height", "num_detections", "max_score", "detections")
    return {column: row[column] for column in columns}


def _checkpoints() -> Iterator[tuple[str, bytes, str]]:
    """Four models that label the same categories; the third one finds nothing. (name, file, fingerprint)"""
    content, where = read_checkpoint_bytes("demo", Storage(StorageSpec()))
    for number in range(4):
        model = parse_checkpoint(content, where).build()
        with torch.no_grad():
            bias = model.state_dict()["roi_heads.box_predictor.cls_score.bias"]
            bias += 1e-3 * number
            bias[0] += 100.0 if number == 2 else 0.0
        data = dump_checkpoint(model, f"m{number + 1}")
        yield f"m{number + 1}", data, parse_checkpoint(data, where).fingerprint
