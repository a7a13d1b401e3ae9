"""Machine code for the loops of quantizers, made by numba when they first run.

Compiled functions release the interpreter lock, so that threads run them side by side, and follow IEEE arithmetic in
the order written (no fast-math, no fused multiply-add): the bytes they make are the same on every processor. Import
this only in code that runs in worker processes: numba takes half a second to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first call; the machine code is kept on disk where there is a place to write to.

    numba notices a change of the file a function is in, but not of functions it calls in other files: compiled
    functions that call one another belong in one file.
    """
    try:
        made: Callable[P, R] = numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # "no locator available": neither the package nor the user's cache folder can be written
        made = numba.njit(function, nogil=True)
    return made
