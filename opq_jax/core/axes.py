"""The axes of a leaf's output channels: one, or several whose joint index is the channel's.

A projection onto heads [inputs, heads, features] has heads times features output channels, those
of the same matrix [inputs, outputs] before it was reshaped.
"""

import math
from typing import Any

ChannelAxes = int | tuple[int, ...]
"""An axis, or several; negative ones count from the end."""


def numbers_of(axes: ChannelAxes, ndim: int) -> tuple[int, ...]:
  """Returns the axes as ascending numbers.

  Raises:
    ValueError: an array of `ndim` axes has none of such a number, one is named twice, or no axis
      is left for the weights of a channel.

  >>> numbers_of(-1, 3), numbers_of((2, -2), 3)
  ((2,), (1, 2))
  """
  given = axes if isinstance(axes, tuple) else (axes,)
  numbers = sorted({axis % ndim for axis in given if -ndim <= axis < ndim})
  if not given or len(numbers) != len(given) or len(numbers) >= max(ndim, 2):
    raise ValueError(f'found {axes}, expected one axis, or several of {ndim} but not all')
  return tuple(numbers)


def in_slice(axes: ChannelAxes, slices: int) -> ChannelAxes:
  """Returns the numbers that axes of a leaf have in its slices.

  >>> in_slice((2, 3), 1), in_slice(-1, 1)
  ((1, 2), -1)
  """
  if isinstance(axes, tuple):
    return tuple(axis - slices if axis >= 0 else axis for axis in axes)
  return axes - slices if axes >= 0 else axes


def count(shape: tuple[int, ...], axes: ChannelAxes) -> int:
  """Returns the number of output channels; a vector is one."""
  if len(shape) < 2:
    return 1
  return math.prod(shape[axis] for axis in numbers_of(axes, len(shape)))


def joined(array: Any, axes: ChannelAxes) -> tuple[Any, int]:
  """Returns the array with one axis of output channels, and that axis.

  Axes side by side are joined in a view; others are moved together first, to the place of the
  first of them.

  Args:
    array: of two axes or more.
    axes: of its output channels.

  >>> import numpy as np
  >>> array = np.zeros((5, 4, 3))
  >>> joined(array, (1, 2))[0].shape, joined(array, (0, 2))[0].shape
  ((5, 12), (15, 4))
  """
  first, *others = numbers_of(axes, array.ndim)
  if not others:
    return array, first
  rest = [axis for axis in range(array.ndim) if axis != first and axis not in others]
  order = (*rest[:first], first, *others, *rest[first:])
  moved = array.transpose(order)
  shape = [array.shape[axis] for axis in rest]
  channels = math.prod(array.shape[axis] for axis in (first, *others))
  return moved.reshape(*shape[:first], channels, *shape[first:]), first
