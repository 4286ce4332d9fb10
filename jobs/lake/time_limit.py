"""A limit on the time of a call that may never come back.

deltalake's calls are such: they know no limit of their own, and users of the kernel below it report readers
that wait for ever for one of its own tasks (ClickHouse issue 117280; not seen here).
"""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from schemas.errors import StorageError

ResultT = TypeVar("ResultT")


class HungCallError(StorageError):
    """A call did not come back. Whether it does its work yet is not known; its thread is left behind."""


def within(limit_s: float, what: str, call: Callable[[], ResultT]) -> ResultT:
    """What the call returns or raises, if it does so in time. It runs on a thread of its own.

    Args:
        what: the call in words, for the message: "reading the log".

    Raises:
        HungCallError: it did not.
    """
    outcome: queue.SimpleQueue[tuple[ResultT | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:  # raised again where it is waited for
            outcome.put((None, error))

    threading.Thread(target=run, name=what, daemon=True).start()  # a daemon: it must not keep a process up
    try:
        result, error = outcome.get(timeout=limit_s)
    except queue.Empty:
        raise HungCallError(f"{what} did not come back in {limit_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # the call's own, None included
