"""What the histogram of a leaf's weights says: ranks, shares of codes and their bits, errors.

A histogram counts a leaf's weights by sign (row 0: w >= 0, row 1: w < 0) and magnitude, by the
upper 16 bits of |w| as a float32: 128 bins an octave, of equal width within it, over the BINS / 128
octaves that end with the octave of the leaf's largest |w|.  So it is as fine for the small weights
of a leaf as for an outlier of a thousand standard deviations, says of bfloat16 and narrower weights
exactly what they are, and the histograms of two parts of a leaf add up exactly.  Whatever is
smaller (by 2**-32, zeros included) is in bin 0.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

BINS_AN_OCTAVE = 128
BINS = 32 * BINS_AN_OCTAVE  # a sign
FINE_BINS = 1 << 12  # of one bin, each of 16 numbers of float32
_SHIFT = 16  # the bits of a float32 below those of its bin
_FINE_SHIFT = 4  # and below those of its fine bin
_LEAST_NORMAL = 1 << 23  # as bits


def _bits(magnitude: Float32[Array, '...']) -> Int32[Array, '...']:
  return lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)


def _end(largest: Float32[Array, '...']) -> Int32[Array, '...']:
  """The bin, counted from that of 0.0, with which the octave after the largest |w| begins."""
  return ((_bits(largest) >> 23) + 1) << (23 - _SHIFT)


def bin_of(magnitude: Float32[Array, '...'], largest: Float32[Array, '']) -> Int32[Array, '...']:
  """The bin of |w|, 0 ... BINS - 1.

  >>> bin_of(jnp.float32([0.0, 1.0, 1.5, 1.999]), jnp.float32(1.7)).tolist()
  [0, 3968, 4032, 4095]
  """
  bits = _bits(magnitude)
  index = (bits >> _SHIFT) - (_end(largest) - BINS)
  # denormal numbers count as zeros, which XLA takes them for
  return jnp.where(bits < _LEAST_NORMAL, 0, jnp.clip(index, 0, BINS - 1))


def fine_bin_of(magnitude: Float32[Array, '...']) -> Int32[Array, '...']:
  """In which part of its bin |w| is."""
  return _bits(magnitude) >> _FINE_SHIFT & (FINE_BINS - 1)


def bin_edge(
  index: Int32[Array, '...'], largest: Float32[Array, '...'], fine: Int32[Array, '...'] | int = 0
) -> Float32[Array, '...']:
  """The least |w| of a bin, or of this part of it; bin 0 begins at 0."""
  bits = ((index + _end(largest) - BINS) << _SHIFT) + (fine << _FINE_SHIFT)
  bits = jnp.where(bits < _LEAST_NORMAL, 0, bits)
  return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def bin_position(
  magnitude: Float[Array, '...'], largest: Float32[Array, '...']
) -> Float[Array, '...']:
  """Where |w| lies among the bins, counted in bins from the inner edge of the first; BINS at most.

  Within a bin it is a linear function of |w|.
  """
  bits = _bits(magnitude.astype(jnp.float32))
  whole = (bits >> _SHIFT) - (_end(largest) - BINS)
  part = (bits & ((1 << _SHIFT) - 1)).astype(magnitude.dtype) / (1 << _SHIFT)
  return jnp.clip(whole.astype(magnitude.dtype) + part, 0, BINS)


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
  more, in FINE_BINS parts (`fine_histogram`), so the count is met up to ties and the weights among
  16 neighbouring numbers of float32.

  >>> from opq_jax.allocation.statistics import fine_histogram, leaf_statistics
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
  number = jnp.argmin(jnp.abs(below - left[:, None]), axis=1)
  edge = bin_edge(coarse, largest, number.astype(jnp.int32))
  # just under the edge, so that a weight on it survives as the count says
  return jnp.where(rank > 0, jnp.nextafter(edge, jnp.zeros_like(edge)), 0)


def interpolated_at_rank(
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  """`magnitudes_at_rank` by the histograms alone: off by what lies in a bin, at the most.

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


