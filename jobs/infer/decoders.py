"""Decoder processes: encoded bytes in, pixels or the reason why there are none out.

A decoder that crashes, hangs or eats memory is a child process that ends, not the actor with its model, nor
the images beside it. Each child has a lane, a thread that hands it the images and waits: the GIL is free for
the network. Encoded bytes and pixels travel in memory that both map, and only numbers through the socket.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

import jobs
from jobs.infer.decode_child import REPLY, REQUEST
from jobs.infer.rows import Failure
from maskrcnn_core.images import MAX_DECODE_BYTES, MAX_PIXELS
from schemas.labels import ErrorKind

Pixels = NDArray[np.uint8]
Decoded = tuple[Pixels | Failure, float]

DECODE_TIMEOUT_S: Final = 60.0
"""Wall-clock seconds that an image may take. The slowest that was tried, a progressive JPEG of 64 megapixels,
takes 3 s on a busy core; what takes twenty times as long hangs, or was made to.
"""

# Importing takes 0.15 s on an idle machine. A node that is just starting its workers, from a disk far away,
# takes its time; and what fails here is the installation, not an image.
_START_TIMEOUT_S = 120.0

# A child may also die of what has nothing to do with its image: the system's memory ran out, a person killed
# it. Only an image that takes two along is to blame.
_TRIES = 2

# One in work and one waiting, or a child would be idle until its lane gets a turn.
_IMAGES_IN_FLIGHT = 2

# Larger pages are emptied once their image is done with, or the largest pictures of a source would keep what
# they took, page by page. Photographs of 5 megapixels fit.
_MAX_KEPT_PAGE_BYTES = 16 << 20

_MODULE = "jobs.infer.decode_child"

# Of storage, of Ray's cluster, of trackers: a decoder needs none of them.
_SECRET_PREFIXES: Final = ("AWS_", "GOOGLE_", "RAY_", "WANDB_", "MLFLOW_")
_CHILD_SETTINGS: Final = {
    "OPENBLAS_NUM_THREADS": "1",  # nothing in a decoder multiplies matrices
    "OMP_NUM_THREADS": "1",
    # glibc hands memory of this size back to the system with every image, and has it cleared again for the
    # next: 1.6 ms of processor time for a 640×480 JPEG became 3.5. Kept: pictures of 4 megapixels.
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
}


class DecoderStartError(RuntimeError):
    """A decoder process does not come up. No image is to blame, so nothing is recorded as failed."""


@dataclass(frozen=True)
class Limits:
    """What an image may take.

    Attributes:
        timeout_s: wall-clock seconds.
        max_pixels: as decode_image takes it.
        max_bytes: of memory, beside twice the file and its pixels.
    """

    timeout_s: float = DECODE_TIMEOUT_S
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_DECODE_BYTES


class DecoderPool:
    """Decodes on up to `num` child processes, each started when there is an image for it.

    close() it, or let it go, or end the interpreter: the children end with it.
    """

    def __init__(self, num: int, limits: Limits | None = None) -> None:
        self._num = num
        self._limits = limits or Limits()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lanes: list[_Lane] = []
        self._close = weakref.finalize(self, _close, self._lanes, self._jobs)

    def submit(self, image_id: str, data: bytes) -> Future[Decoded]:
        """Decode when a child is free.

        Returns:
            (H, W, 3) uint8 RGB in memory of its own, which lives as long as the array does, or a Failure;
            and the seconds that the child spent on it.

        Raises (from the future):
            DecoderStartError: no child comes up.
        """
        if not self._close.alive:
            raise RuntimeError("the decoders are closed.")
        job = _Job(image_id, data)
        self._jobs.put(job)
        if len(self._lanes) < self._num:
            self._lanes.append(_Lane(self._jobs, self._limits))
        return job.future

    def close(self) -> None:
        """End the children, whatever they are at; what was submitted and is not decoded is cancelled."""
        self._close()


def _close(lanes: list[_Lane], jobs: queue.SimpleQueue[_Job | None]) -> None:
    with suppress(queue.Empty):
        while job := jobs.get_nowait():
            job.future.cancel()
    for lane in lanes:
        lane.stop()
        jobs.put(None)
    for lane in lanes:
        lane.join()


@dataclass(eq=False)
class _Job:
    image_id: str
    data: bytes
    future: Future[Decoded] = field(default_factory=Future)
    deaths: int = 0


class _Lane:
    """Takes images from the queue to one child and back; knows nothing of the pool, so that the pool can be
    let go.
    """

    def __init__(self, jobs: queue.SimpleQueue[_Job | None], limits: Limits) -> None:
        self._jobs = jobs
        self._limits = limits
        self._in_flight: deque[_Job] = deque()
        self._child: _Child | None = None
        self._lock = threading.Lock()  # between starting a child and stopping
        self._stopped = False
        # A daemon, or the interpreter would wait for an image that hangs before it ends.
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Kill the child; the lane then ends by itself."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()

    def join(self) -> None:
        self._thread.join()

    def _must_stop(self) -> bool:
        with self._lock:
            return self._stopped

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._take() and self._give()
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._bury()
                while self._in_flight:
                    self._in_flight.popleft().future.set_exception(error)
        self._bury()
        for job in self._in_flight:
            job.future.cancel()

    def _take(self) -> bool:
        """Fill up what is in flight; wait only where nothing is. False when there will be no more."""
        while len(self._in_flight) < _IMAGES_IN_FLIGHT:
            try:
                job = self._jobs.get(block=not self._in_flight)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._in_flight.append(job)
            if self._child is not None:
                self._child.ask(job)
        return True

    def _give(self) -> bool:
        """Wait for the answer to the first in flight. False once stopped."""
        job = self._in_flight[0]
        try:
            if self._child is None and not self._start():
                return False
            assert self._child is not None
            outcome = self._child.answer(self._limits.timeout_s)
        except TimeoutError:
            self._bury()
            outcome = self._timed_out(job), self._limits.timeout_s
        except (EOFError, OSError):
            status = self._bury()
            if self._must_stop():
                return False
            job.deaths += 1
            if job.deaths < _TRIES:
                return True
            outcome = _crashed(job, status), 0.0
        self._in_flight.popleft().future.set_result(outcome)
        return True

    def _start(self) -> bool:
        """A new child, asked for all that is in flight."""
        try:
            with self._lock:
                if self._stopped:
                    return False
                self._child = _Child(self._limits)
            self._child.wait_until_ready()
        except (EOFError, OSError) as error:  # a TimeoutError is an OSError
            status = self._bury()
            if self._must_stop():
                return False
            raise DecoderStartError(
                f"no decoder process comes up (it ended {_how_it_ended(status)}; {error}): "
                f"`{sys.executable} -m {_MODULE}` must be able to start on this node; its log has more"
            ) from error
        for job in self._in_flight:
            self._child.ask(job)
        return True

    def _bury(self) -> int:
        """The exit status of the child, negative for a signal; killed if it has none yet."""
        with self._lock:
            child, self._child = self._child, None
        return 0 if child is None else child.end()

    def _timed_out(self, job: _Job) -> Failure:
        return Failure(
            ErrorKind.TIMEOUT,
            f"decoding {len(job.data)} bytes took longer than {self._limits.timeout_s:g} s and was stopped",
        )


def _crashed(job: _Job, status: int) -> Failure:
    return Failure(
        ErrorKind.CRASHED,
        f"{_TRIES} decoder processes died on these {len(job.data)} bytes, the last one "
        f"{_how_it_ended(status)}",
    )


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"with exit status {status}"
    try:
        return f"of {signal.Signals(-status).name}"
    except ValueError:
        return f"of signal {-status}"


class _Child:
    """One decoder process, our end of the socket to it, and the pages that lie between us."""

    def __init__(self, limits: Limits) -> None:
        self._free_pages: list[_Page] = []
        self._pages_in_work: deque[_Page] = deque()
        self._num_pages = 0
        self._socket, theirs = socket.socketpair()
        numbers = (theirs.fileno(), os.getpid(), limits.max_pixels, limits.max_bytes)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal goes to all of the terminal's session
                env=_environment(),
            )

    def wait_until_ready(self) -> None:
        self._receive(REPLY.size, time.monotonic() + _START_TIMEOUT_S)

    def ask(self, job: _Job) -> None:
        """Send an image on its way. Never waits: what goes through the socket fits into its buffer."""
        page = self._free_pages.pop() if self._free_pages else None
        descriptors = []
        if page is None:
            page = _Page(self._num_pages)
            self._num_pages += 1
            descriptors = [page.descriptor]
        page.write(job.data)
        name = job.image_id.encode("utf-8", "replace")[:_MAX_NAME_BYTES]
        message = REQUEST.pack(page.number, len(name), len(job.data)) + name
        self._pages_in_work.append(page)
        with suppress(OSError):  # it died meanwhile: that shows when its answer does not come
            socket.send_fds(self._socket, [message], descriptors)

    def answer(self, timeout_s: float) -> Decoded:
        """To the first question that has none. Raises TimeoutError, or EOFError or OSError where it died."""
        deadline = time.monotonic() + timeout_s
        first, second, nanoseconds = REPLY.unpack(self._receive(REPLY.size, deadline))
        seconds = 1e-9 * nanoseconds
        if first:
            return self._pages_in_work.popleft().pixels(first, second, self._free_pages), seconds
        kind, _, message = self._receive(second, deadline).decode().partition("\n")
        self._pages_in_work.popleft().go(self._free_pages)
        return Failure(ErrorKind(kind), message), seconds

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        self._process.kill()
        self._socket.close()
        return self._process.wait()

    def _receive(self, length: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < length:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(length - len(received))
            if not part:
                raise EOFError("it closed the connection")
            received += part
        return bytes(received)


# S3 allows 1024; a member of a tar may be called anything. Only failpoints look at it.
_MAX_NAME_BYTES = 4096

_NO_MEMORY: Pixels = np.zeros(0, np.uint8)


class _Page:
    """A file in memory: encoded bytes on the way there, pixels on the way back. It is used again: the system
    takes longer to find and clear new memory for each image than to fill what is there.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        # Not in /dev/shm, which a container gives 64 MB; on disk where the system has nothing better.
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("masklake-page")
        else:
            self.descriptor, path = tempfile.mkstemp(prefix="masklake-page-")
            os.unlink(path)
        self._memory = _NO_MEMORY
        self._num_bytes = 0

    def __del__(self) -> None:
        os.close(self.descriptor)

    def write(self, data: bytes) -> None:
        self._num_bytes = len(data)
        rest, end = memoryview(data), 0
        while rest:
            written = os.pwrite(self.descriptor, rest, end)
            rest, end = rest[written:], end + written

    def pixels(self, height: int, width: int, home: list[_Page]) -> Pixels:
        """What the child wrote, without a copy. When the last view of it is gone, the page goes home."""
        num_bytes = height * width * 3
        self._num_bytes = max(self._num_bytes, num_bytes)
        if self._memory.size < num_bytes:
            self._memory = np.frombuffer(mmap.mmap(self.descriptor, num_bytes), np.uint8)
        address = int(self._memory.__array_interface__["data"][0])
        return np.asarray(_Loan(self, address, (height, width, 3), home))

    def go(self, home: list[_Page]) -> None:
        if self._num_bytes > _MAX_KEPT_PAGE_BYTES:
            self._memory = _NO_MEMORY
            os.ftruncate(self.descriptor, 0)
        home.append(self)


class _Loan:
    """What NumPy holds on to as long as an array or a view of it looks into a page."""

    def __init__(self, page: _Page, address: int, shape: tuple[int, int, int], home: list[_Page]) -> None:
        self._page = page
        self._home = home
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
        }

    def __del__(self) -> None:
        self._page.go(self._home)


def _environment() -> dict[str, str]:
    """Ours, with the modules found where we find them, without credentials: pictures are strangers'."""
    root = str(Path(jobs.__path__[0]).parent)
    path = os.pathsep.join([root, *(entry for entry in sys.path if entry)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIXES)}
    return {**kept, "PYTHONPATH": path, **_CHILD_SETTINGS}
