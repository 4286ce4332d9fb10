import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.infer.attempts import AttemptLog
from jobs.infer.label import DEAD_DEVICE_EXIT_STATUS, Labeler, Replica
from jobs.infer.rows import Lineage
from jobs.infer.units import UnitReport, read_row, table_from_bytes
from jobs.lake.sources import SourceImage
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import lite
from maskrcnn_core.model import build_model
from maskrcnn_core.predictor import Detections, Predictor
from schemas.labels import ErrorKind

LINEAGE = Lineage("source", "tiny-1", "run", datetime(2026, 1, 1, tzinfo=UTC))
REPLICA = Replica({}, "cpu", "fp32", batch_size=2, threads=1)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    config = lite(((1, "a"),)).replace(min_size_px=64, max_size_px=96, score_threshold=0.2, rpn_post_nms=20)
    return dump_checkpoint(build_model(config, seed=0), "tiny")


@pytest.fixture(scope="module")
def labeler(checkpoint: bytes) -> Iterator[Labeler]:
    labeler = Labeler(checkpoint, REPLICA, LINEAGE, node="here")
    yield labeler
    labeler.close()


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def images(num: int) -> list[SourceImage]:
    return [SourceImage(f"i{n}", "shard", jpeg(n), None, None) for n in range(num)]


def test_a_unit_comes_back_as_rows_in_order_with_its_figures(labeler: Labeler) -> None:
    sent = [*images(5), SourceImage("gone", "shard", None, ErrorKind.MISSING, "not there")]
    out = labeler(read_row("u", UnitReport("shard", num_images=6), sent))
    rows = table_from_bytes(out["rows"][0].as_buffer())
    assert rows["image_id"].to_pylist() == [i.image_id for i in sent]
    assert rows["status"].to_pylist() == ["ok"] * 5 + ["failed"]
    report = UnitReport.from_json(out["report"][0].as_py())
    assert report.failed == {"missing": 1}
    assert report.num_detections == sum(n or 0 for n in rows["num_detections"].to_pylist())
    assert report.node == "here"
    assert report.label_s > 0


def test_no_row_is_older_than_its_run_whatever_the_actors_clock_says(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(labeler, "_lineage", replace(LINEAGE, since=since))
    out = labeler(read_row("u", UnitReport("shard", num_images=1), images(1)))
    assert table_from_bytes(out["rows"][0].as_buffer())["labeled_at"].to_pylist() == [since]


def test_an_image_that_breaks_the_network_fails_alone(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., object] = Predictor.predict
    bad = jpeg(1)

    def predict(self: Predictor, pixels: list[np.ndarray]) -> object:
        decoded = np.asarray(Image.open(io.BytesIO(bad)))
        if any(np.array_equal(p, decoded) for p in pixels):
            raise RuntimeError("out of memory\nsecond line")
        return whole(self, pixels)

    monkeypatch.setattr(Predictor, "predict", predict)
    out = labeler(read_row("u", UnitReport("shard", num_images=4), images(4)))
    rows = table_from_bytes(out["rows"][0].as_buffer()).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1]["error_kind"] == "internal"
    assert rows[1]["error"] == "the network failed on this 64x48 image: out of memory"


def test_a_unit_without_images_passes_through(labeler: Labeler) -> None:
    out = labeler(read_row("end", UnitReport("shard", shard_num_images=9), []))
    assert table_from_bytes(out["rows"][0].as_buffer()).num_rows == 0
    assert UnitReport.from_json(out["report"][0].as_py()).shard_num_images == 9


class ProcessDied(BaseException):
    """What kills the actor in a real run."""


def label_with_deaths(
    labeler: Labeler,
    monkeypatch: pytest.MonkeyPatch,
    poison: Collection[str],
    chance: Sequence[str] = (),
    num: int = 10,
) -> tuple[list[dict[str, Any]], int]:
    """Attempt a unit of `num` images until an attempt comes through, as Ray does; the rows, and the deaths.

    Args:
        poison: images that kill the process whenever they reach the network.
        chance: images at which it dies once, each at the next attempt after the one before.
    """
    log = AttemptLog()
    monkeypatch.setattr(labeler, "_attempts", log)
    left = list(chance)

    def reach(name: str, image_id: str) -> None:
        if image_id in poison:
            raise ProcessDied
        if left and image_id == left[0]:
            del left[0]
            raise ProcessDied

    monkeypatch.setattr("jobs.infer.label.failpoints.reach", reach)
    for deaths in range(50):
        try:
            out = labeler(read_row("u", UnitReport("shard", num_images=num), images(num)))
        except ProcessDied:
            continue
        return table_from_bytes(out["rows"][0].as_buffer()).to_pylist(), deaths
    raise AssertionError("the unit never came through")


