"""Fits the grid of a leaf whose codes follow a trellis, at the slope of its plain grid.

A plain grid is the best one, of all grids, at one price of a bit: its slope -dD/dR.  Codes along a
trellis have other errors and other bits, so the best grid at this price is another.  It is fitted
by turns: the cheapest path of codes on a grid; then the prices of indices, from their frequencies,
and the least-squares grid, both for these codes.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8

from opq_jax.coding import frequencies, trellis, viterbi
from opq_jax.coding.trellis import MAX_INDEX
from opq_jax.core.limits import MAX_LEVELS

SAMPLE = 1 << 16
"""Weights that a grid is fitted to: each turn of the fit walks along all of them."""
# neighbouring weights that are sampled together, since a code depends on the codes before it
_RUN = 256
# turns of codes, prices and grid, from a first guess that is close
_TURNS = 4
# the first guess: step and first value of the grid over those of the plain grid, by the share of
# weights that the plain grid prunes; about what the fit ends at for Laplace weights on the plain
# grids of the closed form
_PRUNED = 0.0, 0.30, 0.54, 0.75, 0.89, 1.0
_STEP = 0.59, 0.587, 0.568, 0.53, 0.54, 0.54
_FIRST = 0.65, 0.69, 0.745, 0.813, 0.876, 0.9


class Fit(NamedTuple):
  """The grid, slope and bits with which the first walk along a leaf begins.

  Attributes:
    grid: of the trellis.
    slope: the squared error that one bit is worth.
    bits: the price of index k at k + 64, in each subset.
  """

  grid: trellis.Grid
  slope: float
  bits: Float32[np.ndarray, '1 2 129']


def fit(
  weights: Float32[np.ndarray, '...'],
  first: float,
  threshold: float,
  step: float,
  sample_size: int = SAMPLE,
) -> Fit | None:
  """Returns the best grid for a trellis at the slope of a plain grid.

  Weights beyond the last level have no part in the fit: they will escape.

  Args:
    weights: of a leaf, in a unit in which their squares are float32.
    first, threshold, step: of its plain grid, in the same unit.
    sample_size: how many weights the grid is fitted to, about.

  Returns:
    A `Fit`; None where the plain grid prunes every weight.
  """
  flat = weights.reshape(-1)
  magnitude = np.abs(flat)
  survivors = int(np.count_nonzero(magnitude > threshold))
  if survivors == 0:
    return None
  # the step of a grid of one level may be anything
  step = min(step, 2 * first)
  slope = _slope(magnitude, threshold, step)
  pruned = 1 - survivors / flat.size
  beyond_first = int(np.count_nonzero(magnitude > threshold + step)) / survivors
  grid = trellis.Grid(
    first * float(np.interp(pruned, _PRUNED, _FIRST)),
    min(step, 1.05 * first) * float(np.interp(pruned, _PRUNED, _STEP)),
    MAX_LEVELS,
  )
  bits = _first_prices(pruned, beyond_first)
  sample = _sampled(flat, sample_size)
  slopes, models = np.full(sample.size, slope, np.float32), np.zeros(sample.size, np.uint8)
  is_turned, codes = np.zeros(sample.size, bool), np.empty(sample.size, np.int8)
  # a narrow dtype makes some levels unusable only later, in the walk: the grid is not final here
  usable = np.ones(MAX_LEVELS + 1, bool)
  for _ in range(_TURNS):
    to_code = np.where(is_beyond(sample, grid), np.float32(np.nan), sample)
    viterbi.search(to_code, slopes, models, is_turned, bits, usable, *grid, 0, codes)
    bits[0] = _prices(codes)
    grid = _refitted(grid, codes, sample)
  return Fit(grid, slope, bits)


def is_beyond(weights: Float32[np.ndarray, '...'], grid: trellis.Grid) -> Bool[np.ndarray, '...']:
  """Returns which weights lie beyond the cell of the grid's last level."""
  return np.abs(weights) > np.float32(grid.value(MAX_LEVELS) + grid.step / 2)


def _slope(magnitude: Float32[np.ndarray, ' n'], threshold: float, step: float) -> float:
  """Returns the squared error that a bit is worth where this step is optimal.

  For a Laplace density of scale tau, with d = step / tau: tau^2 ln(2) (d / tanh(d / 2) - 2).
  """
  on_grid = magnitude[(magnitude > threshold) & (magnitude < threshold + MAX_LEVELS * step)]
  scale = (
    max(float(on_grid.mean(dtype=np.float64)) - threshold, 1e-3 * step) if on_grid.size else step
  )
  d = step / scale
  # below .01 the difference loses all its digits, and its series has one term
  value = d * d / 6 if d < 0.01 else d / math.tanh(d / 2) - 2
  return scale**2 * math.log(2) * value


def _first_prices(pruned: float, beyond_first: float) -> Float32[np.ndarray, '1 2 129']:
  """Returns the bits of each index under a geometric distribution of magnitudes."""
  ratio = np.clip(beyond_first, 0.01, 0.99)
  index = np.arange(-MAX_INDEX, MAX_INDEX + 1)
  # survivors of a Laplace density: each magnitude is as much rarer than the one before; half of
  # them have either sign
  share = (1 - pruned) / 2 * (1 - ratio) * ratio ** (np.abs(index) - 1.0)
  share[MAX_INDEX] = max(pruned, 0.01)
  return np.tile(-np.log2(np.maximum(share, 1e-9)), (1, 2, 1)).astype(np.float32)


def _prices(codes: Int8[np.ndarray, ' n']) -> Float32[np.ndarray, '2 129']:
  """Returns the bits of each index in each subset, by their frequencies among these codes."""
  split = trellis.indices_and_subsets(codes)
  assert split is not None  # they are a path
  indices, subsets = split
  counts = np.stack([frequencies.histogram(indices[subsets == subset]) for subset in (0, 1)])
  index = np.arange(-MAX_INDEX, MAX_INDEX + 1)
  # an index that has not come up yet may still be the best, at a price
  counts = np.maximum(counts[:, index.astype(np.int8).view(np.uint8)], 0.1)
  return np.log2(counts.sum(1, keepdims=True) / counts)


def _sampled(flat: Float32[np.ndarray, ' n'], size: int) -> Float32[np.ndarray, ' sample']:
  """Returns all weights, or runs of them that are spread evenly."""
  if flat.size <= size:
    return np.ascontiguousarray(flat)
  runs = flat[: flat.size // _RUN * _RUN].reshape(-1, _RUN)
  return np.ascontiguousarray(runs[:: len(runs) * _RUN // size]).reshape(-1)


def _refitted(
  grid: trellis.Grid, codes: Int8[np.ndarray, ' n'], weights: Float32[np.ndarray, ' n']
) -> trellis.Grid:
  """Returns the grid of least squared error for given codes: a line through the magnitudes."""
  # signs of codes are those of weights, so magnitudes are fitted alone; 0 has no level to fit
  is_kept = codes != 0
  level = np.abs(codes[is_kept].astype(np.float64)) - 1
  magnitude = np.abs(weights[is_kept].astype(np.float64))
  if level.size == 0:
    return grid
  spread = level.var()
  step = ((level - level.mean()) * magnitude).mean() / spread if spread > 0 else grid.step
  first = magnitude.mean() - step * level.mean()
  return grid._replace(first=first, step=step) if min(step, first) > 0 else grid
