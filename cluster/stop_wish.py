"""The wish that a job stop: how it reaches a driver that Ray's Jobs API started somewhere on a cluster.

Enters: a submission's id, by `python -m cluster.stop_wish ID`, which is itself a tiny job. Leaves: a SIGTERM
in the driver, which then does what SIGTERM makes it do anywhere: it commits what is finished and ends.

Between the two stands an actor, named after the submission, that only keeps the wish. It is the driver's,
and is gone with it. Ray's own stop gives a driver three seconds, too little for a commit to a slow store.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.session import connect, shutdown
from schemas.errors import MasklakeError

NAMESPACE = "masklake"
_LOOK_S = 1.0  # between two looks for the wish
_RETRY_S = 2.0
_ANSWER_S = 15.0
_NUDGE = signal.SIGURG  # which nobody minds
_NUDGES = 3  # the first does, unless it too comes right before the thread falls asleep
# A driver imports for some seconds before it has its actor.
_APPEARS_S = 20.0


class StoppedError(MasklakeError):
    """The command was asked to stop at a time when it had nothing to commit."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does; in a submitted job so does a wish, within some two seconds.

    In a submitted job the cluster is joined at once and left at the end, so that a wish can be told also
    while the job lists its source, or is between two passes over it.

    Raises:
        StoppedError: in the place of a KeyboardInterrupt that nobody inside took.
    """
    submission_id = own_submission_id()
    with _sigterm_interrupts():
        try:
            if submission_id is None:
                yield
                return
            connect()
            listener = _Listener(submission_id)
            try:
                yield
            finally:
                listener.close()
                shutdown()
        except KeyboardInterrupt:
            raise StoppedError("stopped; run the same command again to go on.") from None


def own_submission_id() -> str | None:
    """Of the Ray job whose driver this process is; None: it is none, or not one that was submitted."""
    config = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    found = config.get("metadata", {}).get("job_submission_id")
    return None if found is None else str(found)


def bring_wish(submission_id: str) -> str | None:
    """Tell a job's actor, from a process that is connected. None: it was told; else why it could not be.

    A driver that has little to commit may be gone before its actor's answer is here: an actor that was sent
    the wish and is no more counts as told.
    """
    deadline = time.monotonic() + _APPEARS_S
    was_sent = False
    while True:
        try:
            keeper: Any = ray.get_actor(_actor_name(submission_id), namespace=NAMESPACE)
            answer = keeper.wish.remote()
            was_sent = True
            ray.get(answer, timeout=_ANSWER_S)
            return None
        except ValueError:
            problem = None if was_sent else "has no actor that takes wishes"
        except (GetTimeoutError, RayError):
            problem = "does not answer"
        if time.monotonic() > deadline:
            return problem
        time.sleep(_RETRY_S)


class _Keeper:
    """Keeps the wish; an actor."""

    def __init__(self) -> None:
        self._wished = asyncio.Event()

    async def wish(self) -> None:
        self._wished.set()

    async def wished(self) -> None:
        """Returns once the wish is there."""
        await self._wished.wait()


class _Listener:
    """A thread that turns the wish into one SIGTERM."""

    def __init__(self, submission_id: str) -> None:
        self._name = _actor_name(submission_id)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-wish", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(_ANSWER_S)

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                keeper = self._keeper()
                wish = keeper.wished.remote()
                while not self._ended.is_set():
                    if ray.wait([wish], timeout=_LOOK_S)[0]:
                        ray.get(wish)
                        interrupt_main_thread()
                        for _ in range(_NUDGES):
                            if self._ended.wait(_RETRY_S):
                                break
                            _nudge_main_thread()
                        return
            except (RayError, ValueError):  # it died, or the name still is another's: a new one
                self._ended.wait(_RETRY_S)

    def _keeper(self) -> Any:
        """On the driver's own node, which a wish then is lost with at the earliest."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = ray.remote(_Keeper).options(
            num_cpus=0, name=self._name, namespace=NAMESPACE, get_if_exists=True, scheduling_strategy=node
        )
        return options.remote()


def _actor_name(submission_id: str) -> str:
    return f"stop-{submission_id}"


def interrupt_main_thread() -> None:
    """SIGTERM for the main thread itself: one sent to the process may go to another, and leave it asleep."""
    main_thread = threading.main_thread().ident
    if main_thread is not None:
        signal.pthread_kill(main_thread, signal.SIGTERM)


def _nudge_main_thread() -> None:
    """End the wait of a thread that took its SIGTERM right before it fell asleep: Python saw it, and would
    act on it on waking up only.
    """
    main_thread = threading.main_thread().ident
    if main_thread is not None:
        signal.pthread_kill(main_thread, _NUDGE)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    # A signal that is handled ends a wait, unlike one that is ignored; whoever waited waits on.
    nudged = signal.signal(_NUDGE, lambda signum, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(_NUDGE, nudged)


def main(submission_id: str) -> int:
    """Bring the wish; prints one line, and is 1 where the job could not be told."""
    connect()
    try:
        problem = bring_wish(submission_id)
    finally:
        shutdown()
    print(problem or "asked", flush=True)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