@pytest.fixture
def empty_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds nothing, at once."""

    def predict(self: Predictor, pixels: list[np.ndarray]) -> list[Detections]:
        none = np.zeros(0, np.int32)
        boxes = np.zeros((0, 4), np.float32)
        return [
            Detections(p.shape[0], p.shape[1], boxes, none.astype(np.float32), none, [], none) for p in pixels
        ]

    monkeypatch.setattr(Predictor, "predict", predict)


@pytest.mark.usefixtures("empty_network")
@pytest.mark.parametrize(
    ("poison", "most_deaths"),
    [({"i0"}, 2), ({"i9"}, 2), ({"i4", "i5"}, 3), ({"i1", "i8"}, 4), ({f"i{n}" for n in range(10)}, 15)],
)
def test_images_that_kill_the_process_are_found_and_nobody_else_is_blamed(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch, poison: set[str], most_deaths: int
) -> None:
    rows, deaths = label_with_deaths(labeler, monkeypatch, poison)
    assert [row["image_id"] for row in rows] == [f"i{n}" for n in range(10)]
    assert {row["image_id"] for row in rows if row["error_kind"] == "crashed"} == poison
    assert sum(row["status"] == "ok" for row in rows) == 10 - len(poison)
    assert deaths <= most_deaths


@pytest.mark.usefixtures("empty_network")
def test_a_process_that_dies_of_something_else_costs_no_image(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, deaths = label_with_deaths(labeler, monkeypatch, poison=(), chance=["i4", "i9", "i2"])
    assert (deaths, [row["status"] for row in rows]) == (3, ["ok"] * 10)


def test_an_attempt_after_a_death_gives_the_same_labels(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = label_with_deaths(labeler, monkeypatch, poison=(), num=3)
    again, deaths = label_with_deaths(labeler, monkeypatch, poison=(), chance=["i1"], num=3)
    assert deaths == 1
    assert [row["detections"] for row in whole] == [row["detections"] for row in again]
    assert any(row["detections"] for row in whole)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
def test_a_dead_cuda_context_ends_the_process_instead_of_failing_image_after_image(
    labeler: Labeler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: RuntimeError,
) -> None:
    calls = []

    def predict(self: Predictor, pixels: object) -> object:
        calls.append(pixels)
        raise error

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(labeler, "_attempts", AttemptLog())
    monkeypatch.setattr(Predictor, "predict", predict)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        labeler(read_row("u", UnitReport("shard", num_images=4), images(4)))
    assert ended.value.code == DEAD_DEVICE_EXIT_STATUS
    assert len(calls) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "GPU" in line
    assert str(error).splitlines()[0] in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("shapes do not fit"),
    ],
)
def test_errors_that_leave_the_device_usable_are_recorded_against_their_image(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def predict(self: Predictor, pixels: object) -> object:
        raise error

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(labeler, "_attempts", AttemptLog())
    monkeypatch.setattr(Predictor, "predict", predict)
    monkeypatch.setattr(os, "_exit", end)
    out = labeler(read_row("u", UnitReport("shard", num_images=2), images(2)))
    rows = table_from_bytes(out["rows"][0].as_buffer()).to_pylist()
    assert [row["error_kind"] for row in rows] == ["internal"] * 2


@pytest.mark.usefixtures("empty_network")
def test_images_on_which_a_decoder_dies_or_hangs_are_failed_rows(
    checkpoint: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKLAKE_FAILPOINTS", "decode_image=i1:kill,decode_image=i3:hang")
    labeler = Labeler(checkpoint, replace(REPLICA, decode_timeout_s=1.0), LINEAGE)
    out = labeler(read_row("u", UnitReport("shard", num_images=6), images(6)))
    labeler.close()
    rows = table_from_bytes(out["rows"][0].as_buffer()).to_pylist()
    assert [row["error_kind"] for row in rows] == [None, "crashed", None, "timeout", None, None]
    assert UnitReport.from_json(out["report"][0].as_py()).failed == {"crashed": 1, "timeout": 1}
