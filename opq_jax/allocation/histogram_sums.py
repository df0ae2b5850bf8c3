"""Histograms summed up to every edge: shares, magnitudes and squares beyond any threshold."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from opq_jax.allocation.bins import BINS, bin_edge, bin_position


class Tail(NamedTuple):
  """Sums at an edge, per weight of the leaf.

  Attributes:
    positive, negative: share of the positive and of the negative weights beyond the edge.
    magnitude: sum of |w| beyond it.
    squares: sum of w^2 below it.
  """

  positive: Float[Array, 'leaves *more']
  negative: Float[Array, 'leaves *more']
  magnitude: Float[Array, 'leaves *more']
  squares: Float[Array, 'leaves *more']


class Sums(NamedTuple):
  """The histograms of all leaves, summed up to every edge between two bins.

  Lengths are in units of the leaf's own, a power of two (so that no bin changes).

  Attributes:
    columns: the fields of `Tail` at every edge.
    largest: largest |w| of every leaf.
    numbers: the one |w| that all weights of a bin have; NaN in other bins.
  """

  columns: Float[Array, 'leaves edges 4']
  largest: Float[Array, 'leaves']
  numbers: Float[Array, 'leaves bins']

  def at(self, magnitude: Float[Array, 'leaves *more']) -> Tail:
    """Returns the sums at edges of the given magnitudes.

    In a bin of one number the sums jump there; elsewhere they are interpolated linearly.
    """
    flat = magnitude.reshape(len(magnitude), -1)
    # the weights of the first bin count as zeros: every threshold prunes them
    position = jnp.maximum(bin_position(flat, self.largest[:, None]), 1)
    index = jnp.minimum(position.astype(jnp.int32), BINS - 1)
    number = jnp.take_along_axis(self.numbers, index, axis=1)
    part = position - index.astype(position.dtype)
    part = jnp.where(jnp.isnan(number), part, (flat >= number).astype(part.dtype))[..., None]
    low, high = (
      jnp.take_along_axis(self.columns, i[..., None], axis=1) for i in (index, index + 1)
    )
    sums = low + part * (high - low)
    # the last bin is filled only up to the largest weight; 1e-6 is eight roundings of float32
    is_all = (flat >= self.largest[:, None] * (1 - 1e-6))[..., None]
    sums = jnp.where(is_all, self.columns[:, -1:], sums)
    # without the barrier XLA repeats the look-up in everything that it is fused into
    sums = lax.optimization_barrier(sums)
    return Tail(*(sums[..., k].reshape(magnitude.shape) for k in range(4)))

  def energy(self) -> Float[Array, 'leaves']:
    """Returns the mean of w^2."""
    return self.columns[:, -1, 3]

  def nonzero(self) -> Float[Array, 'leaves']:
    """Returns the share of the weights that are not zeros."""
    return jnp.sum(self.columns[:, 1, :2], axis=1)

  def centres(self) -> tuple[Float[Array, 'leaves bins'], Float[Array, 'leaves bins']]:
    """Returns the |w| that stands for each bin, 0 for the first, and the width of the bin."""
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
  """Returns the `Sums` of histograms.

  Args:
    histogram: of all leaves.
    largest: largest |w|, in the leaf's unit.
    numbers: as in `Sums`.
    has_own_bins: whether every number of the leaf's dtype has a bin of its own (bfloat16 and
      narrower mantissas).
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
  beyond = jnp.stack([counts[:, 0], counts[:, 1], both * centre], axis=1)
  # summed from the far end: as a difference of sums from 0, a thin tail would have no digits left
  beyond = jnp.pad(lax.cumsum(beyond, axis=2, reverse=True), ((0, 0), (0, 0), (0, 1)))
  # width^2 / 12: the variance of weights spread evenly over their bin
  squares = both * (centre * centre + width * width / 12)
  below = jnp.pad(jnp.cumsum(squares, axis=1), ((0, 0), (1, 0)))[:, None]
  return sums._replace(columns=jnp.concatenate([beyond, below], axis=1).swapaxes(1, 2))
