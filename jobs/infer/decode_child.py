"""What runs in a decoder process: encoded bytes come in on a socket, pixels go out in shared memory.

Started by decoders.py with the descriptor of its end of a socket pair. It imports Pillow, numpy and
maskrcnn_core.images and nothing heavier, so it is up in a tenth of a second and holds 30 MB; nothing of it is
worth keeping, and whoever started it may kill it at any time.

    request   REQUEST: number of a page, length of the image_id, length of the encoded bytes; then the
              image_id. A page is a file in memory that holds the encoded bytes; its descriptor comes along
              the first time.
    reply     REPLY: height, width and nanoseconds, with (H, W, 3) uint8 pixels in the place of the encoded
              bytes; or 0, the length of the UTF-8 text that follows, "kind\nmessage", and nanoseconds

One REPLY of zeros says that it is ready.
"""

import ctypes
import logging
import os
import resource
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Final

import numpy as np

from jobs.lake import failpoints
from maskrcnn_core.images import DecodeError, open_picture

REQUEST: Final = struct.Struct("<IIQ")
REPLY: Final = struct.Struct("<IIQ")

_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, parent_pid: int, max_pixels: int, max_bytes: int) -> None:
    """Serve until the other end closes the socket.

    Args:
        parent_pid: ends with it.
        max_pixels: of a picture, as decode_image takes it.
        max_bytes: of memory for one picture, beside twice the file and the pixels that are handed out.
    """
    _live_and_die_with(parent_pid)
    idle_bytes = _data_bytes()
    pages: dict[int, int] = {}
    with socket.socket(fileno=socket_fd) as channel:
        channel.sendall(REPLY.pack(0, 0, 0))
        while True:
            header, descriptors, _, _ = socket.recv_fds(channel, REQUEST.size, 1, socket.MSG_WAITALL)
            if len(header) < REQUEST.size:
                return
            page, id_length, data_length = REQUEST.unpack(header)
            if descriptors:
                pages[page] = descriptors[0]
            image_id = channel.recv(id_length, socket.MSG_WAITALL).decode("utf-8", "replace")
            # The data limit counts what is private to this process, not the pages, which are shared.
            _limit(resource.RLIMIT_DATA, idle_bytes + max_bytes + 2 * data_length)
            channel.sendall(_answer(pages[page], image_id, data_length, max_pixels))


def _answer(page: int, image_id: str, length: int, max_pixels: int) -> bytes:
    """The reply, once the pixels are in the page."""
    started = time.perf_counter_ns()
    height = width = 0
    text = b""
    try:
        failpoints.reach("decode_image", image_id)
        height, width = _decode(page, length, max_pixels)
    except DecodeError as error:
        text = f"{error.kind}\n{error}".encode("utf-8", "replace")
    except MemoryError:
        text = b"too_large\n%d bytes that ask for more memory than a picture may take" % length
    return REPLY.pack(height, width or len(text), time.perf_counter_ns() - started) + text


def _decode(page: int, length: int, max_pixels: int) -> tuple[int, int]:
    """Height and width. The page is written, not mapped: it would count as this process's own memory."""
    picture = open_picture(_read(page, length), max_pixels)
    end = 0
    for strip in picture.strips():
        rest = np.ascontiguousarray(strip).data.cast("B")
        while rest:
            written = os.pwrite(page, rest, end)
            rest, end = rest[written:], end + written
    return picture.height, picture.width


def _read(page: int, length: int) -> bytes:
    data = os.pread(page, length, 0)
    if len(data) != length:
        raise RuntimeError(f"a page holds {len(data)} bytes, {length} were announced")
    return data


def _live_and_die_with(parent_pid: int) -> None:
    """Leave Ctrl-C to the parent, end when it ends, and go first where the system is short of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    _silence_libraries()
    if sys.platform != "linux":
        return  # the socket's end is noticed between two pictures
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the process that wanted a decoder has ended")
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _silence_libraries() -> None:
    """libtiff prints a line for every bad row of every file; Python's own last words still get through."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, at present; 0 where the system does not say."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 0


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    with suppress(OSError, ValueError):  # not on every system, and never above what somebody else has set
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
