"""How fast a run goes: what a worker reports of its steps.

Enters: the steps, as one worker takes them. Leaves: a StepMetrics at each report.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from jobs.train.batches import TrainingBatch
from jobs.train.metrics import StepMetrics
from jobs.train.recipe import Recipe
from jobs.train.step import StepFigures


class Meter:
    """Means over the steps since the last report."""

    def __init__(self, recipe: Recipe, num_workers: int, step: int) -> None:
        self._recipe = recipe
        self._num_workers = num_workers
        self._start(step)

    def _start(self, step: int) -> None:
        self._step = step
        self._started_s = time.monotonic()
        self._apart_s = 0.0
        self._waited_s: Tensor | float = 0.0
        self._terms: dict[str, Tensor] = {}
        self._norm: Tensor | float = 0.0
        self._num_unreadable: Tensor | int = 0

    @property
    def seconds(self) -> float:
        """Since the last report, without what was none of the steps' time."""
        return time.monotonic() - self._started_s - self._apart_s

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is none of the steps' time: an evaluation, a snapshot."""
        before_s = time.monotonic()
        try:
            yield
        finally:
            self._apart_s += time.monotonic() - before_s

    def add(self, figures: StepFigures) -> None:
        for name, term in figures.terms.items():
            self._terms[name] = self._terms.get(name, 0) + term
        self._norm = self._norm + figures.norm
        self._waited_s = self._waited_s + figures.waited_s
        self._num_unreadable = self._num_unreadable + figures.num_unreadable

    def read(self, step: int, rate: float) -> StepMetrics:
        """The means, and begin anew."""
        num_steps = step - self._step
        losses = {name: float(term) / num_steps for name, term in self._terms.items()}
        norm = float(self._norm) / num_steps
        seconds = self.seconds  # after the device was waited for
        metrics = StepMetrics(
            step=step,
            losses=losses,
            learning_rate=rate,
            images_per_s=num_steps * self._recipe.total_batch / seconds,
            data_wait_share=min(1.0, float(self._waited_s) / seconds),
            memory_bytes=_memory_bytes(),
            num_workers=self._num_workers,
            grad_norm=norm,
            num_unreadable=int(self._num_unreadable),
        )
        self._start(step)
        return metrics


def take(batches: Iterator[TrainingBatch], num_passes: int) -> tuple[list[TrainingBatch], float]:
    """The passes of a step, and the seconds that they were waited for."""
    before_s = time.monotonic()
    passes = [next(batches) for _ in range(num_passes)]
    return passes, time.monotonic() - before_s


def _memory_bytes() -> int:
    """The most that was taken: of the GPU, where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