class Sums(NamedTuple):
  """The histograms of all leaves, summed up to every edge between two bins.

  Lengths are in units of the leaf's own, a power of two (so that the bins stay what they are).

  Attributes:
    columns: at every edge, per weight of the leaf: the share of the positive and of the negative
      weights beyond it, the sum of |w| beyond it, and the sum of w^2 below it.
    largest: largest |w| of every leaf.
    numbers: the |w| of every weight in a bin, where that is one number; else NaN.
  """

  columns: Float[Array, 'leaves edges 4']
  largest: Float[Array, 'leaves']
  numbers: Float[Array, 'leaves bins']

  def at(self, magnitude: Float[Array, 'leaves *more']) -> list[Float[Array, 'leaves *more']]:
    """The columns where the edge is `magnitude`.

    In a bin of one number they jump there; in others they are interpolated linearly.
    """
    flat = magnitude.reshape(len(magnitude), -1)
    # whatever the threshold, the weights of the first bin, zeros, are pruned
    position = jnp.maximum(bin_position(flat, self.largest[:, None]), 1)
    index = jnp.minimum(position.astype(jnp.int32), BINS - 1)
    number = jnp.take_along_axis(self.numbers, index, axis=1)
    part = position - index.astype(position.dtype)
    part = jnp.where(jnp.isnan(number), part, (flat >= number).astype(part.dtype))[..., None]
    low, high = (
      jnp.take_along_axis(self.columns, i[..., None], axis=1) for i in (index, index + 1)
    )
    found = low + part * (high - low)
    # a bin is full up to the largest weight alone
    is_all = (flat >= self.largest[:, None] * (1 - 1e-6))[..., None]
    found = jnp.where(is_all, self.columns[:, -1:], found)
    return [found[..., k].reshape(magnitude.shape) for k in range(4)]

  def energy(self) -> Float[Array, 'leaves']:
    """The mean of w^2."""
    return self.columns[:, -1, 3]

  def centres(self) -> tuple[Float[Array, 'leaves bins'], Float[Array, 'leaves bins']]:
    """The |w| that each bin stands for, 0 for the first, and how wide its weights are spread."""
    index = jnp.arange(BINS + 1, dtype=jnp.int32)[None]
    largest = self.largest[:, None]
    edges = bin_edge(index, largest.astype(jnp.float32)).astype(largest.dtype)
    edges = jnp.minimum(edges, largest)
    is_one = ~jnp.isnan(self.numbers)
    centre = jnp.where(is_one, self.numbers, (edges[:, :-1] + edges[:, 1:]) / 2)
    width = jnp.where(is_one, 0, edges[:, 1:] - edges[:, :-1])
    return jnp.where(index[:, :-1] > 0, centre, 0), jnp.where(index[:, :-1] > 0, width, 0)


def sums_of(
  histogram: Int32[Array, 'leaves 2 bins'],
  largest: Float[Array, 'leaves'],
  numbers: Float[Array, 'leaves bins'],
  has_own_bins: Bool[Array, 'leaves'],
) -> Sums:
  """The `Sums` of histograms.

  Args:
    histogram: of all leaves.
    largest: largest |w|, in the leaf's unit.
    numbers: as in `Sums`.
    has_own_bins: whether every number of the leaf's dtype has a bin of its own.
  """
  index = jnp.arange(BINS, dtype=jnp.int32)[None]
  edges = bin_edge(index, largest.astype(jnp.float32)[:, None]).astype(largest.dtype)
  sums = Sums(
    jnp.zeros((len(largest), BINS + 1, 4), largest.dtype),
    largest,
    jnp.where(has_own_bins[:, None], edges, numbers),
  )
  counts = histogram.astype(largest.dtype)
  counts = counts / jnp.maximum(jnp.sum(counts, axis=(1, 2), keepdims=True), 1)
  both = jnp.sum(counts, axis=1)
  centre, width = sums.centres()
  beyond = [counts[:, 0], counts[:, 1], both * centre]
  beyond = [jnp.pad(lax.cumsum(x, axis=1, reverse=True), ((0, 0), (0, 1))) for x in beyond]
  squares = both * (centre * centre + width * width / 12)
  below = jnp.pad(jnp.cumsum(squares, axis=1), ((0, 0), (1, 0)))
  return sums._replace(columns=jnp.stack([*beyond, below], axis=2))


