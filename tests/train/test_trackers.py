"""TensorBoard's files are read back; MLflow and Weights & Biases are fakes with their clients' calls."""

import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.lake.storage import Storage
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.trackers import (
    MlflowTracker,
    TensorBoardTracker,
    WandbTracker,
    eval_scalars,
    open_trackers,
    step_scalars,
)
from schemas.errors import UsageError
from schemas.specs import StorageSpec

STEP = StepMetrics(1, {"loss_mask": 0.5, "loss_objectness": 0.25}, 0.01, 12.5, 0.02, 1 << 30, 4, 1.5)
EVALUATION = EvalMetrics(
    2, {"AP": 0.5, "APs": -1.0}, {"AP": 0.25}, {"street/sign: №1": {"bbox_AP": 0.5, "segm_AP": -1.0}}
)


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_scalars_leave_out_what_is_not_finite_or_was_not_measured() -> None:
    scalars = step_scalars(replace(STEP, grad_norm=float("inf")))
    assert scalars["train/loss"] == 0.75
    assert scalars["train/memory_GiB"] == 1.0
    assert "train/grad_norm" not in scalars
    assert eval_scalars(EVALUATION) == {
        "eval/bbox_AP": 0.5,
        "eval/segm_AP": 0.25,
        "eval/category/street/sign: №1/bbox_AP": 0.5,
    }
    assert eval_scalars(EvalMetrics(0, {}, {})) == {}


def test_tensorboard_shows_a_resumed_run_without_the_steps_that_were_taken_again(
    tmp_path: Path, storage: Storage
) -> None:
    (tracker,) = open_trackers((), str(tmp_path), "run-1", {}, storage)
    tracker.started(4, 0, "lite")
    for number in (1, 2, 3):
        tracker.step(replace(STEP, step=number))
    tracker.started(4, 2, "lite, restarted")  # step 2 has a checkpoint and is not taken again
    tracker.step(replace(STEP, step=3, learning_rate=0.5))
    tracker.evaluated(EVALUATION)
    tracker.note("so")
    tracker.ended("done")
    scalars = scalars_of(tmp_path / "tensorboard")
    assert [step for step, _ in scalars["train/learning_rate"]] == [1, 2, 3]
    assert scalars["train/learning_rate"][-1][1] == 0.5
    assert scalars["train/loss_mask"][0] == (1, 0.5)
    assert scalars["eval/segm_AP"] == [(2, 0.25)]


def test_tensorboard_s_file_reaches_a_store_that_cannot_append(tmp_path: Path, storage: Storage) -> None:
    now_s = 0.0
    uri = f"memory://bucket-{uuid.uuid4().hex}/tensorboard"
    tracker = TensorBoardTracker(uri, storage, clock=lambda: now_s)
    tracker.started(3, 0, "lite")
    tracker.step(STEP)
    assert list(storage.list(uri)) == []
    now_s = 301.0
    tracker.step(replace(STEP, step=2))
    (info,) = storage.list(uri)
    tracker.step(replace(STEP, step=3))
    tracker.ended("done")
    (info,) = storage.list(uri)  # one file, replaced
    (tmp_path / info.uri.rpartition("/")[2]).write_bytes(storage.read_bytes(info))
    assert [step for step, _ in scalars_of(tmp_path)["train/loss"]] == [1, 2, 3]


def test_a_tensorboard_tracker_that_never_started_can_end(tmp_path: Path, storage: Storage) -> None:
    TensorBoardTracker(f"file://{tmp_path}/tensorboard", storage).ended("failed")
    assert list(tmp_path.iterdir()) == []


@dataclass
class FakeMetric:
    key: str
    value: float
    timestamp: int
    step: int


@dataclass
class FakeParam:
    key: str
    value: str


