"""What the histogram of a leaf's weights says: ranks, shares of codes and their bits, errors.

A histogram counts a leaf's weights by sign (row 0: w >= 0, row 1: w < 0) and magnitude, in BINS
bins of equal width (`opq_jax.leaf_statistics`); most functions take those of many leaves at once.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

BINS = 4096  # a sign, so that even the finest grid (127 levels) has 32 bins a cell


def bins_at_rank(
  histogram: Int32[Array, 'leaves 2 bins'], rank: Int32[Array, 'leaves']
) -> tuple[Int32[Array, 'leaves'], Int32[Array, 'leaves']]:
  """In which bin of magnitudes rank_i lies, and what is left of the rank inside of that bin."""
  sums = functools.partial(jnp.sum, axis=1, dtype=jnp.int32)  # which float64 would make wider
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
  """Thresholds t_i with (as nearly as can be) rank_i weights of leaf i at |w| <= t_i.

  The leaf's histogram says in which bin the rank lies (`bins_at_rank`); that bin is counted once
  more in BINS finer ones (`fine_histogram`).  2^24 bins in all are about what float32 resolves, so
  the count is met up to ties and a weight or two in a million.

  >>> from opq_jax.statistics import fine_histogram, leaf_statistics
  >>> weights, rank = jnp.arange(-50.0, 50.0)[:, None], jnp.array([61], jnp.int32)
  >>> stats = leaf_statistics(weights, -1)
  >>> coarse, left = bins_at_rank(stats.histogram[None], rank)
  >>> fine = fine_histogram(weights, stats.largest, coarse[0])
  >>> t = magnitudes_at_rank(fine[None], stats.largest[None], coarse, left, rank)
  >>> int((jnp.abs(weights) <= t[0]).sum())
  61
  """
  # entry k: how many weights lie below edge k of the bin
  below = jnp.pad(jnp.cumsum(fine, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
  edge = jnp.argmin(jnp.abs(below - left[:, None]), axis=1).astype(jnp.float32)
  edge = (coarse.astype(jnp.float32) + edge / BINS) / bins_per_unit(largest)
  # just under the edge, so that a weight on it survives as the count says
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)


def interpolated_at_rank(
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  """`magnitudes_at_rank` by the histograms alone: off by what lies in a bin, at the most.

  >>> from opq_jax.statistics import leaf_statistics
  >>> stats = leaf_statistics(jnp.arange(-50.0, 50.0)[:, None])
  >>> t = interpolated_at_rank(stats.histogram[None], stats.largest[None], jnp.array([61]))
  >>> 29 < float(t[0]) < 31
  True
  """
  coarse, left = bins_at_rank(histogram, rank)
  both = jnp.sum(histogram, axis=1, dtype=jnp.int32)
  inside = jnp.take_along_axis(both, coarse[:, None], axis=1)[:, 0]
  position = left.astype(jnp.float32) / jnp.maximum(inside, 1).astype(jnp.float32)
  edge = (coarse.astype(jnp.float32) + position) / bins_per_unit(largest)
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)


def counts_beyond(
  histogram: Int32[Array, 'leaves 2 bins'],
) -> Int32[Array, 'leaves 2 edges']:
  """How many weights of each sign lie beyond the inner edge of each bin; none beyond the last."""
  beyond = lax.cumsum(histogram, axis=2, reverse=True)
  return jnp.pad(beyond, ((0, 0), (0, 0), (0, 1)))


def code_shares(
  beyond: Int32[Array, 'leaves 2 edges'],
  largest: Float[Array, 'leaves'],
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
) -> tuple[Float[Array, 'leaves'], Float[Array, 'leaves 2 cells']]:
  """The share of each leaf's weights that is pruned, and that in each of 128 cells of a sign.

  The counts are interpolated linearly at the edges of the cells.

  Args:
    beyond: `counts_beyond` of the leaves' histograms.
    largest: largest |w|, where the bins end.
    threshold: where the first cell begins.
    step: width of the cells.
  """
  k = jnp.arange(129, dtype=step.dtype)[None]
  edges = (threshold[:, None] + step[:, None] * k) / jnp.where(largest > 0, largest, 1)[:, None]
  position = jnp.clip(edges * BINS, 0, BINS)
  index = jnp.minimum(position.astype(jnp.int32), BINS - 1)
  fraction = (position - index.astype(position.dtype))[:, None]
  low, high = (
    jnp.take_along_axis(beyond, at[:, None], axis=2).astype(position.dtype)
    for at in (index, index + 1)
  )
  # the last cell has no outer edge
  survivors = jnp.where(k[:, None] < 128, low - fraction * (low - high), 0)
  cells = jnp.maximum(survivors[..., :-1] - survivors[..., 1:], 0)
  total = jnp.maximum(jnp.sum(beyond[..., 0], axis=1), 1).astype(position.dtype)
  pruned = jnp.maximum(total - jnp.sum(survivors[..., 0], axis=1), 0)
  return pruned / total, cells / total[:, None, None]


def entropy_of_shares(
  pruned: Float[Array, 'leaves'], cells: Float[Array, 'leaves 2 cells']
) -> Float[Array, 'leaves']:
  """Zeroth-order entropy of each leaf's codes, bits per weight."""
  share = jnp.concatenate([pruned[:, None], cells.reshape(len(pruned), -1)], axis=1)
  return -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1)), axis=1)


