"""What the CPU kernels share: threads, and bfloat16, which NumPy and Numba lack.

Not Numba's own `prange`: its default thread pool ends the process when two Python threads enter it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor


def for_each_range(work: Callable[[int, int], None], size: int, at_least: int) -> None:
    """Call work(start, stop) so that 0 ... size is covered once, on torch's number of threads.

    Args:
        at_least: most ranges are no smaller than this.
    """
    threads = torch.get_num_threads()
    step = max(at_least, -(-size // (4 * threads)))  # a few ranges a thread: some cost more than others
    starts = iter(range(0, size, step))

    def drain() -> None:
        for start in starts:  # hands each start out once: a range's iterator moves on under the GIL
            work(start, min(start + step, size))

    others = min(threads, -(-size // step)) - 1
    helpers = [_pool(threads).submit(drain) for _ in range(others)]
    drain()
    for helper in helpers:
        helper.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="masklake-ops")


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A contiguous CPU tensor's memory; bfloat16 as uint16, for `widen` and `narrow`."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _widen(typing_context: Any, value: Any) -> Any:
    """float32 of a float32, or of a bfloat16's 16 bits: they are a float32's upper half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


def _narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """float32 -> the type of `like`: itself, or bfloat16's 16 bits, rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.return_type == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        # a NaN whose payload is all low bits would round to infinity
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        kept = builder.select(nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(word, 16)), ir.IntType(16))

    return like(types.float32, like), generate


widen: Any = intrinsic(_widen)
narrow: Any = intrinsic(_narrow)
