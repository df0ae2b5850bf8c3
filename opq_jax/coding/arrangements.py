"""Axes of a kernel as taps of a window, inputs and outputs.

Four arrangements of the axes of an array serve the layouts of the frameworks:

    0   taps: all axes but the last two; then inputs, outputs       Flax, Keras
    1   outputs (or inputs), inputs; taps: all axes but the first two      PyTorch
    2   inputs: all axes but the last; outputs                      no window
    3   inputs: the first axis; outputs: all others                 no window

In arrangement 1 the first axis takes the place of the inputs and the second that of the outputs.
An arrangement is possible for arrays of two axes and more whose window has at most three axes and
1024 taps, with at most 2**18 outputs.  All four are views: nothing is copied.

Weights go tap by tap, and of a tap in blocks of as many inputs as have at most 2**18 weights.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from opq_jax.core.array_types import Int8

BLOCK = 1 << 18
"""Weights that are coded at once: large enough for NumPy, small enough for a processor's cache."""

MAX_TAPS = 1024
"""Taps of a window.  Each is a step of Python's, and no window of a network has as many."""

MAX_WINDOW_AXES = 3

FLAX, TORCH, JOINED_INPUTS, JOINED_OUTPUTS = range(4)

Kernel = Int8[np.ndarray, 'taps inputs outputs']


class Arranged(NamedTuple):
  """An array seen as a kernel.

  Attributes:
    kernel: a view, [taps, inputs, outputs].
    window: the shape of the window, whose product is the number of taps.
  """

  kernel: Kernel
  window: tuple[int, ...]


def choices(shape: tuple[int, ...]) -> list[int]:
  """Returns the arrangements of an array that an encoder should try.

  Three axes may be a window of one axis, or a projection onto heads; then all are tried.

  >>> choices((3, 3, 16, 32)), choices((32, 16, 3, 3)), choices((16, 32)), choices((32,))
  ([0], [1], [2], [])
  """
  first, last = math.prod(shape[:-2]), math.prod(shape[2:])
  # a window has few taps, and inputs times outputs are many: the window is at the smaller end
  window = TORCH if 1 < last < first else FLAX
  tried = {0: [], 1: [], 2: [JOINED_INPUTS], 3: [window, JOINED_INPUTS, JOINED_OUTPUTS]}
  return [choice for choice in tried.get(len(shape), [window]) if is_possible(shape, choice)]


def is_possible(shape: tuple[int, ...], arrangement: int) -> bool:
  """Returns whether an array of this shape can be arranged so."""
  if len(shape) < 2:
    return False
  window = _window(shape, arrangement)
  outputs = (shape[-1], shape[1], shape[-1], math.prod(shape[1:]))[arrangement]
  # a block is one input at least: all outputs of an input must fit into it
  return len(window) <= MAX_WINDOW_AXES and math.prod(window) <= MAX_TAPS and outputs <= BLOCK


def arranged(codes: Int8[np.ndarray, '...'], arrangement: int) -> Arranged:
  """Returns the array as a kernel.

  >>> arranged(np.zeros((3, 3, 16, 32), np.int8), 0).kernel.shape
  (9, 16, 32)
  """
  window = _window(codes.shape, arrangement)
  # reshapes split or join whole axes of a contiguous array: the views share its memory, so a
  # decoder fills the array by writing to the kernel
  if arrangement == FLAX:
    return Arranged(codes.reshape(-1, *codes.shape[-2:]), window)
  if arrangement == TORCH:
    return Arranged(np.moveaxis(codes.reshape(*codes.shape[:2], -1), -1, 0), window)
  if arrangement == JOINED_INPUTS:
    return Arranged(codes.reshape(1, -1, codes.shape[-1]), window)
  return Arranged(codes.reshape(1, codes.shape[0], -1), window)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
  """Yields tap and inputs of every block of a kernel, in the order of the payload."""
  taps, inputs, outputs = shape
  count = BLOCK // outputs
  for tap in range(taps):
    for start in range(0, inputs, count):
      yield tap, slice(start, min(start + count, inputs))


def _window(shape: tuple[int, ...], arrangement: int) -> tuple[int, ...]:
  return {FLAX: shape[:-2], TORCH: shape[2:]}.get(arrangement, ())
