"""What a training run tells Prometheus, told to a list."""

from __future__ import annotations

import math

import pytest

from cluster.metrics import Metric
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.metrics_export import MetricsExport


class Told:
    """A Recorder that keeps what it is told: name -> labels' values and figure."""

    def __init__(self) -> None:
        self.figures: dict[str, list[tuple[object, ...]]] = {}

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        self.set(metric, amount, **labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert labels.keys() == set(metric.labels)
        self.figures.setdefault(metric.name.removeprefix("masklake_"), []).append((*labels.values(), value))


def report(step: int, loss: float = 0.5, images_per_s: float = 4.0) -> StepMetrics:
    return StepMetrics(step, {"loss_mask": loss}, 1e-3, images_per_s, 0.25, 0, 2, 1.0)


def test_steps_become_gauges() -> None:
    told = Told()
    export = MetricsExport("train-1", "lite", 8, lambda: told, iter([10.0, 20.0, 30.0]).__next__)
    export.started(100, 0, "lite on 3 images")
    export.step(report(5))
    export.evaluated(EvalMetrics(5, {}, {}))
    export.ended("done")
    assert told.figures == {
        "run_info": [("train-1", "train", "lite", 1)],
        "train_starts_total": [("train-1", 1)],
        "train_last_report_timestamp_seconds": [(10.0,), (20.0,), (30.0,)],
        "train_step": [(5,)],
        "train_step_seconds": [(2.0,)],  # 8 images at 4 a second
        "train_loss": [(0.5,)],
        "train_data_wait_ratio": [(0.25,)],
        "train_workers": [(2,)],
        "runs_ended_total": [("train-1", "train", "done", 1)],
    }


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_counted_for_ray_exports_no_such_gauge(loss: float) -> None:
    told = Told()
    MetricsExport("train-1", "lite", 8, lambda: told).step(report(5, loss))
    assert told.figures["train_nonfinite_losses_total"] == [("train-1", 1)]
    assert "train_loss" not in told.figures


def test_workers_that_begin_anew_are_counted() -> None:
    told = Told()
    export = MetricsExport("train-1", "lite", 8, lambda: told)
    export.started(100, 0, "lite")
    export.started(100, 40, "lite")
    assert told.figures["train_starts_total"] == [("train-1", 1), ("train-1", 1)]


def test_the_end_is_told_once_and_a_reason_is_a_failure() -> None:
    told = Told()
    export = MetricsExport("train-1", "lite", 8, lambda: told)
    export.ended("the loss is nan at step 7")
    export.ended("failed")
    assert told.figures == {"runs_ended_total": [("train-1", "train", "failed", 1)]}


def test_no_time_of_a_step_where_no_image_passed() -> None:
    told = Told()
    MetricsExport("train-1", "lite", 8, lambda: told).step(report(5, images_per_s=0.0))
    assert "train_step_seconds" not in told.figures
