"""The driver, and what a worker of Ray's does with an error that would come again, jobs/train/run.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError

from cluster.session import ClusterInfo
from cluster.train_profiles import TrainPlan
from jobs.lake.lease import Lease
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from jobs.train import run
from jobs.train.memory import TrainingMemoryError
from jobs.train.metrics import StepMetrics
from jobs.train.preemption import PreemptionWarnings, ask_nobody
from jobs.train.run import TrainingFailedError, run_train
from jobs.train.watcher import TrainWatcher
from jobs.train.worker import DivergedError, _Run, train
from jobs.train.workers import Workers
from schemas.errors import MasklakeError
from schemas.specs import StorageSpec
from schemas.train_spec import TrainSpec
from tests.train.conftest import MakeJob, MakeSpec
from tests.train.recording_watcher import RecordingWatcher

ALONE = Workers(0, 1, torch.device("cpu"))
Fit = Callable[[TrainWatcher], Exception | None]


class Sender(RecordingWatcher):
    """The mailbox's sender, without Ray."""

    def __init__(self, has_ended: bool = False) -> None:
        super().__init__()
        self._has_ended = has_ended
        self.num_flushed = 0

    def has_ended(self) -> bool:
        return self._has_ended

    def flush(self) -> None:
        self.num_flushed += 1


def work(sender: Sender, size: int, rank: int, outcome: Exception | None, patch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        sender.note("trained")
        if outcome is not None:
            raise outcome

    patch.setattr(run, "train", train)
    patch.setattr(run, "get_device", lambda: torch.device("cpu"))
    patch.setattr(Workers, "joined", lambda device: Workers(rank, size, device))
    run._train_on_ray({"job": None, "sender": sender})


def test_worker_0_tells_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Sender(), Sender()
    work(first, 2, 0, None, monkeypatch)
    work(second, 2, 1, None, monkeypatch)
    assert (first.told, second.told) == (["trained", "done"], ["trained"])
    assert first.num_flushed == 1


def test_a_worker_out_of_memory_tells_so_and_ends_the_others_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sender = Sender()
    with pytest.raises(TrainingMemoryError):
        work(sender, 2, 1, TrainingMemoryError("step 3 takes more memory"), monkeypatch)
    assert sender.told == ["trained", "step 3 takes more memory"]
    assert sender.num_flushed == 1


def test_workers_that_are_started_anew_after_such_an_end_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(has_ended=True)
    work(sender, 2, 0, None, monkeypatch)
    assert sender.told == []


@pytest.mark.parametrize(
    ("size", "error"), [(1, TrainingMemoryError("no memory")), (2, DivergedError("nan"))]
)
def test_nobody_is_ended_where_nobody_waits(
    size: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender()
    work(sender, size, 0, error, monkeypatch)
    assert sender.told == ["trained", str(error)]


def test_an_error_that_may_pass_is_raised_and_not_told_as_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender()
    with pytest.raises(ConnectionError):
        work(sender, 1, 0, ConnectionError("the store is away"), monkeypatch)
    assert sender.told == ["trained"]


class FakeMailbox:
    """Delivers at once, in the driver's process."""

    def __init__(self) -> None:
        self.group: Any = None

    def sender(self) -> FakeMailbox:
        return self

    @contextmanager
    def delivering_to(self, group: TrainWatcher) -> Iterator[None]:
        self.group = group
        yield

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fit], None]:
    """Puts a function in the place of Ray's part in a run: it is given the driver's watchers."""

    def put(fit: Fit) -> None:
        monkeypatch.setattr(run, "connect", lambda: ClusterInfo(({"CPU": 1.0},), started_here=True))
        monkeypatch.setattr(run, "shutdown", lambda: None)
        monkeypatch.setattr(run, "planned_with_room", lambda *_: TrainPlan(1, 1, False, 1.0, 1, 1))
        monkeypatch.setattr(run, "MetricsExport", lambda *_: RecordingWatcher())
        monkeypatch.setattr(run, "Mailbox", FakeMailbox)
        monkeypatch.setattr(run._Driver, "_fit", lambda driver, plan, sender, **_: fit(sender.group))

    return put


