"""Loops compiled by numba, one weight after the other, and threads that run them leaf by leaf."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import threadpoolctl

from opq_jax.core import memory


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


def on_all_processors(
  function: Callable[..., Any], *arguments: Iterable[Any], blas_threads: int | None = 1
) -> list[Any]:
  """Returns the results of a function that runs without the interpreter's lock, leaf by leaf.

  No more leaves at once than processors, since each has arrays of several times its size.

  Args:
    function: called once a leaf.
    arguments: of each call.
    blas_threads: that BLAS has in each thread.  More than one would wait for a processor in loops
      that keep it busy, and make sums depend on how many there are; None for its own default.

  >>> on_all_processors(pow, [2, 3], [5, 2])
  [32, 9]
  """
  memory.return_freed_blocks()
  blas = threadpoolctl.threadpool_limits(blas_threads, user_api='blas')
  with blas, ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(function, *arguments))
