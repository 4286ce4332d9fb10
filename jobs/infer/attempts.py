"""Who was at work on what when a process died: how an image that kills the network's process is found.

A label actor notes which images go through the network next. A process that dies leaves its note behind, and
the next attempt at the unit reads it: images that were there when a process died are suspects and go through
the network one at a time; one that was there twice, the second time alone, is to blame and is not tried
again. So nobody is blamed for a process that died of something else. docs/decisions/0006 says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import ray

from cluster.beside_driver import start_beside_driver

DEATHS_TO_BLAME: Final = 2
"""Processes that died with an image in the network before it is left alone."""


@dataclass(frozen=True)
class Past:
    """What became of a unit before.

    Attributes:
        num_attempts: that came to nothing.
        deaths: image_id -> processes that died with it in the network; never 0.
    """

    num_attempts: int
    deaths: Mapping[str, int]


class Attempts(Protocol):
    """What a label actor needs to know and to say; one unit is in one actor's hands at a time."""

    def begin(self, unit_id: str) -> Past:
        """Another attempt at a unit."""

    def note(self, unit_id: str, image_ids: Sequence[str]) -> None:
        """These and no other images of the unit go through the network now."""

    def finish(self, unit_id: str) -> None:
        """All images of the unit are through."""


class AttemptLog:
    """Attempts kept in memory. A handful of entries: units that are in work, and images that killed."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._in_network: dict[str, tuple[str, ...]] = {}
        self._deaths: dict[str, Counter[str]] = {}

    def begin(self, unit_id: str) -> Past:
        if suspects := self._in_network.pop(unit_id, ()):
            self._deaths.setdefault(unit_id, Counter()).update(suspects)
        self._begun[unit_id] += 1
        return Past(self._begun[unit_id] - 1, dict(self._deaths.get(unit_id, {})))

    def note(self, unit_id: str, image_ids: Sequence[str]) -> None:
        self._in_network[unit_id] = tuple(image_ids)

    def finish(self, unit_id: str) -> None:
        # The deaths stay: a result may be lost on the way back, and then the unit begins once more.
        self._in_network.pop(unit_id, None)
        self._begun.pop(unit_id, None)


class SharedAttempts:
    """One AttemptLog for all actors of a run, in a process of its own beside the driver.

    Where it cannot be reached the driver's node is gone, and the run with it: Ray's error ends the actor's
    call. Killed alone, it comes back empty, which costs a poisoned unit one or two more attempts.
    """

    def __init__(self) -> None:
        self._log = start_beside_driver(AttemptLog)
        self._is_first_attempt = True

    def begin(self, unit_id: str) -> Past:
        past: Past = ray.get(self._log.begin.remote(unit_id))
        self._is_first_attempt = past.num_attempts == 0
        return past

    def note(self, unit_id: str, image_ids: Sequence[str]) -> None:
        noted = self._log.note.remote(unit_id, image_ids)
        # The first attempt does not wait: nearly all units need no other, and a note that a sudden death
        # swallowed is missed once. From then on it must be there before the process can die.
        if not self._is_first_attempt:
            ray.get(noted)

    def finish(self, unit_id: str) -> None:
        self._log.finish.remote(unit_id)
