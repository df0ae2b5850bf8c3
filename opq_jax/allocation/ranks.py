"""Thresholds by rank: the magnitude below which a given number of a leaf's weights lie."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from opq_jax.allocation.bins import bin_edge


def bins_at_rank(
  histogram: Int32[Array, 'leaves 2 bins'], rank: Int32[Array, 'leaves']
) -> tuple[Int32[Array, 'leaves'], Int32[Array, 'leaves']]:
  """Returns the bin in which rank_i lies, and the rank that is left inside of that bin."""
  sums = functools.partial(jnp.sum, axis=1, dtype=jnp.int32)  # int64 where float64 is enabled
  cumulative = jnp.cumsum(sums(histogram), axis=1, dtype=jnp.int32)
  coarse = sums(cumulative < rank[:, None])
  before = jnp.take_along_axis(cumulative, jnp.maximum(coarse - 1, 0)[:, None], axis=1)[:, 0]
  return coarse, rank - jnp.where(coarse > 0, before, 0)


def magnitudes_at_rank(
  fine: Int32[Array, 'leaves bins'],
  largest: Float32[Array, 'leaves'],
  coarse: Int32[Array, 'leaves'],
  left: Int32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  """Returns thresholds t_i with rank_i weights of leaf i at |w| <= t_i, as nearly as can be.

  The leaf's histogram gives the bin of the rank (`bins_at_rank`).  That bin is counted once more in
  FINE_BINS parts, so the count is met up to ties and up to the weights among 16 neighbouring
  numbers of float32.

  Args:
    fine: counts of the parts of that bin, from `opq_jax.allocation.counts.fine_histogram`.
    largest: largest |w| of every leaf.
    coarse, left: from `bins_at_rank`.
    rank: weights to prune.

  >>> from opq_jax.allocation.counts import fine_histogram
  >>> from opq_jax.allocation.statistics import leaf_statistics
  >>> weights, rank = jnp.arange(-50.0, 50.0)[:, None], jnp.array([61], jnp.int32)
  >>> stats = leaf_statistics(weights, -1)
  >>> coarse, left = bins_at_rank(stats.histogram[None], rank)
  >>> fine = fine_histogram(weights, stats.largest, coarse[0])
  >>> t = magnitudes_at_rank(fine[None], stats.largest[None], coarse, left, rank)
  >>> int((jnp.abs(weights) <= t[0]).sum())
  61
  """
  # entry k counts the weights below edge k of the bin
  below = jnp.pad(jnp.cumsum(fine, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
  # ties may share a part: then the nearest count, above or below
  number = jnp.argmin(jnp.abs(below - left[:, None]), axis=1)
  edge = bin_edge(coarse, largest, number.astype(jnp.int32))
  # just under the edge: a weight on it is counted above, and must survive
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)


def interpolated_at_rank(
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  """Returns `magnitudes_at_rank` from the histograms alone, off by at most the weights of a bin.

  >>> from opq_jax.allocation.statistics import leaf_statistics
  >>> stats = leaf_statistics(jnp.arange(-50.0, 50.0)[:, None])
  >>> t = interpolated_at_rank(stats.histogram[None], stats.largest[None], jnp.array([61]))
  >>> 29 < float(t[0]) < 31
  True
  """
  coarse, left = bins_at_rank(histogram, rank)
  both = jnp.sum(histogram, axis=1, dtype=jnp.int32)
  inside = jnp.take_along_axis(both, coarse[:, None], axis=1)[:, 0]
  part = left.astype(jnp.float32) / jnp.maximum(inside, 1).astype(jnp.float32)
  low, high = bin_edge(coarse, largest), bin_edge(coarse + 1, largest)
  edge = low + part * (high - low)
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)
