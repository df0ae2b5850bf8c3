"""Leaves of few distinct magnitudes: a grid that holds every one of them exactly.

Weights that were quantized before (binary, ternary, a few bits) lie on a lattice.  A grid with a
level at each of their magnitudes makes no error at all, for the bits of their own entropy.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from opq_jax.allocation.bins import BINS, bin_edge, bin_of
from opq_jax.allocation.code_bits import CODER_BITS
from opq_jax.allocation.shards import (
  HERE,
  Placement,
  Shards,
  on_host_one_by_one,
  on_shards,
  placement_of,
)
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.coding import frequencies
from opq_jax.core.limits import MAX_LEVELS, STEP_BITS

_NEAR = 2e-3  # of a step: multiples of .1, say, are off a grid by roundings of float32
_FLOAT_BITS = 24  # significant bits of a float32
_OWN_BINS_MANTISSA = 7  # bits of bfloat16's mantissa: every such number has a bin of its own


class Lattice(NamedTuple):
  """A grid that holds a leaf exactly; zeros where there is none.

  Attributes:
    threshold, first, step, levels: of the grid, in the units of the weights.
    bits: bits per weight of its payload.
    error: squared error per weight, over the square of the leaf's largest |w|; 0, or that of
      rounding in float32.
  """

  threshold: float | Array = 0.0
  first: float | Array = 0.0
  step: float | Array = 0.0
  levels: float | Array = 0.0
  bits: float | Array = 0.0
  error: float | Array = 0.0


class _Affine(NamedTuple):
  """An affine grid: `levels` values from `first` on, `step` apart, beyond `threshold`."""

  threshold: np.float32
  first: np.float32
  step: np.float32
  levels: int


def has_few_magnitudes(stats: LeafStatistics) -> bool:
  """Returns whether a leaf's histogram, on the host, has no more bins than a grid has levels."""
  if stats.histogram is None or not np.isfinite(stats.largest) or stats.largest == 0:
    return False
  counts = np.asarray(stats.histogram).sum(axis=0)
  return bool(0 < np.count_nonzero(counts[1:]) <= MAX_LEVELS)


def numbers_of(
  stats: LeafStatistics, places: Sequence[tuple[int, ...]], weights: Array | np.ndarray | None
) -> list[Float32[np.ndarray, ' bins'] | None]:
  """Returns the one |w| that all weights of each bin have, or None where they differ.

  Args:
    stats: of a leaf, on the host.
    places: of the slices that `has_few_magnitudes`; [()] of a leaf without slices.
    weights: the leaf, or None where it cannot be read.  Weights of bfloat16 and narrower dtypes are
      not needed: every number of theirs has a bin of its own.
  """
  if jnp.finfo(stats.dtype).nmant <= _OWN_BINS_MANTISSA:
    edges = lambda largest: bin_edge(jnp.arange(BINS, dtype=jnp.int32), jnp.float32(largest))
    return [np.array(edges(np.asarray(stats.largest)[place])) for place in places]
  if weights is None or not places:
    return [None] * len(places)
  numbers, is_one = jax.device_get(_magnitudes_of(weights, np.asarray(stats.largest)))
  return [numbers[place] if is_one[place] else None for place in places]


def lattice_of(stats: LeafStatistics, numbers: Float32[np.ndarray, ' bins']) -> Lattice:
  """Returns the grid with a level at each magnitude that occurs, or zeros where there is none.

  Args:
    stats: of the leaf, on the host.
    numbers: from `numbers_of`.
  """
  counts = np.asarray(stats.histogram)
  # the first bin holds zeros, which need no level
  occurs = np.flatnonzero(counts.sum(axis=0)[1:]) + 1
  magnitudes = numbers[occurs].astype(np.float32)
  grid = _affine(magnitudes, np.dtype(stats.dtype))
  if grid is None:
    return Lattice()
  threshold, first, step, levels = grid
  place = np.rint((magnitudes - first) / step).astype(int) + 1
  codes = np.zeros(256, np.int64)
  codes[0] = counts[:, 0].sum()
  for sign, row in zip((1, -1), counts, strict=True):
    codes[sign * place] += row[occurs]
  bits = (
    float(frequencies.ideal_bits(codes))
    + len(frequencies.write_table(frequencies.fit(codes)))
    + CODER_BITS
  )
  errors = magnitudes.astype(np.float64) - _values(first, step, place - 1, np.dtype(stats.dtype))
  errors /= float(stats.largest)
  error = float(np.sum(counts[:, occurs] * np.square(errors)) / stats.size)
  return Lattice(
    float(threshold), float(first), float(step), float(levels), bits / stats.size, error
  )


