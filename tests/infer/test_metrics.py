"""What a label run tells Prometheus, told to a list."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from cluster import metrics
from cluster.metrics import Metric
from jobs.infer import metrics as infer_metrics
from jobs.infer.metrics import ActorMetrics, RunMetrics
from jobs.infer.summary import Summary
from jobs.infer.units import LABELLED_SCHEMA, UnitReport
from jobs.infer.write import FragmentWriter
from jobs.lake.storage import Storage
from schemas.errors import FailureBudgetExceeded, StorageError
from schemas.specs import StorageSpec


class Books:
    """A Recorder: counters by metric and labels, gauges as they were set."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], float] = {}
        self.gauges: dict[tuple[str, ...], list[float]] = {}

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        assert labels.keys() == set(metric.labels)
        assert amount >= 0
        if amount:
            key = (metric.name, *labels.values())
            self.counts[key] = self.counts.get(key, 0) + amount

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert labels.keys() == set(metric.labels)
        self.gauges.setdefault((metric.name, *labels.values()), []).append(value)

    def of(self, metric: Metric) -> dict[tuple[str, ...], float]:
        return {
            labels: count
            for (name, *labels_list), count in self.counts.items()
            if name == metric.name
            for labels in [tuple(labels_list)]
        }


def job(budget: int | float = 5) -> Any:
    failures = SimpleNamespace(budget=budget)
    return SimpleNamespace(run_id="infer-1", model_id="lite-ab", spec=SimpleNamespace(failures=failures))


def unit(num_images: int, detections: int, **failed: int) -> UnitReport:
    return UnitReport("shard", num_images=num_images, num_detections=detections, failed=failed)


def test_images_are_counted_at_commits_once_each_by_status_and_kind() -> None:
    books, summary = Books(), Summary("infer-1", "lite-ab", "s", "l")
    run = RunMetrics(lambda: books, clock=iter([100.0, 160.0, 220.0]).__next__)
    with run.running(job()):
        # None yet: a run that waits for nodes is not late with its commits.
        assert not any("last_commit" in name for name, *_ in books.gauges)
        run.begun()
        summary.add(unit(4, 9, truncated=1))
        run.took(summary)
        assert books.of(metrics.IMAGES) == {}
        summary.committed_images = 4
        run.committed(summary)
        assert books.of(metrics.IMAGES) == {("ok", ""): 3, ("failed", "truncated"): 1}
        summary.add(unit(6, 1, truncated=1, io=2))
        summary.committed_images = 10
        run.committed(summary)
    assert books.of(metrics.IMAGES) == {("ok", ""): 6, ("failed", "truncated"): 2, ("failed", "io"): 2}
    assert books.of(metrics.DETECTIONS) == {(): 10}
    assert books.of(metrics.COMMITS) == {(): 2}
    assert books.gauges["masklake_last_commit_timestamp_seconds",] == [100.0, 160.0, 220.0]
    assert books.gauges["masklake_uncommitted_images",] == [4, 0, 0]
    assert books.gauges["masklake_run_info", "infer-1", "infer", "lite-ab"] == [1]


@pytest.mark.parametrize(
    ("budget", "images", "failed", "used"),
    [(5, 10, 0, 0.0), (5, 10, 4, 0.8), (0, 10, 1, 1.0), (0.01, 1000, 5, 0.5), (0.01, 10, 1, 1.0)],
)
def test_the_budget_used_is_failed_images_over_allowed_ones(
    budget: int | float, images: int, failed: int, used: float
) -> None:
    books, summary = Books(), Summary("infer-1", "lite-ab", "s", "l")
    run = RunMetrics(lambda: books)
    with run.running(job(budget)):
        summary.add(unit(images, 0, **({"io": failed} if failed else {})))
        run.took(summary)
    assert books.gauges["masklake_failure_budget_used_ratio",] == pytest.approx([used])


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "done"),
        (KeyboardInterrupt(), "interrupted"),
        (StoppedError(), "interrupted"),
        (FailureBudgetExceeded("many"), "over_budget"),
        (StorageError("away"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_a_run_says_how_it_ended(error: BaseException | None, status: str) -> None:
    books = Books()
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, RunMetrics(lambda: books).running(job(), StoppedError):
        if error is not None:
            raise error
    assert books.of(metrics.RUNS_ENDED) == {("infer-1", "infer", status): 1}


def test_a_run_that_is_not_connected_records_nothing() -> None:
    run, summary = RunMetrics(), Summary("infer-1", "lite-ab", "s", "l")
    run.took(summary)
    run.committed(summary)


def test_an_actor_counts_its_time_and_the_part_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    monkeypatch.setattr(infer_metrics, "recorder", lambda: books)
    ticks = iter([10.0, 12.0, 20.0, 21.0, 30.0, 30.5])
    monkeypatch.setattr("time.perf_counter", ticks.__next__)
    actor = ActorMetrics()
    with actor.in_network():
        pass
    with pytest.raises(ValueError, match="NaN"), actor.in_network():
        raise ValueError("NaN")
    actor.labelled(5.0)
    with actor.in_network():
        pass
    actor.labelled(1.0)
    assert books.of(metrics.NETWORK_SECONDS) == {(): 3.5}
    assert books.of(metrics.LABEL_SECONDS) == {(): 6.0}


def test_what_is_read_is_counted_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    monkeypatch.setattr(infer_metrics, "recorder", lambda: books)
    infer_metrics.count_read(1000)
    infer_metrics.count_read(24)
    assert books.of(metrics.READ_BYTES) == {(): 1024}


def test_a_unit_without_images_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    books = Books()
    monkeypatch.setattr(infer_metrics, "recorder", lambda: books)
    report = UnitReport("shard").to_json()
    row = pa.table({"unit_id": ["u"], "report": [report], "rows": [b""]}, schema=LABELLED_SCHEMA)
    FragmentWriter(f"file://{tmp_path}/lake", "lite-ab", Storage(StorageSpec()))(row)
    assert books.of(metrics.WRITTEN_BYTES) == {}