class FakeMlflow:
    """The module mlflow and its client in one; a server that remembers."""

    def __init__(self) -> None:
        self.entities = SimpleNamespace(Metric=FakeMetric, Param=FakeParam)
        self.runs: dict[str, dict[str, str]] = {}  # id -> tags
        self.batches: list[list[FakeMetric]] = []
        self.params: list[FakeParam] = []
        self.status = ""

    def MlflowClient(self) -> "FakeMlflow":  # noqa: N802 - its name there
        return self

    def set_experiment(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id=f"experiment of {name}")

    def search_runs(self, experiment_ids: list[str], filter_string: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=key))
            for key, tags in self.runs.items()
            if filter_string == f"tags.\"masklake.run_id\" = '{tags['masklake.run_id']}'"
        ]

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        key = f"server-{len(self.runs)}"
        self.runs[key] = dict(tags)
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def update_run(self, run_id: str, status: str) -> None:
        self.status = status

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.runs[run_id][key] = value

    def log_batch(
        self, run_id: str, metrics: list[FakeMetric] | None = None, params: list[FakeParam] | None = None
    ) -> None:
        assert run_id in self.runs
        assert len(metrics or []) <= 1000
        assert len(params or []) <= 100
        self.batches += [list(metrics)] if metrics else []
        self.params += params or []

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


def test_mlflow_gets_settings_once_metrics_in_batches_and_the_run_again_when_resumed() -> None:
    server = FakeMlflow()
    now_s = 0.0
    settings: Mapping[str, Any] = {f"setting {n}": "x" * 600 for n in range(150)}
    tracker = MlflowTracker(server, "run-1", settings, clock=lambda: now_s)
    tracker.started(900, 0, "lite")
    assert [len(param.value) for param in server.params] == [500] * 150
    for number in range(1, 201):
        tracker.step(replace(STEP, step=number))
    assert server.batches == []
    tracker.evaluated(EVALUATION)
    assert [len(batch) for batch in server.batches] == [1000, 803]
    assert [m.step for m in server.batches[0] if m.key == "train/loss"][:3] == [1, 2, 3]
    assert server.batches[-1][-1].key == "eval/category/street/sign_ _1/bbox_AP"
    now_s = 11.0
    tracker.step(STEP)
    assert len(server.batches) == 3

    again = MlflowTracker(server, "run-1", settings)
    assert (len(server.runs), len(server.params), server.status) == (1, 150, "RUNNING")
    again.note("so")
    again.ended("done")
    assert server.status == "FINISHED"
    again.ended("failed")
    assert server.status == "FAILED"


class FakeWandb:
    """The module wandb and its run in one."""

    def __init__(self) -> None:
        self.init_arguments: dict[str, Any] = {}
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, float]] = []
        self.exit_code: int | None = None
        self.notes = ""

    def init(self, **arguments: Any) -> "FakeWandb":
        self.init_arguments = arguments
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, data: dict[str, float]) -> None:
        self.logged.append(data)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_gets_every_step_under_its_own_number_also_one_taken_again() -> None:
    service = FakeWandb()
    tracker = WandbTracker(service, "run-1", {"recipe.steps": 4})
    assert service.init_arguments["id"] == "run-1"
    assert service.init_arguments["resume"] == "allow"
    assert service.init_arguments["config"] == {"recipe.steps": 4}
    assert ("*", "step") in service.defined
    tracker.started(4, 0, "lite")
    tracker.step(replace(STEP, step=3))
    tracker.step(replace(STEP, step=2))
    tracker.evaluated(EVALUATION)
    tracker.note("so")
    tracker.ended("interrupted")
    assert [data["step"] for data in service.logged] == [3, 2, 2]
    assert service.logged[0]["train/loss_mask"] == 0.5
    assert service.logged[2]["eval/segm_AP"] == 0.25
    assert (service.notes, service.exit_code) == ("lite", 1)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_client_that_is_not_installed_is_a_usage_error_with_the_remedy(
    name: str, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there, wherever this runs
    with pytest.raises(UsageError, match=rf"pip install 'masklake\[{name}\]'"):
        open_trackers((name,), str(tmp_path), "run-1", {}, storage)


def test_a_service_that_refuses_the_run_is_a_usage_error(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UsageError, match=r"Weights & Biases refuses the run .*no API key"):
        open_trackers(("wandb",), str(tmp_path), "run-1", {}, storage)
