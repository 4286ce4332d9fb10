"""How it is told that there was no memory, jobs/train/memory.py."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError

from jobs.train.memory import death_for_memory

# As ray 2.60 wrote them, shortened by their middle.
ENDED_BY_RAY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: "
    "6cd76eb5c6c48f5141cff3ba6aeb59785b8078913e3205ec24d243b0) was 5.48GB used / 23.54GB limit (0.232751)\n"
    "OOM kill reason: Memory usage 5883121664B exceeded threshold of 252760592B (1.0% of 25276059648B "
    "limit)\n"
)
ENDED_BY_SIGKILL = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
    "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes "
    "include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force "
    "was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OutOfMemoryError(ENDED_BY_RAY),  # type: ignore[no-untyped-call]
            "Ray ended it because its node ran low on memory (5.48GB used / 23.54GB limit)",
        ),
        (
            RuntimeError(f"A worker health check failed.\n{ENDED_BY_SIGKILL}"),
            "its process vanished, as one does that the kernel ends for want of memory",
        ),
        (RuntimeError("ValueError: wrong"), None),
    ],
)
def test_a_worker_that_died_for_want_of_memory_is_told_from_others(
    error: Exception, told: str | None
) -> None:
    assert death_for_memory(error) == told
