"""Loops compiled by numba, for algorithms that take one weight after the other."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function` in machine code, compiled at its first call and kept on disk.

  The machine code runs without the interpreter's lock, so threads run in parallel.  Where nothing
  can be kept on disk (package folder and home are both read-only), every process compiles anew.

  >>> @compiled
  ... def total(n):
  ...   result = 0
  ...   for i in range(n):
  ...     result += i
  ...   return result
  >>> total(5)
  10
  """
  try:
    return numba.njit(cache=True, nogil=True)(function)
  except RuntimeError:  # raised by numba where no folder can hold the machine code
    return numba.njit(nogil=True)(function)
