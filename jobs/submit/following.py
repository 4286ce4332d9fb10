"""Waits for a submitted job, shows its log, and brings it the wish to stop.

Enters: a JobsApi and a submission's id. Leaves: the Outcome; the log on stdout where that is wanted.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from cluster.jobs_api import ClusterUnreachableError, JobsApi
from jobs.submit.outcome import JobFailedError, Outcome, outcome_of
from schemas.errors import MasklakeError, UsageError

_POLL_S = 1.0
_RECONNECT_S = 2.0
# A dashboard may be away while its head is started anew; a job goes on without it.
_AWAY_S = 120.0
_PENDING_S = 30.0
_TAIL_END_S = 10.0
_STOP_S = 120.0
_DETACHED = 130  # as a shell says of a command that Ctrl-C ended

Note = Callable[[str], None]


def wait_for(api: JobsApi, submission_id: str, note: Note, *, follow: bool) -> Outcome:
    """Wait until a job has ended; the first Ctrl-C asks it to stop, the second leaves it alone.

    SIGTERM, with which schedulers end what they started, does the same.

    Args:
        note: is told what is worth a line, besides the log.
        follow: print the log as it comes.

    Raises:
        JobFailedError: detached by a second Ctrl-C, exit status 130; the job goes on.
        ClusterUnreachableError: the dashboard was away for two minutes; the job may go on.
    """
    tail = _Tail(api, submission_id) if follow else None
    waiting = _Waiting(api, submission_id, note)
    try:
        with _sigterm_interrupts():
            try:
                job = waiting.until_ended()
            except KeyboardInterrupt:
                note(
                    f"asking job {submission_id} to stop after its next commit; Ctrl-C again leaves it alone."
                )
                try:
                    note(ask_to_stop(api, submission_id))
                except UsageError as error:
                    note(str(error))
                except MasklakeError as error:
                    note(f"{error}; the wait goes on, and `masklake jobs stop {submission_id}` asks again")
                job = waiting.until_ended()
    except KeyboardInterrupt:
        if tail is not None:
            tail.be_silent()
        raise JobFailedError(
            f"job {submission_id} goes on; look at it with `masklake jobs logs {submission_id} --follow "
            f"--address {api.address}`",
            _DETACHED,
        ) from None
    if tail is not None:
        tail.finish()
    return outcome_of(job, _log(api, submission_id))


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as Ctrl-C; only the main thread of a process can take either."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def ask_to_stop(api: JobsApi, submission_id: str) -> str:
    """Bring a running job the wish, by a job of its own; gives what came of it, in one line.

    Raises:
        UsageError: there is no such job, or none that takes wishes.
        ClusterUnreachableError: the cluster does not answer.
    """
    job = api.job(submission_id)
    if job.status.is_terminal():
        return f"job {submission_id} has ended already: {job.status.value}."
    messenger = f"stop-{submission_id[:80]}-{secrets.token_hex(3)}"
    api.submit(messenger, f"python -m cluster.stop_wish {submission_id}", {}, {"masklake": "stop"})
    deadline = time.monotonic() + _STOP_S
    while not (said := api.job(messenger)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ClusterUnreachableError(
                f"the wish has not reached job {submission_id} within {_STOP_S:.0f} s: the head is busy; ask "
                "again"
            )
        time.sleep(_POLL_S)
    if said.driver_exit_code == 0:
        return f"job {submission_id} was asked to stop: it commits what is finished and ends."
    job = api.job(submission_id)
    if job.status.is_terminal():
        return f"job {submission_id} ended meanwhile: {job.status.value}."
    lines = _log(api, messenger).strip().splitlines() or ["gives no reason"]
    why = (
        lines[-1]
        if re.match("has no actor|does not answer", lines[-1])
        else f"could not be asked ({lines[-1]})"
    )
    raise UsageError(
        f"job {submission_id} {why}: it is no job of masklake, or has hardly begun; `ray job stop "
        f"{submission_id} "
        f"--address {api.address}` ends it within seconds, and a run loses what it has not committed"
    )


class _Waiting:
    """Polls one job, through a dashboard that may be away for a while."""

    def __init__(self, api: JobsApi, submission_id: str, note: Note) -> None:
        self._api = api
        self._id = submission_id
        self._note = note
        self._started = self._last_answer = time.monotonic()
        self._is_said: set[str] = set()

    def until_ended(self) -> JobDetails:
        while True:
            job = self._look()
            if job is not None and job.status.is_terminal():
                return job
            is_late = time.monotonic() - self._started > _PENDING_S
            if job is not None and job.status == JobStatus.PENDING and is_late:
                self._say_once(f"job {self._id} has not begun yet: {job.message or 'PENDING'}")
            time.sleep(_POLL_S)

    def _look(self) -> JobDetails | None:
        try:
            job = self._api.job(self._id)
        except ClusterUnreachableError as error:
            if time.monotonic() - self._last_answer > _AWAY_S:
                raise ClusterUnreachableError(
                    f"lost sight of job {self._id}, which may go on: {error}"
                ) from None
            self._say_once(f"{error} (waiting for it)")
            return None
        self._last_answer = time.monotonic()
        return job

    def _say_once(self, text: str) -> None:
        if text not in self._is_said:
            self._is_said.add(text)
            self._note(text)


class _Tail:
    """A thread that prints a job's log as it grows, and takes it up again where a connection broke."""

    def __init__(self, api: JobsApi, submission_id: str) -> None:
        self._api = api
        self._id = submission_id
        self._num_printed = 0
        self._is_silent = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._print()), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The job has ended: wait for the rest of its log."""
        self._thread.join(_TAIL_END_S)
        self.be_silent()

    def be_silent(self) -> None:
        """Print no more; the thread ends with the process."""
        self._is_silent = True

    async def _print(self) -> None:
        while not self._is_silent:
            try:
                await self._print_from_the_beginning()
                return
            except (aiohttp.ClientError, OSError, RuntimeError):
                await asyncio.sleep(_RECONNECT_S)

    async def _print_from_the_beginning(self) -> None:
        seen = 0
        async for chunk in self._api.tail(self._id):
            new = chunk[max(0, self._num_printed - seen) :]
            seen += len(chunk)
            self._num_printed = max(self._num_printed, seen)
            if not self._is_silent:
                sys.stdout.write(new)
                sys.stdout.flush()


def print_log(api: JobsApi, submission_id: str, *, follow: bool) -> None:
    """Print a job's log on stdout: what there is, or until the job ends."""
    api.job(submission_id)
    if not follow:
        sys.stdout.write(api.log(submission_id))
        return
    tail = _Tail(api, submission_id)
    try:
        _Waiting(api, submission_id, lambda text: print(text, file=sys.stderr)).until_ended()
    except KeyboardInterrupt:
        tail.be_silent()
        return
    tail.finish()


def _log(api: JobsApi, submission_id: str) -> str:
    try:
        return api.log(submission_id)
    except ClusterUnreachableError:  # its node is gone; Ray keeps the last lines of a failed job elsewhere
        return ""
