"""Loops compiled by numba, for what has to go one weight after the other."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function in machine code, made when it is first called and kept on disk for next time.

  It runs without the interpreter's lock, so that threads work side by side.  Where nothing can be
  kept (a package folder and a home that are read-only), every process compiles it again.

  >>> @compiled
  ... def total(n):
  ...   found = 0
  ...   for i in range(n):
  ...     found += i
  ...   return found
  >>> total(5)
  10
  """
  try:
    return numba.njit(cache=True, nogil=True)(function)
  except RuntimeError:  # numba's way to say that it finds no place
    return numba.njit(nogil=True)(function)
