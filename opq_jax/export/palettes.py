"""Weights as the values that occur among them and the number of each weight's value.

A byte numbers one of up to 256 values.  Where fewer occur, it numbers a run of weights: a row of a
table of all runs of so many weights.

    values that occur     2    3    4    6   16   256
    weights a byte        8    5    4    3    2     1

The table takes values^weights rows, so few weights are not worth it.  A runtime that knows numbers
of four bits has two a byte of up to 16 values without such a table.
"""

import math
from typing import NamedTuple

import numpy as np

from opq_jax.core.array_types import Int64, Shaped, UInt8

MAX_VALUES = 256
"""Values that a byte can number."""

_RUNS = (8, 5, 4, 3, 2, 1)  # weights a byte; 7 and 6 take no more values than 8 and 5


class Palette(NamedTuple):
  """The values of an array, and the number of each weight's value.

  Attributes:
    values: that occur, different in their bits.
    numbers: of all weights in C order.
  """

  values: Shaped[np.ndarray, ' values']
  numbers: UInt8[np.ndarray, ' weights']

  def run(self, *, whole: bool = False) -> int:
    """Returns how many weights a byte numbers such that indices and table take the fewest bytes.

    Args:
      whole: whether the weights must be whole runs.

    >>> palette_of(np.tile(np.float32([0, 1, 2]), 50000)).run()
    5
    """
    runs = [
      run
      for run in _RUNS
      if self.values.size**run <= MAX_VALUES and not (whole and self.numbers.size % run)
    ]
    return min(runs, key=lambda run: self.bytes_of(run))

  def bytes_of(self, run: int) -> int:
    """Returns the bytes of indices and table with so many weights a byte."""
    table = self.values.size**run * run * self.values.itemsize
    return math.ceil(self.numbers.size / run) + table

  def runs_of(self, run: int) -> tuple[Shaped[np.ndarray, 'rows run'], UInt8[np.ndarray, ' runs']]:
    """Returns the table of all runs of so many weights, and the row of each; the last one is full.

    >>> table, rows = palette_of(np.float32([5, 5, 7])).runs_of(2)
    >>> table[rows].tolist()
    [[5.0, 5.0], [7.0, 5.0]]
    """
    count = self.values.size
    digits = np.stack(np.unravel_index(np.arange(count**run), (count,) * run), axis=-1)
    padded = np.concatenate([self.numbers, np.zeros(-self.numbers.size % run, np.uint8)])
    places = count ** np.arange(run)[::-1]
    rows = np.zeros(padded.size // run, np.uint8)
    for place, column in zip(places, padded.reshape(-1, run).T, strict=True):
      rows += (column * np.uint8(place)).astype(np.uint8)
    return self.values[digits], rows


def palette_of(array: Shaped[np.ndarray, '...']) -> Palette | None:
  """Returns the values of an array that differ in their bits, None if they are more than 256.

  >>> palette_of(np.float32([[0.5, 0.0], [-0.0, 0.5]])).numbers.tolist()
  [1, 0, 2, 1]
  >>> palette_of(np.arange(257.0)) is None
  True
  """
  bits = np.ascontiguousarray(array).reshape(-1).view(f'u{array.itemsize}')
  # of an array without a palette the first weights nearly always tell
  if np.unique(bits[: 1 << 12]).size > MAX_VALUES:
    return None
  values, numbers = np.unique(bits, return_inverse=True)
  if values.size > MAX_VALUES:
    return None
  return Palette(values.view(array.dtype), numbers.reshape(-1).astype(np.uint8))


class SlicedPalettes(NamedTuple):
  """The palettes of slices, their values end to end.

  Attributes:
    palette: all values, and the number of each weight's value within its slice.
    offsets: the number of the first value of each slice.
  """

  palette: Palette
  offsets: Int64[np.ndarray, ' slices']


def sliced_palettes(array: Shaped[np.ndarray, '...'], slices: int) -> SlicedPalettes | None:
  """Returns the palettes of the slices of an array, None if one has more than 256 values.

  Args:
    array: the array.
    slices: leading axes that count slices.

  >>> sliced_palettes(np.float32([[1, 2, 1], [3, 3, 4]]), 1).offsets.tolist()
  [0, 2]
  """
  parts = [palette_of(part) for part in array.reshape(-1, *array.shape[slices:])]
  found = [part for part in parts if part is not None]
  if not found or len(found) < len(parts):
    return None
  sizes = [part.values.size for part in found]
  values = np.concatenate([part.values for part in found])
  numbers = np.concatenate([part.numbers for part in found])
  return SlicedPalettes(Palette(values, numbers), np.cumsum([0, *sizes[:-1]]))
