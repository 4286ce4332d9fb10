"""Numba's compiler, as this package uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """The function in machine code, compiled on its first call, kept on disk, and run without the GIL.

    Where the installation is read-only Numba takes the user's cache folder (or NUMBA_CACHE_DIR). Where
    nothing can be written it refuses; then every process compiles for itself.
    """
    return _compile(function)


def compiled_fused(function: _Function) -> _Function:
    """As `compiled`, and a product and a sum may become one instruction, with one rounding instead of two."""
    return _compile(function, fastmath={"contract", "nsz"}, error_model="numpy")


def _compile(function: _Function, **options: Any) -> _Function:
    try:
        return cast("_Function", numba.njit(cache=True, nogil=True, **options)(function))
    except RuntimeError:
        return cast("_Function", numba.njit(nogil=True, **options)(function))
