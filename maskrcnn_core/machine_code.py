"""Numba's compiler, as this package uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """The function in machine code, compiled on its first call, kept on disk, and run without the GIL.

    Each product and sum is rounded by itself, as written; a division by zero gives infinity or NaN. Where the
    installation is read-only Numba takes the user's cache folder (or NUMBA_CACHE_DIR). Where nothing can be
    written it refuses; then every process compiles for itself.
    """
    try:
        return cast("_Function", numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:
        return cast("_Function", numba.njit(nogil=True, error_model="numpy")(function))
