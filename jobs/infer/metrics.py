"""What a label run tells Prometheus.

Enters: the driver's Summary after each unit and commit; an actor's times; bytes that workers read and wrote.
Leaves: the metrics of cluster/metrics.py, once a unit or a commit, never once an image. Images are counted by
the driver alone and only after a commit, so that they are the table's rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster import metrics
from cluster.metrics import Recorder, recorder
from schemas.errors import FailureBudgetExceeded

if TYPE_CHECKING:  # they import what a worker reads and writes with, which imports this
    from jobs.infer.job import Job
    from jobs.infer.summary import Summary


class RunMetrics:
    """The driver's. Inside of running() alone there is something to record.

    Args:
        find: gives the recorder once the run has joined its cluster.
        clock: Unix time.
    """

    def __init__(
        self, find: Callable[[], Recorder] = recorder, clock: Callable[[], float] = time.time
    ) -> None:
        self._find = find
        self._clock = clock
        self._recorder: Recorder = metrics.NoRecorder()
        self._budget: int | float = 0
        self._ok = 0
        self._failed: Counter[str] = Counter()
        self._detections = 0

    @contextmanager
    def running(self, job: Job, *interruptions: type[BaseException]) -> Iterator[None]:
        """A run in a connected process. An end by one of the interruptions, or by Ctrl-C, is no failure."""
        self._recorder = self._find()
        self._budget = job.spec.failures.budget
        self._recorder.set(metrics.RUN_INFO, 1, run_id=job.run_id, command="infer", model_id=job.model_id)
        ends: tuple[type[BaseException], ...] = (KeyboardInterrupt, *interruptions)
        status = "failed"
        try:
            yield
            status = "done"
        except ends:
            status = "interrupted"
            raise
        except FailureBudgetExceeded:
            status = "over_budget"
            raise
        finally:
            self._recorder.add(metrics.RUNS_ENDED, 1, run_id=job.run_id, command="infer", status=status)

    def begun(self) -> None:
        """There is room to work, for which a run may have waited: commits are to come from now on."""
        self._recorder.set(metrics.LAST_COMMIT, self._clock())

    def took(self, summary: Summary) -> None:
        """A unit is in the books."""
        self._recorder.set(metrics.UNCOMMITTED_IMAGES, summary.images - summary.committed_images)
        self._recorder.set(metrics.BUDGET_USED, _budget_used(summary, self._budget))

    def committed(self, summary: Summary) -> None:
        """All that the summary counts is committed."""
        self._recorder.add(metrics.IMAGES, summary.ok - self._ok, status="ok", error_kind="")
        for kind, count in summary.failed_by_kind.items():
            more = count - self._failed[kind]
            self._recorder.add(metrics.IMAGES, more, status="failed", error_kind=kind)
        self._recorder.add(metrics.DETECTIONS, summary.detections - self._detections)
        self._ok, self._detections = summary.ok, summary.detections
        self._failed = Counter(summary.failed_by_kind)
        self._recorder.add(metrics.COMMITS, 1)
        self._recorder.set(metrics.LAST_COMMIT, self._clock())
        self.took(summary)


class ActorMetrics:
    """A label actor's: how long it had a unit, and how long of that it was in the network."""

    def __init__(self) -> None:
        self._network_s = 0.0

    @contextmanager
    def in_network(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._network_s += time.perf_counter() - started

    def labelled(self, label_s: float) -> None:
        """A unit is done, after so many seconds."""
        recorder().add(metrics.LABEL_SECONDS, label_s)
        recorder().add(metrics.NETWORK_SECONDS, self._network_s)
        self._network_s = 0.0


def count_read(num_bytes: int) -> None:
    """A worker read a unit."""
    recorder().add(metrics.READ_BYTES, num_bytes)


def count_written(num_bytes: int) -> None:
    """A worker wrote a fragment."""
    recorder().add(metrics.WRITTEN_BYTES, num_bytes)


def _budget_used(summary: Summary, budget: int | float) -> float:
    """Of one image at least: a share of the first few allows less than one, and nobody judges it yet."""
    allowed = budget if isinstance(budget, int) else budget * summary.images
    return summary.failed / max(1.0, allowed)
