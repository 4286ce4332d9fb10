"""Thirty nights of `masklake relabel` over a source on S3 that grows, changes and shrinks, while models come,
are refused, promoted and rolled back, and nights are killed.

After each night the test says by itself, from the source alone, whose labels of which content must be
current; they are, exactly.
"""

from __future__ import annotations

import hashlib
import random
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from jobs.lake.aliases import Aliases
from jobs.lake.current import current_of, read_current, rollback
from jobs.lake.failpoints import VARIABLE as FAILPOINTS
from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import Storage
from maskrcnn_core.checkpoint import dump_checkpoint, parse_checkpoint
from schemas.specs import StorageSpec
from tests.chaos.harness import SEED, Drivers, make_images
from tests.chaos.judge import read_table
from tests.integration.conftest import S3Server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

NIGHTS = 30
BUDGET = 14  # images a night
KILLED_NIGHTS = {5: "commit_put#1", 11: "unit_finished#1", 21: "commit_send#2"}
TWO_AT_ONCE = 13


@dataclass(frozen=True)
class Night:
    """`masklake relabel` as its scheduler runs it."""

    bucket: str

    def argv(self) -> list[str]:
        settings = [
            f"budget.max_images={BUDGET}",
            "unit.max_images=2",
            "commit.every_images=6",
            "model.min_size_px=64",
            "model.max_size_px=96",
            "model.max_detections=5",
            "pool.cpus_per_actor=1",
            "failures.budget=100%",
            "gate.max_lost=40%",
            "gate.min_score=0.05",
        ]
        uris = [
            "--source",
            f"{self.bucket}/images",
            "--model",
            "alias:champion",
            "--lake",
            f"{self.bucket}/lake",
        ]
        return ["relabel", *uris, "--json", *(word for setting in settings for word in ("--set", setting))]


@dataclass
class Oracle:
    """What must be current, by the rules and nothing of the product's: plain sets over the source.

    labelled: of each model, image -> content that it labelled. failed: images that cannot be decoded.
    """

    source: dict[str, bytes] = field(default_factory=dict)
    labelled: dict[str, dict[str, bytes]] = field(default_factory=dict)
    current: str | None = None
    refused: frozenset[str] = frozenset()

    def night(self, target: str) -> str:
        """One undisturbed night; gives its status."""
        left = BUDGET
        models = [self.current, target] if self.current not in (None, target) else [target]
        for model in models:
            assert model is not None
            done = self.labelled.setdefault(model, {})
            for key in [key for key in done if key not in self.source]:
                del done[key]
            others = self.labelled.get(self.current or "", {}) if model == target != self.current else {}
            to_do = [key for key, data in self.source.items() if done.get(key) != data]

            def rank(
                key: str, done: dict[str, bytes] = done, others: dict[str, bytes] = others
            ) -> tuple[int, str]:
                is_stale = key not in done and others.get(key) == self.source[key]
                is_changed = key in done or (key in others and not is_stale)
                return (3 if is_stale else 1 if is_changed else 0), key

            if to_do and left <= 0:
                return "limited"
            for key in sorted(to_do, key=rank)[:left]:
                done[key] = self.source[key]
            left -= min(left, len(to_do))
            if to_do and left <= 0:
                return "limited"
        if self.current == target:
            return "up_to_date"
        if self.current is not None and target in self.refused:
            return "refused"
        self.current = target
        return "promoted"

    def must_be_current(self) -> dict[str, tuple[str, bytes]]:
        """image -> whose labels of which content."""
        assert self.current is not None
        done = self.labelled[self.current]
        return {key: (self.current, digest(done[key])) for key in self.source if key in done}


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def checkpoints() -> Iterator[tuple[str, bytes, str]]:
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