def payload_of_shares(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  sizes: Float[Array | np.ndarray, 'leaves'],
) -> Float[Array, 'leaves']:
  """Bits per weight of each leaf's payload in a file: the entropy, and what the coder adds to it.

  `opq_jax.entropy_coding` writes a frequency f of P bits in about 2 + log2 f bits, the bounds of
  the alphabet, and a checksum.  In a small leaf this is not little.
  """
  # as many bits as the size has, up to where the precision ends
  bits = jnp.frexp(jnp.minimum(sizes, 2.0**20))[1]
  precision = jnp.minimum(1 + 3 * bits // 4, 16)
  frequency = cells * jnp.ldexp(jnp.ones_like(sizes), precision)[:, None, None]
  # the cells that are listed: those up to the last that occurs
  number = np.arange(1, cells.shape[2] + 1, dtype=np.int32)[None, None]
  listed = jnp.max(jnp.where(frequency > 0, number, 0), axis=2, keepdims=True)
  each = jnp.where(frequency > 0, 2 + jnp.log2(jnp.maximum(frequency, 1)), 1.5)
  table = jnp.where(number <= listed, each, 0)
  bounds = 2 * jnp.log2(listed[..., 0].astype(cells.dtype) + 4)
  added = 44 + jnp.sum(table, axis=(1, 2)) + jnp.sum(bounds, axis=1)
  return entropy_of_shares(pruned, cells) + added / sizes


def histogram_min_step(
  histogram: Int32[Array, '2 bins'], largest: Float[Array, ''], levels: int
) -> Float[Array, '']:
  """The step below which a grid of `levels` cells a sign gets worse, not better.

  A finer step saves Delta^2 / 12 on every weight, and clips what lies beyond levels * Delta; the
  sum of both is least at the step returned.  A leaf without outliers is not clipped.
  """
  counts = jnp.sum(histogram, axis=0).astype(largest.dtype)
  width = largest / BINS
  centre = (jnp.arange(BINS, dtype=largest.dtype) + 0.5) / BINS
  moments = jnp.stack([counts, counts * centre, counts * centre * centre], axis=1)
  beyond = jnp.cumsum(moments[::-1], axis=0)[::-1] - moments  # beyond the outer edge of each bin
  edge = centre + 0.5 / BINS
  clipped = beyond[:, 2] - 2 * edge * beyond[:, 1] + edge * edge * beyond[:, 0]
  rounding = jnp.sum(counts) * jnp.square(edge / levels) / 12
  return (jnp.argmin(rounding + clipped).astype(largest.dtype) + 1) * width / levels


def histogram_moments(
  histogram: Int32[Array, '2 bins'],
  largest: Float[Array, ''],
  threshold: Float[Array, ''],
  step: Float[Array, ''],
  levels: Float[Array, ''],
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, ''], Float[Array, '']]:
  """Mean square of all weights, best offset of a leaf's grid, its error and its sparsity.

  Args:
    histogram: counts by sign and magnitude.
    largest: largest |w|, where the bins end.
    threshold: where the first cell begins.
    step: width of the cells.
    levels: cells a sign.

  Returns:
    E[w^2]; the mean of |w| - threshold - (k - 1) step over survivors, k their cell (0 where none
    survives); the mean squared error with that offset; and the share of pruned weights.
  """
  counts = jnp.sum(histogram, axis=0).astype(largest.dtype)
  total = jnp.maximum(jnp.sum(counts), 1)
  centre = (jnp.arange(BINS, dtype=largest.dtype) + 0.5) * largest / BINS
  energy = jnp.sum(counts * centre * centre) / total
  last = jnp.maximum(levels - 1, 0)
  cell = jnp.clip(jnp.floor((centre - threshold) / step), 0, last)
  rest = centre - threshold - step * cell
  survivors = jnp.where(centre > threshold, counts, 0)
  offset = jnp.sum(survivors * rest) / jnp.maximum(jnp.sum(survivors), 1)
  pruned = jnp.sum((counts - survivors) * centre * centre)
  error = (pruned + jnp.sum(survivors * jnp.square(rest - offset))) / total
  return energy, offset, error, 1 - jnp.sum(survivors) / total


def bins_per_unit(largest: Float32[Array, '...']) -> Float32[Array, '...']:
  return BINS / jnp.where(largest > 0, largest, 1)
