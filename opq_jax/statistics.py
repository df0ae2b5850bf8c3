"""What an allocation needs to know of a leaf's weights: scales, reach, and one histogram.

Everything else in an allocation is computed from these few numbers, so they are all that ever
reads the weights: one pass for the scales, one for the largest magnitudes, one for the histogram.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

BINS = 4096  # a sign, so that even the finest grid (127 levels) has 32 bins a cell


@flax.struct.dataclass
class LeafStatistics:
  """Statistics of one leaf of C output channels; float32, whatever the leaf's dtype.

  Attributes:
    scale: mean |w| of every channel, the maximum-likelihood scale of a zero-mean Laplace density.
    maximum: largest |w| of every channel.
    histogram: weights by sign (row 0: w >= 0, row 1: w < 0) and magnitude, in BINS bins of equal
      width between 0 and the leaf's largest |w|; None where only closed forms are asked for.
    per_channel: weights a channel.
  """

  scale: Float32[Array, 'channels']
  maximum: Float32[Array, 'channels']
  histogram: Int32[Array, '2 bins'] | None
  per_channel: int = flax.struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnames=('channel_axis', 'histogram'))
def leaf_statistics(
  weights: Float[Array, '...'], channel_axis: int, histogram: bool = True
) -> LeafStatistics:
  """The statistics of one leaf, in two passes over its weights or, with a histogram, three.

  Args:
    weights: any floating dtype; read as float32, never copied as a whole.
    channel_axis: the axis of the output channels.  A vector is one channel.
    histogram: whether to count the histogram.

  >>> stats = leaf_statistics(jnp.array([[1.0, -2.0], [3.0, 4.0]]), channel_axis=-1)
  >>> stats.scale.tolist(), stats.maximum.tolist(), stats.per_channel
  ([2.0, 3.0], [3.0, 4.0], 2)
  """
  weights, others = _by_channel(weights, channel_axis)
  per_channel = math.prod(weights.shape[i] for i in others)
  total = jnp.sum(jnp.abs(weights.astype(jnp.float32)), others)
  if histogram:
    # XLA's CPU backend would store |w| for the maximum beside the histogram's loop
    as_float = weights.astype(jnp.float32)
    maximum = jnp.maximum(jnp.max(as_float, others), -jnp.min(as_float, others))
  else:
    # and is several times slower on two reductions of |w| in one kernel
    again, total = jax.lax.optimization_barrier((weights, total))
    maximum = jnp.max(jnp.abs(again.astype(jnp.float32)), others)
  stats = LeafStatistics(total / per_channel, maximum, None, per_channel)
  if histogram:
    per_unit = _bins_per_unit(jnp.max(maximum))

    def count(block: Array) -> Array:
      magnitude = jnp.minimum(jnp.abs(block) * per_unit, BINS - 1).astype(jnp.int32)
      return magnitude + jnp.where(block < 0, BINS, 0)

    counts = _count_bins(weights, count, 2 * BINS).reshape(2, BINS)
    stats = dataclasses.replace(stats, histogram=counts)
  return stats


@functools.partial(jax.jit, static_argnames='channel_axis')
def per_channel_count(
  weights: Float[Array, '...'], threshold: Float32[Array, ''], channel_axis: int
) -> Float32[Array, 'channels']:
  """How many weights of every channel survive |w| > threshold, as float32."""
  weights, others = _by_channel(weights, channel_axis)

  def whole(weights: Array) -> Array:
    survives = jnp.abs(weights.astype(jnp.float32)) > threshold
    return jnp.sum(survives, others, dtype=jnp.int32)

  def rows(weights: Array) -> Array:
    if others[-1] != weights.ndim - 2:
      return whole(weights)
    table = weights.reshape(-1, weights.shape[-1])

    def add(i: Array, counts: Array) -> Array:
      return counts + (jnp.abs(table[i].astype(jnp.float32)) > threshold).astype(jnp.int32)

    return jax.lax.fori_loop(0, len(table), add, jnp.zeros(table.shape[1], jnp.int32))

  # as in `_count_bins`, whose doc says why
  counts = jax.lax.platform_dependent(weights, cpu=rows, default=whole)
  return counts.reshape(-1).astype(jnp.float32)


@jax.jit
def fine_histogram(
  weights: Float[Array, '...'], largest: Float32[Array, ''], bin_: Int32[Array, '']
) -> Int32[Array, 'bins']:
  """Counts of one bin of a leaf's histogram, both signs together, in BINS finer bins."""
  per_unit = _bins_per_unit(largest)

  def count(block: Array) -> Array:
    position = jnp.abs(block) * per_unit
    fine = (position - bin_.astype(jnp.float32)) * BINS
    is_inside = jnp.minimum(position, BINS - 1).astype(jnp.int32) == bin_
    return jnp.where(is_inside, jnp.minimum(fine, BINS - 1).astype(jnp.int32), BINS)

  return _count_bins(weights, count, BINS)


