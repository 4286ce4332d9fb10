"""What is reported of steps, jobs/train/meter.py."""

from __future__ import annotations

import time

import pytest
import torch

from jobs.train.meter import Meter
from jobs.train.recipe import Recipe
from jobs.train.step import StepFigures


def test_an_evaluation_is_none_of_the_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    measured = Meter(Recipe("one", steps=9, warmup_steps=1, total_batch=8), num_workers=2, step=4)
    for loss in (1.0, 3.0):
        figures = StepFigures(
            {"loss": torch.tensor(loss)}, torch.tensor(2.0), torch.tensor(0.5), torch.tensor(loss)
        )
        measured.add(figures)
    now_s = 104.0
    with measured.apart():
        now_s = 150.0
    assert measured.seconds == 4.0
    told = measured.read(6, rate=0.1)
    assert (told.images_per_s, told.data_wait_share, told.losses) == (4.0, 0.25, {"loss": 2.0})
    assert told.num_unreadable == 4
    assert measured.seconds == 0.0
