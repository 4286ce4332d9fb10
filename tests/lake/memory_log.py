"""A label table's log in memory that fails as object storage does, for commits by the thousand."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.lake.fragments import Fragment

MODEL = "lite-0123456789ab"


def fragment(*unit_ids: str, path: str = "", num_failed: int = 0) -> Fragment:
    """Ten images a unit."""
    num_rows = 10 * len(unit_ids)
    return Fragment(
        path or f"{unit_ids[0]}.parquet",
        MODEL,
        unit_ids,
        1000,
        num_rows,
        num_rows - num_failed,
        num_failed,
        0,
        "{}",
    )


@dataclass(frozen=True)
class Version:
    app_id: str
    transaction: int
    commit_id: str
    fragments: tuple[Fragment, ...]


@dataclass
class Log:
    """What all stores share. A put names the version it makes, and fails where that one exists."""

    versions: list[Version] = field(default_factory=list)
    in_flight: list[tuple[int, Version]] = field(default_factory=list)

    def put(self, number: int, version: Version) -> bool:
        if number != len(self.versions):
            return False
        self.versions.append(version)
        return True

    def units(self) -> list[str]:
        return [u for version in self.versions for f in version.fragments for u in f.unit_ids]


class StoreFaultError(Exception):
    """What a client raises: nobody can tell from it whether the commit went through."""


class StoppedError(BaseException):
    """A signal or a kill in the middle of a commit; no code of ours may catch it."""


class MemoryStore:
    """Behaves as delta-rs over object storage, faults included.

    Args:
        faults: probability of each kind of fault.
        between: called before each step, so that others may act in between.
    """

    def __init__(
        self,
        log: Log,
        rng: random.Random | None = None,
        faults: float = 0.0,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._log = log
        self._rng = rng or random.Random(0)
        self._faults = faults
        self._between = between
        self._seen = list(log.versions)

    def refresh(self) -> None:
        self._step()
        self._maybe_fail("reading the log failed")
        self._seen = list(self._log.versions)
        self._maybe_stop()

    def last_transaction(self, app_id: str) -> int | None:
        numbers = [version.transaction for version in self._seen if version.app_id == app_id]
        return numbers[-1] if numbers else None

    def find_commit(self, commit_id: str) -> int | None:
        found = [number for number, version in enumerate(self._seen) if version.commit_id == commit_id]
        return found[0] if found else None

    def append(
        self,
        fragments: Sequence[Fragment],
        app_id: str,
        transaction: int,
        metadata: Mapping[str, str | int],
    ) -> None:
        version = Version(app_id, transaction, str(metadata["commit_id"]), tuple(fragments))
        self._step()
        self._maybe_fail("the put was not sent")
        # What came since the snapshot is checked; the snapshot itself is not, an old number is taken again.
        if any(newer.app_id == app_id for newer in self._log.versions[len(self._seen) :]):
            raise StoreFaultError("Concurrent transaction failed")
        if self._rng.random() < self._faults:
            self._log.in_flight.append((len(self._log.versions), version))
            raise StoreFaultError("timed out; the put arrives later")
        assert self._log.put(len(self._log.versions), version)
        self._maybe_stop()
        self._maybe_fail("the put was made, its reply was lost")

    def _maybe_stop(self) -> None:
        if self._rng.random() < self._faults / 3:
            raise StoppedError

    def _step(self) -> None:
        self._between()
        for late in list(self._log.in_flight):
            if self._rng.random() < 0.5:
                self._log.in_flight.remove(late)
                self._log.put(*late)

    def _maybe_fail(self, what: str) -> None:
        if self._rng.random() < self._faults:
            raise StoreFaultError(what)