def magnitudes_at_rank(
  leaves: list[Float[Array, '...']],
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  """Thresholds t_i with (as nearly as can be) rank_i weights of leaf i at |w| <= t_i.

  The leaf's histogram says in which bin the rank lies; that bin is counted once more in BINS
  finer ones.  2^24 bins in all are about what float32 resolves, so the count is met up to ties
  and a weight or two in a million.

  >>> weights = jnp.arange(-50.0, 50.0)[:, None]
  >>> stats = leaf_statistics(weights, -1)
  >>> t = magnitudes_at_rank(
  ...   [weights], stats.histogram[None], stats.maximum, jnp.array([61], jnp.int32)
  ... )
  >>> int((jnp.abs(weights) <= t[0]).sum())
  61
  """
  cumulative = jnp.cumsum(jnp.sum(histogram, axis=1), axis=1)
  coarse = jnp.sum((cumulative < rank[:, None]).astype(jnp.int32), axis=1)
  before = jnp.take_along_axis(cumulative, jnp.maximum(coarse - 1, 0)[:, None], axis=1)[:, 0]
  before = jnp.where(coarse > 0, before, 0)
  counts = jnp.stack(
    [fine_histogram(w, m, b) for w, m, b in zip(leaves, largest, coarse, strict=True)]
  )
  # entry k: how many weights lie below edge k of the bin
  below = jnp.pad(jnp.cumsum(counts, axis=1), ((0, 0), (1, 0)))
  edge = jnp.argmin(jnp.abs(below - (rank - before)[:, None]), axis=1).astype(jnp.float32)
  edge = (coarse.astype(jnp.float32) + edge / BINS) / _bins_per_unit(largest)
  # just under the edge, so that a weight on it survives as the count says
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)


def code_shares(
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float[Array, 'leaves'],
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
) -> tuple[Float[Array, 'leaves'], Float[Array, 'leaves 2 cells']]:
  """The share of each leaf's weights that is pruned, and that in each of 128 cells of a sign.

  The cumulative counts are interpolated linearly at the edges of the cells.

  Args:
    histogram: counts by sign and magnitude.
    largest: largest |w|, where the bins end.
    threshold: where the first cell begins.
    step: width of the cells.
  """
  k = jnp.arange(128, dtype=step.dtype)[None]
  edges = (threshold[:, None] + step[:, None] * k) / jnp.where(largest > 0, largest, 1)[:, None]
  position = jnp.clip(edges * BINS, 0, BINS)
  index = jnp.minimum(position.astype(jnp.int32), BINS - 1)[:, None]
  fraction = (position - index[:, 0].astype(position.dtype))[:, None]
  inside = jnp.take_along_axis(histogram, index, axis=2).astype(position.dtype)
  above = jnp.cumsum(histogram[..., ::-1], axis=2)[..., ::-1]  # at this bin and beyond
  survivors = jnp.take_along_axis(above, index, axis=2).astype(position.dtype) - fraction * inside
  cells = survivors - jnp.concatenate([survivors[..., 1:], jnp.zeros_like(inside[..., :1])], axis=2)
  total = jnp.maximum(jnp.sum(histogram, axis=(1, 2)), 1).astype(position.dtype)
  pruned = total - jnp.sum(survivors[..., 0], axis=1)
  return jnp.maximum(pruned, 0) / total, jnp.maximum(cells, 0) / total[:, None, None]


