"""Neighbours of a weight in the window of its kernel: how large they are, and of which sign.

The neighbours of a weight c are those weights c_i of the same input and output that lie at taps
before its own, in C order, at most one step away along each axis of the window: with weight w_i = 6
one step along one axis, with weight w_i = 1 one step along each of two axes.  A decoder knows them.

    m   =  floor(12 sum w_i |c_i| / sum w_i)        their mean magnitude in twelfths of a level
    a   =  [2 |sum w_i c_i| >= sum w_i |c_i|]       1 where their signs mostly agree
    activity of c  =  0                              where c has no neighbours
                      1 + 2 #{edges <= m} + a        else

The sign of c is flipped where sum w_i c_i < 0: neighbours of a smooth window have like signs, so
that flipped codes are mostly positive.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from opq_jax.coding.arrangements import Kernel
from opq_jax.core.array_types import Bool, Int8, UInt8

_EDGES = (1, 3, 6, 10, 16, 28, 48, 90, 160)
"""Mean magnitudes at which the activity rises, in twelfths of a level: nearly a geometric series
from 1/12 to 13 levels, within which the codes of a kernel lie."""

_ALONG_AXIS, _ACROSS = 6, 1
"""Weights of neighbours one step along one axis, and along two."""

ACTIVITIES = 1 + 2 * (len(_EDGES) + 1)
"""The number of activities, 21: none, and two for each of 10 sizes."""

AGREES = np.array([activity > 0 and activity % 2 == 0 for activity in range(ACTIVITIES)])
"""Whether the signs of the neighbours mostly agree, by activity."""


class Neighbourhood(NamedTuple):
  """Activities and flips of the weights of a block; None where no weight has neighbours.

  Attributes:
    activities: of each weight.
    is_flipped: where the sign of the code is flipped.
  """

  activities: UInt8[np.ndarray, 'inputs outputs'] | None
  is_flipped: Bool[np.ndarray, 'inputs outputs'] | None


NOTHING = Neighbourhood(None, None)


def neighbourhood(kernel: Kernel, window: tuple[int, ...], tap: int, rows: slice) -> Neighbourhood:
  """Returns activities and flips of the inputs `rows` of a tap, from the taps before it."""
  neighbours = _neighbours(window, tap)
  if not neighbours:
    return NOTHING
  # in three dimensions the weights sum to 24, and 128 * 24 is far below 2**15
  signed, magnitude = np.zeros((2, *kernel[tap, rows].shape), np.int16)
  for other, weight in neighbours:
    codes = kernel[other, rows].astype(np.int16)
    codes *= np.int16(weight)
    signed += codes
    magnitude += np.abs(codes)
  # a table of all sums that can be, in place of a division and a search at every weight
  activity = _edges_below(sum(weight for _, weight in neighbours))[magnitude]
  activity *= 2
  activity += 1
  activity += 2 * np.abs(signed) >= magnitude
  return Neighbourhood(activity, signed < 0)


def flipped(
  codes: Int8[np.ndarray, 'inputs outputs'], is_flipped: Bool[np.ndarray, 'inputs outputs'] | None
) -> Int8[np.ndarray, 'inputs outputs']:
  """Returns codes with the signs flipped; its own inverse."""
  codes = np.ascontiguousarray(codes)
  return codes if is_flipped is None else np.where(is_flipped, -codes, codes)


@functools.lru_cache(maxsize=1 << 12)
def _neighbours(window: tuple[int, ...], tap: int) -> list[tuple[int, int]]:
  """The taps of the neighbours, and their weights."""
  place = np.unravel_index(tap, window)
  neighbours = []
  for offset in itertools.product((-1, 0, 1), repeat=len(window)):
    steps = sum(map(abs, offset))
    other = [int(a) + b for a, b in zip(place, offset, strict=True)]
    is_inside = all(0 <= a < n for a, n in zip(other, window, strict=True))
    # tuples compare as C order does: a tap with such an offset is decoded before this one
    if offset < (0,) * len(window) and steps <= 2 and is_inside:
      weight = _ALONG_AXIS if steps == 1 else _ACROSS
      neighbours.append((int(np.ravel_multi_index(other, window)), weight))
  return neighbours


@functools.lru_cache
def _edges_below(weight: int) -> UInt8[np.ndarray, ' magnitudes']:
  """The number of edges up to m for every sum w_i |c_i|, where the weights sum to `weight`."""
  mean = 12 * np.arange(128 * weight + 1) // weight
  return np.searchsorted(_EDGES, mean, 'right').astype(np.uint8)