def payload_bits(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  escaped: Float[Array, 'leaves levels'],
  sizes: Float[Array | np.ndarray, 'leaves'],
  value_bits: Float[Array, 'leaves'],
) -> Float[Array, 'leaves levels']:
  """Bits per weight of each leaf's payload in a file, for every number of levels a sign.

  Those of escaped values are about right; `escaped_value_bits` has them exactly.

  The zeroth-order entropy of the codes, where an escaped weight has the code of a pruned one, and
  what a file adds: `opq_jax.coding.payload` writes a frequency f of P bits in about 2 + log2 f
  bits, the bounds of the alphabet, and a checksum; an escaped weight takes the bits of its value
  and, unless all weights are escaped, the bits of its position.  In a small leaf this is not
  little.

  Args:
    pruned: share of the weights.
    cells: share of the weights in each cell of a sign.
    escaped: share of the weights beyond the last cell, for 0, 1, ... levels.
    sizes: weights of each leaf.
    value_bits: of an escaped value in each leaf, about.
  """
  dtype = cells.dtype
  # as many bits as the size has, up to where the precision ends
  bits = jnp.frexp(jnp.minimum(sizes, 2.0**20))[1]
  precision = jnp.minimum(1 + 3 * bits // 4, 16)
  whole = jnp.ldexp(jnp.ones_like(sizes), precision)[:, None, None]
  # less than one weight in a cell is one with that probability
  occurs = jnp.minimum(cells * sizes[:, None, None], 1)
  # a cell that does not occur is listed where one after it does
  number = np.arange(1, cells.shape[2] + 1, dtype=np.int32)[None, None]
  listed = lax.cummax(jnp.where(occurs > 0.1, number, 0), axis=2).astype(dtype)
  empty = jnp.maximum(listed - jnp.cumsum(occurs, axis=2), 0)
  each = occurs * (2 + jnp.log2(jnp.maximum(cells * whole, 1)))
  table = jnp.cumsum(each, axis=2) + 1.5 * empty + 2 * jnp.log2(listed + 4)
  # no frequency is below 1: rare codes take fewer bits than they should, and all others more
  surprise = -cells * jnp.log2(jnp.maximum(cells, 1 / whole))
  raised = jnp.cumsum(jnp.sum(occurs * jnp.maximum(1 / whole - cells, 0), axis=1), axis=1)
  # with no level the bounds of the alphabet are written all the same
  first = lambda x, value: jnp.pad(x, ((0, 0), (1, 0)), constant_values=value)
  table = first(jnp.sum(table, axis=1), 2 * 2 * 2.0)
  codes = first(jnp.cumsum(jnp.sum(surprise, axis=1), axis=1), 0.0)
  codes = codes - _times_log2(pruned[:, None] + escaped) + jnp.log2(1 + first(raised, 0.0))
  beside = escaped * (value_bits[:, None] + _BITS_OF_PLACE)
  beside = beside - _times_log2(escaped) - _times_log2(1 - escaped)
  beside = beside + jnp.where(escaped > 0, _BITS_OF_ESCAPES / sizes[:, None], 0)
  return codes + (44 + table) / sizes[:, None] + beside


_BITS_OF_PLACE = 0.02  # of an escaped weight, over the entropy of where escaped weights are
_BITS_OF_ESCAPES = 190.0  # of a section of escaped weights: its checksum, tables and entry


def escaped_value_bits(
  sums: Sums, edge: Float[Array, 'leaves'], mantissa: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """Bits of the value of a weight beyond an edge: sign, mantissa, and its exponent's entropy."""
  octaves = jnp.sum(sums.columns[:, ::BINS_AN_OCTAVE, :2], axis=2)
  # zeros are in the first bin
  octaves = octaves.at[:, 0].set(jnp.sum(sums.columns[:, 1, :2], axis=1))
  positive, negative, *_ = sums.at(edge)
  beyond = jnp.minimum(octaves, (positive + negative)[:, None])
  share = (beyond[:, :-1] - beyond[:, 1:]) / jnp.maximum(beyond[:, :1], 1e-30)
  return 1 + mantissa - jnp.sum(_times_log2(jnp.maximum(share, 0)), axis=1)


def _times_log2(x: Float[Array, '...']) -> Float[Array, '...']:
  """x log2 x, 0 at 0."""
  return x * jnp.log2(jnp.where(x > 0, x, 1))


def code_entropy(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  escaped: Float[Array, 'leaves'],
  value_bits: Float[Array, 'leaves'],
) -> Float[Array, 'leaves']:
  """Zeroth-order entropy of each leaf's codes and its escaped values, bits per weight."""
  codes = _times_log2(pruned) + jnp.sum(_times_log2(cells), axis=(1, 2)) + _times_log2(escaped)
  return escaped * value_bits - codes


def histogram_moments(
  histogram: Int32[Array, '2 bins'],
  centre: Float[Array, ' bins'],
  threshold: Float[Array, ''],
  step: Float[Array, ''],
  levels: Float[Array, ''],
  mantissa: Float[Array, ''],
) -> tuple[Float[Array, ''], Float[Array, ''], Float[Array, ''], Float[Array, '']]:
  """Mean square of all weights, best offset of a leaf's grid, its error and its sparsity.

  Args:
    histogram: counts by sign and magnitude.
    centre: of the bins.
    threshold: where the first cell begins.
    step: width of the cells.
    levels: cells a sign; weights beyond the last are escaped.
    mantissa: bits of the mantissa of the leaf's dtype, to which a value is rounded in its cell.

  Returns:
    E[w^2]; the mean of |w| - threshold - (k - 1) step over the weights in cells, k their cell (0
    where none is); the mean squared error with that offset; and the share of pruned weights.
  """
  counts = jnp.sum(histogram, axis=0).astype(centre.dtype)
  total = jnp.maximum(jnp.sum(counts), 1)
  energy = jnp.sum(counts * centre * centre) / total
  cells = (centre - threshold) / step
  place = jnp.minimum(jnp.floor(cells), jnp.maximum(levels - 1, 0))
  rest = centre - threshold - step * place
  is_pruned = (centre <= threshold) | (jnp.arange(BINS) == 0)
  # the largest weight may lie on the edge of the last cell
  on_grid = jnp.where(is_pruned | (cells >= levels + 2.0**-10), 0, counts)
  offset = jnp.sum(on_grid * rest) / jnp.maximum(jnp.sum(on_grid), 1)
  pruned = jnp.where(is_pruned, counts, 0)
  # what the value of the weight's cell is off, in the dtype: rounded, and by one unit in the last
  # place back into the cell where that has left it
  unit = jnp.ldexp(jnp.ones_like(centre), jnp.frexp(centre)[1] - 1 - mantissa.astype(jnp.int32))
  edge, value = centre - rest, centre - rest + offset
  value = jnp.round(value / unit) * unit
  value = jnp.where(
    value < edge, value + unit, jnp.where(value >= edge + step, value - unit, value)
  )
  error = jnp.sum(pruned * centre * centre) + jnp.sum(on_grid * jnp.square(centre - value))
  return energy, offset, error / total, jnp.sum(pruned) / total