def entropy_of_shares(
  pruned: Float[Array, 'leaves'], cells: Float[Array, 'leaves 2 cells']
) -> Float[Array, 'leaves']:
  """Zeroth-order entropy of each leaf's codes, bits per weight."""
  share = jnp.concatenate([pruned[:, None], cells.reshape(len(pruned), -1)], axis=1)
  return -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1)), axis=1)


def payload_of_shares(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  sizes: Int[np.ndarray, 'leaves'],
) -> Float[Array, 'leaves']:
  """Bits per weight of each leaf's payload in a file: the entropy, and what the coder adds to it.

  `opq_jax.entropy_coding` writes a frequency f of P bits in about 2 + log2 f bits, the bounds of
  the alphabet, and a checksum.  In a small leaf this is not little.
  """
  precision = np.minimum(1 + 3 * np.frexp(sizes)[1] // 4, 16)
  frequency = cells * np.ldexp(1.0, precision).astype(cells.dtype)[:, None, None]
  # 1 in every cell that is listed: those up to the last that occurs
  listed = jax.lax.cummax(jnp.sign(frequency), axis=2, reverse=True)
  table = listed * jnp.where(frequency > 0, 2 + jnp.log2(jnp.maximum(frequency, 1)), 1.5)
  bounds = 2 * jnp.log2(jnp.sum(listed, axis=2) + 4)
  added = 44 + jnp.sum(table, axis=(1, 2)) + jnp.sum(bounds, axis=1)
  return entropy_of_shares(pruned, cells) + added / sizes.astype(cells.dtype)


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


def _bins_per_unit(largest: Float32[Array, '...']) -> Float32[Array, '...']:
  return BINS / jnp.where(largest > 0, largest, 1)


def _by_channel(weights: Array, channel_axis: int) -> tuple[Array, tuple[int, ...]]:
  """The weights with at least two axes, and the axes that are not the channels'."""
  if weights.ndim == 1:
    weights, channel_axis = weights[:, None], 1
  others = tuple(i for i in range(weights.ndim) if i != channel_axis % weights.ndim)
  return weights, others


def _count_bins(weights: Array, index: Callable[[Array], Array], bins: int) -> Int32[Array, 'bins']:
  """How many weights have each `index`, 0 … bins - 1; others are not counted.

  On a CPU block after block, so that neither indices nor counts leave the cache; elsewhere as one
  scatter, in the leaf's own shape, so that a sharded leaf is not gathered.
  """
  block_size = 4096

  def whole(weights: Array) -> Array:
    counts = jnp.zeros(bins, jnp.int32)
    return counts.at[index(weights.astype(jnp.float32))].add(1, mode='drop')

  def blocks(weights: Array) -> Array:
    flat = weights.reshape(-1)
    full = flat.size // block_size
    if full == 0:
      return whole(flat)

    def add(i: Array, counts: Array) -> Array:
      block = jax.lax.dynamic_slice(flat, (i * block_size,), (block_size,))
      return counts.at[index(block.astype(jnp.float32))].add(1, mode='drop')

    counts = jax.lax.fori_loop(0, full, add, jnp.zeros(bins, jnp.int32))
    rest = flat[full * block_size :]
    return counts + whole(rest) if rest.size else counts

  return jax.lax.platform_dependent(weights, cpu=blocks, default=whole)