class Month:
    """The bucket, the models, what the oracle knows."""

    def __init__(self, server: S3Server, seed: int) -> None:
        self.client = server.client()
        self.name = f"month-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=self.name)
        self.uri = f"s3://{self.name}"
        self.storage = Storage(StorageSpec(endpoint_url=server.endpoint_url))
        self.rng = random.Random(seed)
        self.fresh = iter(make_images(200, seed).values())
        self.oracle = Oracle()
        self.model_ids: dict[str, str] = {}
        self.target = ""

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"images/{key}", Body=data)
        self.oracle.source[key] = data

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"images/{key}")
        del self.oracle.source[key]

    def live_on(self, night: int) -> None:
        """A day passes: images come, change and go."""
        there = sorted(self.oracle.source)
        for number in range(12 if night == 0 else self.rng.randint(0, 3)):
            self.put(f"{night:02d}-{number}.jpg", next(self.fresh))
        if night:
            for key in self.rng.sample(there, self.rng.randint(0, 2)):
                self.put(key, next(self.fresh))
            for key in self.rng.sample(there, self.rng.randint(0, 2)):
                self.delete(key)
        if night == 3:
            self.put("broken.jpg", b"no image at all")
        if night == 6:
            self.put("moved.jpg", self.oracle.source[there[-1]])  # the same content under another key

    def choose(self, model: ModelVersion) -> None:
        Aliases(f"{self.uri}/lake", self.storage).move("champion", model, "the test", "it is time")
        self.target = model.name

    def check(self) -> None:
        """The current view against the oracle, and the table as a whole."""
        table = LabelsTable.open(f"{self.uri}/lake", self.storage)
        model_id = current_of(table, f"{self.uri}/images")
        assert model_id is not None
        rows = table.to_current(model_id)
        found = {
            key: (model_id.rpartition("-")[0], bytes(content))
            for key, model_id, content in rows.select("image_id, model_id, content_hash").fetchall()
        }
        assert found == self.oracle.must_be_current()
        assert read_table(f"{self.uri}/lake", self.storage).problems == []


def test_a_month_of_nights(drivers: Drivers, moto_server: S3Server) -> None:
    month = Month(moto_server, SEED)
    env = {"AWS_ENDPOINT_URL": moto_server.endpoint_url}
    lake = f"{month.uri}/lake"
    registry = ModelRegistry(lake, month.storage)
    models = {name: registry.register(name, data, print_) for name, data, print_ in checkpoints()}
    month.oracle.refused = frozenset({"m3"})
    month.choose(models["m1"])
    statuses: list[str] = []
    for night in range(NIGHTS):
        month.live_on(night)
        if night in (8, 14, 18, 20, 25):
            month.choose(models[{8: "m2", 14: "m3", 18: "m2", 20: "m4", 25: "m2"}[night]])
        if night == 25:  # m4 turned out to be no good: back to m2 at once, whose labels are there
            table = LabelsTable.open(lake, month.storage)
            rollback(table, [f"{month.uri}/images"], "the test", "m4 is no good")
            month.oracle.current = "m2"
        if night in KILLED_NIGHTS:
            before = len(month.oracle.source)
            killed = drivers.run(Night(month.uri), env | {FAILPOINTS: KILLED_NIGHTS[night]})
            assert killed.status in (-signal.SIGKILL, 0), killed.stderr
            assert len(month.oracle.source) == before
            killed_by_hand = killed.status == -signal.SIGKILL
            print(f"night {night}: killed at {KILLED_NIGHTS[night]}: {killed_by_hand}")
            assert read_table(lake, month.storage).problems == []
            # What it did before counts: nights after it may have less to do than the oracle thinks.
            month.oracle.labelled = done_by_table(month)
        if night == TWO_AT_ONCE:
            both = [driver.wait() for driver in [drivers.start(Night(month.uri), env) for _ in range(2)]]
            both.sort(key=lambda end: end.status)
            assert [end.status for end in both] == [0, 5], [end.stderr for end in both]
            assert both[0].summary["run_id"] in both[1].last_line
            ended = both[0]
        else:
            ended = drivers.run(Night(month.uri), env)
        wanted = month.oracle.night(month.target)
        statuses.append(wanted)
        print(
            f"night {night}: {month.target} {wanted}, {len(month.oracle.source)} images: "
            f"{ended.last_line[:200]}"
        )
        assert ended.status == (4 if wanted == "refused" else 0), ended.stderr
        if wanted == "refused":
            ended.check_clear_end(4)
            assert "max_lost" in ended.last_line
        else:
            assert ended.summary["status"] == wanted, ended.summary
        month.check()
    assert {"limited", "promoted", "refused", "up_to_date"} <= set(statuses)
    (current,) = read_current(LabelsTable.open(lake, month.storage)).values()
    assert current.model == "m2@1"


def done_by_table(month: Month) -> dict[str, dict[str, bytes]]:
    """What each model labelled, by the table: after a kill only it can know how far the night came."""
    contents = {digest(data): data for data in month.oracle.source.values()}
    table = LabelsTable.open(f"{month.uri}/lake", month.storage)
    found: dict[str, dict[str, bytes]] = {}
    for model_id in table.model_ids():
        rows = table.to_current(model_id).select("image_id, content_hash").fetchall()
        name = model_id.rpartition("-")[0]
        found[name] = {key: contents.get(bytes(content), b"another") for key, content in rows}
    return found
