"""The grid that is best for codes along a trellis, at the slope of a plain grid."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8

from opq_jax.coding import frequencies, trellis, viterbi
from opq_jax.coding.trellis import MAX_INDEX
from opq_jax.core.limits import MAX_LEVELS

_SAMPLE = 1 << 16  # weights that a grid is fitted to, in runs of
_RUN = 256
_FITS = 4
# where a fit begins: step and first value of the grid over those of the plain one, by the share
# that this prunes
_PRUNED = 0.0, 0.30, 0.54, 0.75, 0.89, 1.0
_STEP = 0.59, 0.587, 0.568, 0.53, 0.54, 0.54
_FIRST = 0.65, 0.69, 0.745, 0.813, 0.876, 0.9


class Fit(NamedTuple):
  """What the codes of a leaf are chosen by.

  Attributes:
    grid: of the trellis.
    slope: squared error that a bit is worth.
    bits: of each index + 64, in each subset.
  """

  grid: trellis.Grid
  slope: float
  bits: Float32[np.ndarray, '1 2 129']


def fit(
  weights: Float32[np.ndarray, '...'], first: float, threshold: float, step: float
) -> Fit | None:
  """The best grid for the trellis at the slope of a plain grid; None where no weight survives it.

  Weights beyond its last level are not fitted: they are escaped.

  Codes, then what each index costs and the least-squares grid of these codes, in turns.

  Args:
    weights: of a leaf, in a unit in which their squares are float32.
    first, threshold, step: of its plain grid.
  """
  flat = weights.reshape(-1)
  magnitude = np.abs(flat)
  survivors = int(np.count_nonzero(magnitude > threshold))
  if survivors == 0:
    return None
  step = min(step, 2 * first)  # that of a grid of one level may say nothing
  slope = _slope(magnitude, threshold, step)
  pruned = 1 - survivors / flat.size
  grid = trellis.Grid(
    first * float(np.interp(pruned, _PRUNED, _FIRST)),
    min(step, 1.05 * first) * float(np.interp(pruned, _PRUNED, _STEP)),
    MAX_LEVELS,
  )
  more = np.clip(np.count_nonzero(magnitude > threshold + step) / survivors, 0.01, 0.99)
  index = np.arange(-MAX_INDEX, MAX_INDEX + 1)
  share = (1 - pruned) / 2 * (1 - more) * more ** (np.abs(index) - 1.0)
  share[MAX_INDEX] = max(pruned, 0.01)
  bits = np.tile(-np.log2(np.maximum(share, 1e-9)), (1, 2, 1)).astype(np.float32)
  sample = _sampled(flat)
  slopes, models = np.full(sample.size, slope, np.float32), np.zeros(sample.size, np.uint8)
  is_turned, codes = np.zeros(sample.size, bool), np.empty(sample.size, np.int8)
  usable = np.ones(MAX_LEVELS + 1, bool)
  for _ in range(_FITS):
    within = np.where(is_beyond(sample, grid), np.float32(np.nan), sample)
    viterbi.search(within, slopes, models, is_turned, bits, usable, *grid, 0, codes)
    found = trellis.indices_and_subsets(codes)
    assert found is not None
    indices, subsets = found
    counts = np.stack([frequencies.histogram(indices[subsets == q]) for q in (0, 1)])
    counts = np.maximum(counts[:, index.astype(np.int8).view(np.uint8)], 0.1)
    bits[0] = np.log2(counts.sum(1, keepdims=True) / counts)
    grid = _refitted(grid, codes, sample)
  return Fit(grid, slope, bits)


def _slope(magnitude: Float32[np.ndarray, ' n'], threshold: float, step: float) -> float:
  """Squared error that a bit is worth where this step is optimal, as in the search for a rate."""
  inside = magnitude[(magnitude > threshold) & (magnitude < threshold + MAX_LEVELS * step)]
  scale = (
    max(float(inside.mean(dtype=np.float64)) - threshold, 1e-3 * step) if inside.size else step
  )
  d = step / scale
  value = d * d / 6 if d < 0.01 else d / math.tanh(d / 2) - 2
  return scale**2 * math.log(2) * value


def is_beyond(weights: Float32[np.ndarray, '...'], grid: trellis.Grid) -> Bool[np.ndarray, '...']:
  """Whether a weight is out of the cell of the grid's last level."""
  return np.abs(weights) > np.float32(grid.value(MAX_LEVELS) + grid.step / 2)


def _sampled(flat: Float32[np.ndarray, ' n']) -> Float32[np.ndarray, ' sample']:
  """All weights, or runs of them that are spread evenly."""
  if flat.size <= _SAMPLE:
    return np.ascontiguousarray(flat)
  runs = flat[: flat.size // _RUN * _RUN].reshape(-1, _RUN)
  return np.ascontiguousarray(runs[:: len(runs) * _RUN // _SAMPLE]).reshape(-1)


def _refitted(
  grid: trellis.Grid, codes: Int8[np.ndarray, ' n'], weights: Float32[np.ndarray, ' n']
) -> trellis.Grid:
  """The line of least squares through the magnitudes of survivors, over their codes."""
  is_kept = codes != 0
  place = np.abs(codes[is_kept].astype(np.float64)) - 1
  size = np.abs(weights[is_kept].astype(np.float64))
  if place.size == 0:
    return grid
  spread = place.var()
  step = ((place - place.mean()) * size).mean() / spread if spread > 0 else grid.step
  first = size.mean() - step * place.mean()
  return grid._replace(first=first, step=step) if min(step, first) > 0 else grid
