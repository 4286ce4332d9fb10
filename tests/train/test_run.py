"""What a worker of Ray's does with an error that would come again, jobs/train/run.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.train import run
from jobs.train.memory import TrainingMemoryError
from jobs.train.worker import DivergedError
from jobs.train.workers import Workers
from tests.train.recording_watcher import RecordingWatcher


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
