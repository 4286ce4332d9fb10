"""A bucket over which `masklake relabel` runs night by night, and oracles that say what must come of it.

Enters: images and models, as a test changes them. Leaves: after each night, whose labels of which content
must be current, reckoned in plain Python from the source alone; and those that are.
"""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from jobs.lake.aliases import Aliases
from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import Storage
from jobs.lake.views import current_labels
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from schemas.specs import StorageSpec
from tests.chaos.harness import make_images, make_source
from tests.chaos.judge import read_table
from tests.integration.conftest import S3Server

UNIT = 2  # images
Images = dict[str, bytes]


@dataclass(frozen=True)
class Night:
    """`masklake relabel` as its scheduler runs it. budget: images a night."""

    bucket: str
    budget: int
    settings: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        settings = [
            f"budget.max_images={self.budget}",
            f"unit.max_images={UNIT}",
            "commit.every_images=6",
            "model.min_size_px=64",
            "model.max_size_px=96",
            "model.max_detections=5",
            "pool.cpus_per_actor=1",
            "failures.budget=100%",
            "gate.max_lost=40%",
            "gate.min_score=0.05",
            *self.settings,
        ]
        uris = {"source": f"{self.bucket}/images", "model": "alias:champion", "lake": f"{self.bucket}/lake"}
        flags = [word for name, uri in uris.items() for word in (f"--{name}", uri)]
        return ["relabel", *flags, "--json", *(word for setting in settings for word in ("--set", setting))]


@dataclass
class Oracle:
    """What must be current, by the rules and nothing of the product's.

    labelled: of each model, image_id -> content that it labelled. refused: models that the gate refuses.
    """

    budget: int
    labelled: dict[str, Images] = field(default_factory=dict)
    current: str | None = None
    refused: frozenset[str] = frozenset()

    def night(self, target: str) -> str:
        """One undisturbed night; gives its status."""
        left = self.budget
        was_current = self.current
        for model in [was_current, target] if was_current not in (None, target) else [target]:
            assert model is not None
            num, is_limited = self.label(model, target, left)
            left -= num
            if is_limited:
                self.current = was_current or target  # the only model that has labels
                return "limited"
        if was_current == target:
            return "up_to_date"
        if was_current is not None and target in self.refused:
            return "refused"
        self.current = target
        return "promoted"

    def label(self, model: str, target: str, left: int) -> tuple[int, bool]:
        """One model over the source; gives how many images it labelled, and whether that ended the night."""
        raise NotImplementedError

    def must_be_current(self) -> dict[str, tuple[str, bytes]]:
        """image_id -> whose labels of which content."""
        assert self.current is not None
        return {key: (self.current, digest(data)) for key, data in self.labelled[self.current].items()}


@dataclass
class FilesOracle(Oracle):
    """Of images that are objects of their own."""

    source: Images = field(default_factory=dict)

    def label(self, model: str, target: str, left: int) -> tuple[int, bool]:
        done = self.labelled.setdefault(model, {})
        for key in [key for key in done if key not in self.source]:
            del done[key]
        others = self.labelled.get(self.current or "", {}) if model == target != self.current else {}
        to_do = [key for key, data in self.source.items() if done.get(key) != data]

        def rank(key: str) -> tuple[int, str]:
            is_stale = key not in done and others.get(key) == self.source[key]
            is_changed = key in done or (key in others and not is_stale)
            return (3 if is_stale else 1 if is_changed else 0), key

        num = min(left, len(to_do))
        for key in sorted(to_do, key=rank)[:num]:
            done[key] = self.source[key]
        return num, bool(to_do) and num == left


@dataclass
class ShardOracle(Oracle):
    """Of images in tar or Parquet shards, which are wanted in order of their names.

    shards: name -> image_id -> content, in order. closed: of each model, shards as it read them to their end.
    """

    shards: dict[str, Images] = field(default_factory=dict)
    closed: dict[str, dict[str, Images]] = field(default_factory=dict)

    def label(self, model: str, target: str, left: int) -> tuple[int, bool]:
        """Units of one shard, until the budget is used up; what a shard lost is known at its end."""
        done, closed = self.labelled.setdefault(model, {}), self.closed.setdefault(model, {})
        for key in [key for key in done if key.partition("/")[0] not in self.shards]:
            del done[key]
        num = 0
        for name, images in sorted(self.shards.items()):
            if closed.get(name) == images:
                continue
            if num >= left:
                return num, True
            to_do = [key for key, data in images.items() if done.get(key) != data]
            for start in range(0, len(to_do), UNIT):
                unit = to_do[start : start + UNIT]
                done.update({key: images[key] for key in unit})
                num += len(unit)
                if num >= left:
                    return num, True
            closed[name] = dict(images)
            for key in [key for key in done if key.startswith(f"{name}/") and key not in images]:
                del done[key]
        return num, False


class Month:
    """The bucket, its models, and what is current in it."""

    def __init__(self, server: S3Server, seed: int) -> None:
        self.client = server.client()
        self.name = f"month-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.name)
        self.uri = f"s3://{self.name}"
        self.lake = f"{self.uri}/lake"
        self.storage = Storage(StorageSpec(endpoint_url=server.endpoint_url))
        self.env = {"AWS_ENDPOINT_URL": server.endpoint_url}
        self.rng = random.Random(seed)
        self.fresh = iter(make_images(200, seed).values())
        registry = ModelRegistry(self.lake, self.storage)
        self.models = {name: registry.register(name, data, print_) for name, data, print_ in _checkpoints()}
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
        model: ModelVersion = self.models[name]
        Aliases(self.lake, self.storage).move("champion", model, "the test", "it is time")
        self.target = name

    def check(self, oracle: Oracle) -> None:
        """What a reader sees against the oracle, and the table as a whole."""
        labels = current_labels(self.lake, self.storage).relation()
        found = {
            key: (model_id.rpartition("-")[0], bytes(content))
            for key, model_id, content in labels.select("image_id, model_id, content_hash").fetchall()
        }
        assert found == oracle.must_be_current()
        assert read_table(self.lake, self.storage).problems == []

    def done_by_table(self, contents: Mapping[bytes, bytes]) -> dict[str, Images]:
        """What each model labelled, by the table: after a kill only it can know how far the night came.

        Args:
            contents: digest -> content of what is in the source.
        """
        table = self.table
        found: dict[str, Images] = {}
        for model_id in table.model_ids():
            rows = table.to_current(model_id).select("image_id, content_hash").fetchall()
            name = model_id.rpartition("-")[0]
            found[name] = {key: contents.get(bytes(content), b"another") for key, content in rows}
        return found


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


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
