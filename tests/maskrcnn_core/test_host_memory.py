"""What the allocator hands back to the system between two passes, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Takes, fills and frees the same 160 MiB again and again, on the main thread or on one of its own, as under
# Ray Train; prints the page faults of the last ten times.
PASSES = """
import ctypes, resource, sys, threading
from maskrcnn_core.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)
SIZE = 4 << 20

def one_pass():
    blocks = [libc.malloc(SIZE) for _ in range(40)]
    for block in blocks:
        libc.memset(block, 1, SIZE)
    for block in blocks:
        libc.free(block)

def work():
    if sys.argv[1] == "kept":
        keep_freed_memory()
    for _ in range(10):
        one_pass()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        one_pass()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[2] == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""
PAGES_OF_A_PASS = 160 * 256


def page_faults(*how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PASSES, *how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_memory_of_a_pass_is_kept_for_the_next(where: str) -> None:
    assert page_faults("kept", where) < PAGES_OF_A_PASS / 100
    # Else there would be nothing to tell glibc, and keep_freed_memory could go.
    assert page_faults("as it is", where) > PAGES_OF_A_PASS