def _magnitudes_of(
  weights: Array | np.ndarray, largest: Float32[np.ndarray, '*slices']
) -> tuple[Float32[Array, '*slices bins'], Bool[Array, '*slices']]:
  """Returns the largest |w| of every bin, and whether no bin has another (bin 0: only zeros)."""
  placement, slices = placement_of(weights), np.ndim(largest)
  if placement != HERE or not slices:
    return _magnitudes(weights, jnp.float32(largest), placement, slices)
  of_slice = lambda index: _magnitudes(weights[index], jnp.float32(largest[index]), HERE)
  return on_host_one_by_one(of_slice, np.shape(largest))


@functools.partial(jax.jit, static_argnames=('placement', 'slices'))
def _magnitudes(
  weights: Array, largest: Array, placement: Placement, slices: int = 0
) -> tuple[Array, Array]:
  def local(weights: Array, largest: Array, shards: Shards) -> tuple[Array, Array]:
    magnitude = jnp.abs(weights.astype(jnp.float32))
    index = bin_of(magnitude, largest)
    largest_of_bin = shards.max(jnp.zeros(BINS, jnp.float32).at[index].max(magnitude))
    differ = jnp.any(magnitude != largest_of_bin[index]) | (largest_of_bin[0] != 0)
    return largest_of_bin, shards.max(differ.astype(jnp.int32)) == 0

  return on_shards(local, weights, largest, -1, placement, slices)


def _affine(magnitudes: Float32[np.ndarray, ' k'], dtype: np.dtype) -> _Affine | None:
  """Returns a grid with a level at each of ascending magnitudes, or None where there is none.

  Levels of one or two magnitudes are exact; levels of three or more may be off by `_NEAR` of a
  step.
  """
  first, last = magnitudes[0], magnitudes[-1]
  # one cell from half the magnitude to one and a half: the value is far from both edges
  if len(magnitudes) == 1:
    return _Affine(first / 2, first, first, 1)
  gap = float(np.min(np.diff(magnitudes.astype(np.float64))))
  levels = round((float(last) - float(first)) / gap) + 1
  if levels > MAX_LEVELS:
    return None
  # from the ends, not the least gap: the rounding of the ends is spread over all levels
  step = np.float32((float(last) - float(first)) / (levels - 1))
  if levels > 2:
    # as `opq_jax.compression.records.exact_grid` will round them
    mantissa, exponent = math.frexp(step)
    step = np.float32(math.ldexp(round(mantissa * 2**STEP_BITS), exponent - STEP_BITS))
    unit = math.ldexp(1.0, max(exponent - STEP_BITS, math.frexp(last)[1] - _FLOAT_BITS))
    first = np.float32(round(float(first) / unit) * unit)
  place = np.rint((magnitudes - first) / step)
  values = _values(first, step, place, dtype)
  tolerance = 0 if levels <= 2 else _NEAR * step
  if np.max(np.abs(values - magnitudes)) > tolerance:
    return None
  # in the first half of the first cell, so that threshold + (first - threshold) is first
  threshold = np.maximum(first / 2, first - step / 2)
  # where the first value is next to nothing beside the step, rounding would choose the cell
  if not np.array_equal(np.floor((magnitudes - threshold) * (1 / step)), place):
    return None
  return _Affine(threshold, first, step, levels)


def _values(
  first: np.float32, step: np.float32, place: np.ndarray, dtype: np.dtype
) -> Float32[np.ndarray, ' k']:
  """Returns the levels of a grid, counted from 0, rounded to `dtype`."""
  return (first + step * place.astype(np.float32)).astype(dtype).astype(np.float32)
