"""What is seen of training while it lasts: a bar on a terminal, JSON lines otherwise. Both on stderr.

Enters: metrics, as rank 0 sends them. Leaves: what a person reads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from jobs.terminal_table import printable
from jobs.train.metrics import EvalMetrics, StepMetrics

LINES_INTERVAL_S = 10.0
SMOOTHED_REPORTS = 20  # one step's loss says little: it is that of a few images
ETA_WINDOW_S = 600.0


class TrainWatcher(Protocol):
    """Whoever watches training."""

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        """Steps are about to be taken: of `total_steps`, `first_step` (0 unless resumed) are done.

        Comes again when the workers were restarted; steps since the last checkpoint then come again, too.
        """

    def step(self, metrics: StepMetrics) -> None:
        """One or more steps were taken since the last report."""

    def evaluated(self, metrics: EvalMetrics) -> None:
        """An evaluation was made."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def ended(self, status: str) -> None:
        """Nothing more will come; "done" says that all steps were taken."""


class WatcherGroup:
    """A watcher and the trackers beside it, as one watcher.

    A tracker that fails (its server is away, its disk is full) is noted once and left out from then on:
    training goes on without it. The first watcher's errors are raised.
    """

    def __init__(self, watcher: TrainWatcher, trackers: Sequence[TrainWatcher]) -> None:
        self._watcher = watcher
        self._trackers = list(trackers)

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._watcher.started(total_steps, first_step, description)
        self._tell(lambda tracker: tracker.started(total_steps, first_step, description))

    def step(self, metrics: StepMetrics) -> None:
        self._watcher.step(metrics)
        self._tell(lambda tracker: tracker.step(metrics))

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._watcher.evaluated(metrics)
        self._tell(lambda tracker: tracker.evaluated(metrics))

    def note(self, text: str) -> None:
        self._watcher.note(text)
        self._tell(lambda tracker: tracker.note(text))

    def ended(self, status: str) -> None:
        self._tell(lambda tracker: tracker.ended(status))  # may still have something to note
        self._watcher.ended(status)

    def _tell(self, what: Callable[[TrainWatcher], None]) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # of any client library; none is worth the run
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                self._watcher.note(
                    f"{type(tracker).__name__} failed and gets nothing more of this run: {reason}"
                )


class TerminalWatcher:
    """A bar over the steps with the time left, and below it what the last reports said."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=ETA_WINDOW_S,
        )
        self._task = self._progress.add_task("train", total=None)
        self._recent: deque[StepMetrics] = deque(maxlen=SMOOTHED_REPORTS)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self.note(description)
        self._recent.clear()
        # starts the clock anew: the pause before a restart is none of the steps' time
        self._progress.reset(self._task, total=total_steps, completed=first_step)
        self._live.start()

    def step(self, metrics: StepMetrics) -> None:
        self._recent.append(metrics)
        self._progress.update(self._task, completed=metrics.step)

    def evaluated(self, metrics: EvalMetrics) -> None:
        self.note(evaluation_line(metrics))

    def note(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False)

    def ended(self, status: str) -> None:
        self._live.stop()
        if status != "done":
            self.note(f"training ended: {status}")

    def _render(self) -> Group:
        lines = step_lines(self._recent) if self._recent else ["waiting for the first step"]
        return Group(self._progress, *(Padding(Text(line), (0, 0, 0, 2)) for line in lines))


class LinesWatcher:
    """One JSON object an interval for the steps, and one for everything else as it comes."""

    def __init__(
        self, interval_s: float = LINES_INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._total_steps = self._first_step = 0
        self._started_s = self._last_s = 0.0

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._total_steps, self._first_step = total_steps, first_step
        self._started_s = self._clock()
        self._last_s = -math.inf
        self._print({"started": description, "first_step": first_step, "total_steps": total_steps})

    def step(self, metrics: StepMetrics) -> None:
        now_s = self._clock()
        if now_s - self._last_s < self._interval_s and metrics.step < self._total_steps:
            return
        self._last_s = now_s
        num_taken = metrics.step - self._first_step
        step_s = (now_s - self._started_s) / max(1, num_taken)
        self._print(
            {
                "step": metrics.step,
                "loss": round(metrics.loss, 5),
                **{name: round(value, 5) for name, value in metrics.losses.items()},
                "learning_rate": float(f"{metrics.learning_rate:.4g}"),
                "images_per_s": round(metrics.images_per_s, 2),
                "data_wait_share": round(metrics.data_wait_share, 4),
                "memory_bytes": metrics.memory_bytes,
                "workers": metrics.num_workers,
                "eta_s": round(step_s * (self._total_steps - metrics.step), 1),
            }
        )

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._print(
            {
                "evaluated": metrics.step,
                "images": metrics.num_images,
                "unreadable": dict(metrics.unreadable),
                "bbox": {name: round(value, 5) for name, value in metrics.bbox.items()},
                "segm": {name: round(value, 5) for name, value in metrics.segm.items()},
                "seconds": round(metrics.seconds, 1),
            }
        )

    def note(self, text: str) -> None:
        self._print({"note": text})

    def ended(self, status: str) -> None:
        self._print({"ended": status})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(_without_nan(values)), file=sys.stderr, flush=True)


def step_lines(recent: Sequence[StepMetrics]) -> list[str]:
    """Three lines of at most 80 characters, as a rule: losses, their terms, and how fast it goes.

    Args:
        recent: the last reports, at least one. Losses are their mean, speed and memory the last one's.
    """
    last = recent[-1]
    terms = "  ".join(
        f"{_short(name)} {fmean(m.losses.get(name, math.nan) for m in recent):.3f}" for name in last.losses
    )
    loss = fmean(m.loss for m in recent)
    workers = f"{last.num_workers} worker{'' if last.num_workers == 1 else 's'}"
    return [
        f"loss {loss:.4f}  learning rate {last.learning_rate:.2e}  gradient {last.grad_norm:.2f}",
        terms,
        f"{last.images_per_s:.1f} images/s  {last.data_wait_share:.0%} of the time waiting for data  "
        f"{last.memory_bytes / 2**30:.1f} GiB  {workers}",
    ]


def evaluation_line(metrics: EvalMetrics) -> str:
    """AP of masks and boxes in one line."""
    figures = ", ".join(
        f"{what} AP {_figure(values, 'AP')} (AP50 {_figure(values, 'AP50')})"
        for what, values in (("mask", metrics.segm), ("box", metrics.bbox))
    )
    unread = sum(metrics.unreadable.values())
    lost = f", {unread:,} unreadable" if unread else ""
    return f"step {metrics.step:,}: {figures}, {metrics.num_images:,} images{lost}"


def default_watcher() -> TrainWatcher:
    """A bar where stderr is a terminal, JSON lines otherwise."""
    return TerminalWatcher() if sys.stderr.isatty() else LinesWatcher()


def _short(name: str) -> str:
    return name.removeprefix("loss_").removesuffix("_reg").replace("_", " ")


def _figure(values: Any, name: str) -> str:
    value = values.get(name, -1.0)
    return "–" if value < 0 else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
