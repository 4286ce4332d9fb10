"""The C library's allocator, told that what is freed will soon be taken again.

Enters: nothing. Leaves: a setting of this process.
A forward pass frees hundreds of megabytes that the next one takes again. glibc hands them back to the system
in between, and the system clears them anew, page by page, while the other threads of the pass wait.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

# glibc's malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

_MIB: Final = 1 << 20
_LARGEST_BYTES: Final = 32 * _MIB  # glibc allows no more; what is larger has pages of its own
_FREE_BYTES: Final = 1024 * _MIB
# Threads but the first take memory from areas of this size. An empty one goes back, unless as much as this is
# to be free beyond what is taken, and then none does. Only addresses are reserved.
_AREA_BYTES: Final = 64 * _MIB


def keep_freed_memory() -> None:
    """Keep freed memory for this process from now on, that of tensors of up to 32 MiB.

    Of what the main thread frees it is up to 1 GiB; other threads keep all that they had at their peak. Where
    the C library is not glibc, nothing is done.

    Source: mallopt(3); heap_trim in glibc's malloc/arena.c.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _FREE_BYTES)
        mallopt(_M_TOP_PAD, _AREA_BYTES)
