"""Leases: tell a second runner early who is at work. What makes two of them safe is the app transaction.

Objects <lake>/leases/<key>/<n>.json, where the highest n is the one that counts. Whoever makes number n + 1
by a conditional put takes over from n, and n is free once it has expired, was released, or its process is
known to be dead. Nobody writes another's object, except to delete those that no longer count.

Times are wall-clock seconds of the machines involved: clocks that differ by more than the time to live let a
second runner in early, or keep it out longer.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from jobs.lake.storage import CorruptObjectError, MissingObjectError, ObjectInfo, Storage
from schemas.errors import LeaseHeldError, StorageError

DEFAULT_TTL_S = 120.0
_RENEWALS_PER_TTL = 4
_MAX_TRIES = 10
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Claim:
    """What a lease object says.

    process: names a process for good on its machine, so that a successor there can tell it is dead; empty
        where the platform does not offer that.
    """

    holder: str
    host: str
    pid: int
    process: str
    since_s: float
    expires_s: float
    released: bool = False

    def is_free(self, now_s: float) -> bool:
        return self.released or self.expires_s <= now_s or _is_dead(self)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


class Lease:
    """A lease that is held, see acquire(). As a context manager it renews itself in the background.

    A holder asks `lost` before it does what must not be done twice.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        number: int,
        claim: _Claim,
        ttl_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._number = number
        self._claim = claim
        self._ttl_s = ttl_s
        self._clock = clock
        self._taken_over = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        lake_uri: str,
        key: str,
        holder: str,
        ttl_s: float = DEFAULT_TTL_S,
        clock: Callable[[], float] = time.time,
        leased: str = "the same source and model",
    ) -> "Lease":
        """Take the lease, or say who has it.

        Args:
            key: what is leased; a plain name, it becomes a folder.
            holder: who takes it, for the others to read: the run_id.
            ttl_s: a holder that is not heard of for so long has lost it.
            clock: seconds since 1970.
            leased: what the key stands for, in words.

        Raises:
            LeaseHeldError: another holder is alive, or was until less than ttl_s ago.
            StorageError: the store refused.
        """
        folder = f"{lake_uri}/leases/{key}"
        for _ in range(_MAX_TRIES):
            held = _read_all(storage, folder)
            number = max(held, default=0)
            claim = _read_claim(storage, held[number]) if held else None
            if held and claim is None:
                continue  # it changed or went while we read it
            now_s = clock()
            if claim is not None and not claim.is_free(now_s):
                raise LeaseHeldError(_held_message(leased, key, claim, now_s))
            ours = _Claim(
                holder, socket.gethostname(), os.getpid(), _process(os.getpid()), now_s, now_s + ttl_s
            )
            uri = _uri(folder, number + 1)
            if not storage.create_exclusive(uri, ours.to_json()):
                continue
            if max(_read_all(storage, folder), default=0) > number + 1:
                storage.delete(uri)  # while we read, others had this number, gave it back and went on
                continue
            for info in held.values():
                storage.delete(info.uri)
            return cls(storage, folder, number + 1, ours, ttl_s, clock)
        raise StorageError(
            f"the lease at {folder} changed hands {_MAX_TRIES} times while it was read; run again"
        )

    @property
    def lost(self) -> bool:
        """Whether somebody else has it, or may: it was taken over, or could not be renewed in time."""
        return self._taken_over or self._clock() >= self._claim.expires_s

    def renew(self) -> None:
        """Hold it for another ttl_s. Nothing happens once it is lost.

        Raises:
            StorageError: the store refused; it is lost only when it expires.
        """
        if self.lost:
            return
        if max(_read_all(self._storage, self._folder), default=0) > self._number:
            self._taken_over = True
            return
        renewed = replace(self._claim, expires_s=self._clock() + self._ttl_s)
        self._storage.write_bytes(_uri(self._folder, self._number), renewed.to_json())
        self._claim = renewed

    def release(self) -> None:
        """Give it back, so that the next runner need not wait. The object stays and says so."""
        if not self.lost:
            released = replace(self._claim, expires_s=self._clock(), released=True)
            self._storage.write_bytes(_uri(self._folder, self._number), released.to_json())
            self._claim = released

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.release()
        except StorageError as failure:
            # What was done is committed. That the next runner must wait is no reason for this one to fail.
            _logger.warning("the lease could not be released and expires by itself: %s", failure)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._ttl_s / _RENEWALS_PER_TTL):
            try:
                self.renew()
            except StorageError as failure:
                _logger.warning("the lease could not be renewed, trying again: %s", failure)


def _uri(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.json"


def _read_all(storage: Storage, folder: str) -> dict[int, ObjectInfo]:
    found = {}
    with suppress(MissingObjectError):  # on a disk there is no folder before the first lease
        for info in storage.list(folder, "*.json"):
            stem = Path(info.uri).stem
            if stem.isdecimal():
                found[int(stem)] = info
    return found


def _read_claim(storage: Storage, info: ObjectInfo) -> _Claim | None:
    """What an object says; None where it was renewed or deleted since it was listed."""
    try:
        return _Claim(**json.loads(storage.read_bytes(info)))
    except (CorruptObjectError, MissingObjectError):
        return None


def _held_message(leased: str, key: str, claim: _Claim, now_s: float) -> str:
    def clock_time(seconds: float) -> str:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"

    return (
        f"run {claim.holder} is at work on {leased} (lease {key}): host {claim.host}, "
        f"process {claim.pid}, since {clock_time(claim.since_s)}. Wait for it to end; if it is dead, its "
        f"lease expires at {clock_time(claim.expires_s)}, in {max(0.0, claim.expires_s - now_s):.0f} s."
    )


def _process(pid: int) -> str:
    """Names a running process for good: boot, pid namespace, pid, start time. Empty but on Linux."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # Field 22 of stat; the second, the command's name, may hold spaces and parentheses.
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{boot_id} {namespace} {pid} {started}"


def _is_dead(claim: _Claim) -> bool:
    """Whether the holder was a process of this machine that is no more. Not known of another machine's."""
    here, _, _ = _process(os.getpid()).rpartition(f" {os.getpid()} ")
    there, _, _ = claim.process.rpartition(f" {claim.pid} ")
    return here != "" and here == there and _process(claim.pid) != claim.process
