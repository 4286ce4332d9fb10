"""What is seen of a run while it lasts: a bar on a terminal, JSON lines otherwise. Both on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from jobs.infer.summary import Summary
from jobs.terminal_table import printable

JSON_INTERVAL_S = 10.0


class Watcher(Protocol):
    """Whoever watches a run."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def start(self, num_shards: int, num_bytes: int) -> None:
        """The plan is made: so many shards with so many bytes are to be read."""

    def update(self, summary: Summary) -> None:
        """Counts have changed."""

    def stop(self, summary: Summary) -> None:
        """Nothing more will come; the summary's status says whether that is because all is done."""


class TerminalWatcher:
    """A bar over the source's bytes, with counts, rate and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("label", total=None, counts="starting", visible=False)
        self._started = time.monotonic()

    def note(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False)

    def start(self, num_shards: int, num_bytes: int) -> None:
        self._started = time.monotonic()
        self._progress.update(self._task, total=max(1, num_bytes), visible=True)
        self._progress.start()

    def update(self, summary: Summary) -> None:
        rate = summary.images / max(1e-9, time.monotonic() - self._started)
        counts = (
            f"{summary.ok:,} ok, {summary.failed:,} failed, {summary.committed_images:,} committed, "
            f"{rate:.1f} images/s"
        )
        self._progress.update(self._task, completed=summary.encoded_bytes, counts=counts)

    def stop(self, summary: Summary) -> None:
        if summary.status == "done":  # a tar's headers and padding are not counted as they are read
            self._progress.update(self._task, completed=self._progress.tasks[0].total)
        self._progress.stop()


class JsonWatcher:
    """One JSON object an interval, and one a note."""

    def __init__(
        self, interval_s: float = JSON_INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._started = self._last = clock()
        self._num_bytes = 0

    def note(self, text: str) -> None:
        self._print({"note": text})

    def start(self, num_shards: int, num_bytes: int) -> None:
        self._started = self._last = self._clock()
        self._num_bytes = num_bytes
        self._print({"shards": num_shards, "bytes": num_bytes})

    def update(self, summary: Summary) -> None:
        now = self._clock()
        if now - self._last < self._interval_s:
            return
        self._last = now
        elapsed = now - self._started
        done = min(1.0, summary.encoded_bytes / max(1, self._num_bytes))
        self._print(
            {
                "seconds": round(elapsed, 1),
                "images": summary.images,
                "ok": summary.ok,
                "failed": summary.failed,
                "committed": summary.committed_images,
                "images_per_s": round(summary.images / max(1e-9, elapsed), 2),
                "eta_s": round(elapsed * (1 - done) / done, 1) if done > 0 else None,
            }
        )

    def stop(self, summary: Summary) -> None:
        """Nothing is held open."""

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=sys.stderr, flush=True)


def default_watcher() -> Watcher:
    """A bar where stderr is a terminal, JSON lines otherwise."""
    return TerminalWatcher() if sys.stderr.isatty() else JsonWatcher()
