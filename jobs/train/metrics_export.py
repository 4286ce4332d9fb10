"""What a training run tells Prometheus, in the driver's process.

Enters: what the workers report, as a TrainWatcher hears it. Leaves: the metrics of cluster/metrics.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from cluster import metrics
from cluster.metrics import Recorder, recorder
from jobs.train.metrics import EvalMetrics, StepMetrics

_ENDS = ("done", "interrupted")


class MetricsExport:
    """A TrainWatcher that records.

    Args:
        total_batch: images of a step, all workers together.
        find: gives the recorder of the cluster that the process has joined by then.
        clock: Unix time.
    """

    def __init__(
        self,
        run_id: str,
        model: str,
        total_batch: int,
        find: Callable[[], Recorder] = recorder,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run_id = run_id
        self._model = model
        self._total_batch = total_batch
        self._find = find
        self._clock = clock
        self._has_ended = False

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        sink = self._find()
        sink.set(metrics.RUN_INFO, 1, run_id=self._run_id, command="train", model_id=self._model)
        sink.add(metrics.TRAIN_STARTS, 1, run_id=self._run_id)
        sink.set(metrics.TRAIN_LAST_REPORT, self._clock())

    def step(self, report: StepMetrics) -> None:
        sink = self._find()
        sink.set(metrics.TRAIN_STEP, report.step)
        if report.images_per_s > 0:
            sink.set(metrics.TRAIN_STEP_SECONDS, self._total_batch / report.images_per_s)
        if math.isfinite(report.loss):
            sink.set(metrics.TRAIN_LOSS, report.loss)
        else:
            sink.add(metrics.TRAIN_NONFINITE, 1, run_id=self._run_id)
        sink.set(metrics.TRAIN_DATA_WAIT, report.data_wait_share)
        sink.set(metrics.TRAIN_WORKERS, report.num_workers)
        sink.set(metrics.TRAIN_LAST_REPORT, self._clock())

    def evaluated(self, report: EvalMetrics) -> None:
        self._find().set(metrics.TRAIN_LAST_REPORT, self._clock())

    def note(self, text: str) -> None:
        """Nothing of it is a figure."""

    def ended(self, status: str) -> None:
        """A status that is none of the known ones is the reason of a failure."""
        if self._has_ended:  # told by the workers, and then by the driver
            return
        self._has_ended = True
        known = status if status in _ENDS else "failed"
        self._find().add(metrics.RUNS_ENDED, 1, run_id=self._run_id, command="train", status=known)
