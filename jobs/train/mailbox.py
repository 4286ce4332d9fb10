"""From the worker that measures to the process that shows it: what a watcher is told, by way of Ray.

Enters: rank 0's calls of a TrainWatcher, in a training worker. Leaves: the same calls, in the same order, of
the driver's watcher. A worker never waits for it: letters lie in an actor of their own until they are
fetched.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError

from cluster.beside_driver import start_beside_driver
from jobs.train.metrics import EvalMetrics, StepMetrics
from jobs.train.watcher import TrainWatcher

POLL_INTERVAL_S: Final = 0.5
MAX_LETTERS: Final = 10_000
"""Kept while nobody fetches them, about 10 MB; the oldest go first."""
_FETCH_TIMEOUT_S = 30.0
_FLUSH_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Letter:
    """One call of a watcher's method."""

    method: str
    arguments: tuple[Any, ...]

    def deliver(self, watcher: TrainWatcher) -> None:
        getattr(watcher, self.method)(*self.arguments)


class LetterBox:
    """Letters in order of arrival, at most `max_letters` of them."""

    def __init__(self, max_letters: int = MAX_LETTERS) -> None:
        self._letters: deque[Letter] = deque(maxlen=max_letters)
        self._num_lost = 0
        self._has_ended = False

    def has_ended(self) -> bool:
        """Whether a worker has told that the run is at its end, for good or for ill."""
        return self._has_ended

    def put(self, letter: Letter) -> None:
        if letter.method == "ended":  # each worker may tell of an error; the first is heard
            if self._has_ended:
                return
            self._has_ended = True
        self._num_lost += len(self._letters) == self._letters.maxlen
        self._letters.append(letter)

    def take(self) -> list[Letter]:
        """All of them; the box is then empty. Where letters were lost, a note says so, first."""
        letters = list(self._letters)
        if self._num_lost:
            letters.insert(0, Letter("note", (f"{self._num_lost} reports of training came too fast.",)))
        self._letters.clear()
        self._num_lost = 0
        return letters


class Sender:
    """A TrainWatcher for the workers. Travels to the workers; no call waits, and none fails."""

    def __init__(self, box: Any) -> None:
        self._box = box
        self._last: Any = None

    def started(self, total_steps: int, first_step: int, description: str) -> None:
        self._send("started", total_steps, first_step, description)

    def step(self, metrics: StepMetrics) -> None:
        self._send("step", metrics)

    def evaluated(self, metrics: EvalMetrics) -> None:
        self._send("evaluated", metrics)

    def note(self, text: str) -> None:
        self._send("note", text)

    def ended(self, status: str) -> None:
        self._send("ended", status)

    def has_ended(self) -> bool:
        """Whether a worker, of this start or one before, has told of the run's end."""
        return bool(ray.get(self._box.has_ended.remote()))

    def flush(self) -> None:
        """Wait until all has arrived: a worker that ends takes along what is still on its way.

        A mailbox that cannot be reached within half a minute is left alone: its driver is at fault.
        """
        if self._last is not None:
            ray.wait([self._last], timeout=_FLUSH_TIMEOUT_S)

    def _send(self, method: str, *arguments: Any) -> None:
        self._last = self._box.put.remote(Letter(method, arguments))


class Mailbox:
    """The driver's side. Its actor takes no CPU, stays on the driver's node, and ends with close()."""

    def __init__(self) -> None:
        self._box = start_beside_driver(LetterBox)

    def sender(self) -> Sender:
        return Sender(self._box)

    def close(self) -> None:
        ray.kill(self._box)

    @contextmanager
    def delivering_to(self, watcher: TrainWatcher, interval_s: float = POLL_INTERVAL_S) -> Iterator[None]:
        """Fetch and deliver on a thread while the block runs; what came until its end is delivered.

        Raises:
            what the watcher raised, when the block ends. The watcher gets nothing more from then on.
        """
        stop = threading.Event()
        failures: list[Exception] = []

        def deliver() -> None:
            is_reachable = True
            while not failures:
                is_last = stop.wait(interval_s)
                try:
                    letters: Sequence[Letter] = ray.get(self._box.take.remote(), timeout=_FETCH_TIMEOUT_S)
                except RayError as error:
                    letters = []
                    if is_reachable:
                        letters = [Letter("note", (f"no news of training for now: {_first_line(error)}",))]
                    is_reachable = False
                else:
                    is_reachable = True
                try:
                    for letter in letters:
                        letter.deliver(watcher)
                except Exception as error:  # raised where the block ends
                    failures.append(error)
                if is_last:
                    return

        thread = threading.Thread(target=deliver, name="deliver-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
