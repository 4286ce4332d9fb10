"""The metrics of a run kept with it: <out>/metrics/000001.jsonl, 000002.jsonl, ...

Enters: metrics as they come. Leaves: the run's History, over all the times that it was resumed. Each file is
written whole, once, and holds the lines since the last one: object storage does not append.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage
from jobs.train.metrics import EvalMetrics, History, Metrics, StepMetrics, to_json_line
from schemas.errors import StorageError

WRITE_INTERVAL_S: Final = 60.0
"""A killed driver loses the curves of so many seconds; the steps themselves are in the checkpoints."""


class MetricsLog:
    """A TrainWatcher that writes what it is told; one at a time for an `out`.

    What could not be written is written with the next file; ended() raises StorageError where it cannot.
    """

    def __init__(
        self,
        out_uri: str,
        storage: Storage,
        interval_s: float = WRITE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = _folder(out_uri, storage)
        self._storage = storage
        self._interval_s = interval_s
        self._clock = clock
        self._lines: list[str] = []
        self._last_write_s = clock()
        self._number = max(_files(self._folder, storage), default=0)

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        """Nothing of it is kept."""

    def step(self, metrics: StepMetrics) -> None:
        self._add(metrics)
        if self._clock() - self._last_write_s >= self._interval_s:
            self._try_to_write()

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._add(metrics)
        self._try_to_write()

    def note(self, text: str) -> None:
        """Nothing of it is kept."""

    def ended(self, status: str) -> None:
        self._write()

    def _add(self, metrics: Metrics) -> None:
        self._lines.append(to_json_line(metrics))

    def _try_to_write(self) -> None:
        with suppress(StorageError):
            self._write()

    def _write(self) -> None:
        self._last_write_s = self._clock()
        if self._lines:
            data = "".join(f"{line}\n" for line in self._lines).encode()
            # A driver that was paused for long may have lost its lease to another, which writes here, too.
            while not self._storage.create_exclusive(f"{self._folder}/{self._number + 1:06d}.jsonl", data):
                self._number += 1
            self._number += 1
            self._lines.clear()


def read_history(out_uri: str, storage: Storage) -> History:
    """All that was written; empty where nothing was.

    Raises:
        StorageError: a file is damaged.
    """
    folder = _folder(out_uri, storage)
    lines: list[str] = []
    for _, info in sorted(_files(folder, storage).items()):
        lines += storage.read_bytes(info).decode(errors="replace").splitlines()
    try:
        return History.from_lines(lines)
    except ValueError as error:
        raise StorageError(f"{folder}: {error}; delete the damaged file.") from error


def _folder(out_uri: str, storage: Storage) -> str:
    return f"{storage.normalize(out_uri)}/metrics"


def _files(folder: str, storage: Storage) -> dict[int, ObjectInfo]:
    """By their numbers; what else lies there is left alone."""
    try:
        stems = {info.uri[len(folder) + 1 :].removesuffix(".jsonl"): info for info in storage.list(folder)}
    except MissingObjectError:  # a disk has no folder yet
        return {}
    return {int(stem): info for stem, info in stems.items() if re.fullmatch("[0-9]{6,}", stem)}