def test_a_run_is_not_done_before_a_worker_has_said_so(
    make_spec: MakeSpec, without_ray: Callable[[Fit], None], tmp_path: Path
) -> None:
    def fit(group: TrainWatcher) -> None:
        group.started(6, 0, "lite")
        for step in (1, 2):
            group.step(StepMetrics(step, {"loss_mask": 0.5}, 0.01, 12.5, 0.02, 1 << 30, 1, 1.5, step))

    without_ray(fit)
    watcher = RecordingWatcher()
    with pytest.raises(TrainingFailedError, match=r"the workers ended without a word\. Run the same command"):
        run_train(make_spec(), watcher)
    assert watcher.told[-1] == "failed"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["unreadable_images"]) == ("failed", 2, 3)


def test_a_worker_that_died_for_want_of_memory_is_told_with_its_step_images_and_settings(
    make_spec: MakeSpec, make_job: MakeJob, without_ray: Callable[[Fit], None]
) -> None:
    def fit(group: TrainWatcher) -> Exception:
        group.started(6, 0, "lite")
        group.step(StepMetrics(2, {"loss_mask": 0.5}, 0.01, 12.5, 0.02, 1 << 30, 1, 1.5))
        return OutOfMemoryError("1 worker(s) were killed due to the node running low on memory. …")  # type: ignore[no-untyped-call]

    without_ray(fit)
    spec = make_spec()
    with pytest.raises(TrainingFailedError, match="the workers failed 9 times") as caught:
        run_train(spec, RecordingWatcher())
    third = next(run_worker(make_job, spec)._batches().starting_at(2))
    told = str(caught.value)
    assert f"at step 3 ({', '.join(third.names)}) or soon after it: Ray ended it because its node ran" in told
    for setting in (
        "recipe.accumulate",
        "recipe.total_batch",
        "model.max_size_px",
        "scaling.cpus_per_worker",
    ):
        assert setting in told


def run_worker(make_job: MakeJob, spec: TrainSpec) -> _Run:
    return _Run(make_job(spec), ALONE, RecordingWatcher(), PreemptionWarnings(ask_nobody))


def test_a_driver_that_has_lost_its_lease_ends_and_writes_nothing_more(
    make_spec: MakeSpec,
    without_ray: Callable[[Fit], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fit(group: TrainWatcher) -> None:
        monkeypatch.setattr(Lease, "lost", True)
        time.sleep(60)

    monkeypatch.setattr(run, "_LEASE_LOOK_S", 0.05)
    without_ray(fit)
    watcher = RecordingWatcher()
    with pytest.raises(MasklakeError, match=r"another run took the lease of .* goes on from the newest"):
        run_train(make_spec(), watcher)
    assert watcher.told[-1] == "failed"
    assert not (tmp_path / "run/summary.json").exists()


def test_a_finished_run_can_still_be_registered_and_is_once(
    make_spec: MakeSpec, make_job: MakeJob, without_ray: Callable[[Fit], None], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "recipe": {"steps": 1, "total_batch": 1, "calibration_batches": 0},
        "model": {"min_size_px": 128, "max_size_px": 128},
    }
    spec = make_spec(**settings)

    def fit(group: TrainWatcher) -> None:
        train(make_job(spec), ALONE, group)
        group.ended("done")

    without_ray(fit)
    assert run_train(spec, RecordingWatcher()).registered is None
    # Without data to evaluate on, the samples are of what was learnt from.
    assert "\nOf scenes:\n" in (tmp_path / "run/report/report.md").read_text()
    summary_before = (tmp_path / "run/summary.json").read_bytes()

    named = make_spec(**settings, register_as={"name": "late", "lake": str(tmp_path / "lake")})
    watcher = RecordingWatcher()
    summary = run_train(named, watcher)
    assert summary.registered == "late@1"
    assert watcher.told == [f"run {summary.run_id} is done; its model is registered as late@1."]
    assert json.loads((tmp_path / "run/summary.json").read_text())["registered"] == "late@1"

    # Killed after the registration and before the summary.
    (tmp_path / "run/summary.json").write_bytes(summary_before)
    assert run_train(named, RecordingWatcher()).registered == "late@1"
    again = RecordingWatcher()
    run_train(named, again)
    assert again.told == [f"nothing to do: run {summary.run_id} is done, its model registered as late@1."]
    (version,) = ModelRegistry(str(tmp_path / "lake"), Storage(StorageSpec())).versions("late")
    assert version.facts["run_id"] == summary.run_id
