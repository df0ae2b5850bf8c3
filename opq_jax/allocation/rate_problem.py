"""The problem of `opq_jax.allocation.rate_search`, and shares and bits of its leaves on a grid."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opq_jax.allocation.code_bits import code_entropy, escaped_value_bits, payload_bits
from opq_jax.allocation.histogram_sums import Sums, Tail
from opq_jax.core.limits import MAX_LEVELS


class RateProblem(NamedTuple):
  """The leaves of one search; lengths in the unit of each leaf.

  Attributes:
    sums: their histograms.
    sizes: weights of each leaf.
    share: the leaf's share of all weights.
    mantissa: bits of the mantissa of the leaf's dtype.
    log_mu: log mu of each leaf at lambda = 1.  For an objective linear in the errors it is known up
      to a number common to all leaves; for F = -log(1 - D / energy) it is that of D = 0.
    is_linear: whether the objective is linear in the errors.
    lattice_bits: bits per weight of a leaf on its lattice; infinite where it has none.
    lattice_error: its squared error per weight there.
    palette_levels: the most levels a sign, the last of which takes all weights beyond it; None
      where weights beyond the last level escape.
  """

  sums: Sums
  sizes: Float[Array | np.ndarray, 'leaves']
  share: Float[Array, 'leaves']
  mantissa: Float[Array, 'leaves']
  log_mu: Float[Array, 'leaves']
  is_linear: bool
  lattice_bits: Float[Array, 'leaves']
  lattice_error: Float[Array, 'leaves']
  palette_levels: int | None = None


class Shares(NamedTuple):
  """Shares of the weights of each leaf, and the squared error of pruning.

  Attributes:
    pruned: share of the pruned weights.
    cells: share of each cell of a sign.
    escaped: share of the weights beyond 0, 1, ... 127 cells.
    pruning_error: squared error of the pruned weights, per weight of the leaf.
  """

  pruned: Float[Array, 'leaves']
  cells: Float[Array, 'leaves 2 cells']
  escaped: Float[Array, 'leaves levels']
  pruning_error: Float[Array, 'leaves']


class Edges(NamedTuple):
  """Edges of the cells of all leaves.

  Attributes:
    magnitude: of the inner edges of all cells, and the outer edge of the last.
    tail: sums at these edges.
  """

  magnitude: Float[Array, 'leaves edges']
  tail: Tail


def edges_of(
  sums: Sums,
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
  palette: Float[Array, 'leaves'] | None = None,
  cells: int = MAX_LEVELS,
) -> Edges:
  """Returns the sums at the edges of cells.

  Args:
    sums: the histograms.
    threshold, step: of the grids.
    palette: levels of each leaf, the last of which takes all weights beyond it; None: a level takes
      the weights of its own cell.
    cells: how many.
  """
  k = jnp.arange(cells + 1, dtype=step.dtype)[None]
  magnitude = threshold[:, None] + step[:, None] * k
  tail = sums.at(magnitude)
  if palette is not None:
    # beyond the last cell lies nothing then, and all squares are below its outer edge
    is_beyond = k >= palette[:, None]
    all_squares = sums.energy()[:, None]
    tail = Tail(
      positive=jnp.where(is_beyond, 0, tail.positive),
      negative=jnp.where(is_beyond, 0, tail.negative),
      magnitude=jnp.where(is_beyond, 0, tail.magnitude),
      squares=jnp.where(is_beyond & (palette[:, None] > 0), all_squares, tail.squares),
    )
  return Edges(magnitude, tail)


def shares_of(tail: Tail) -> Shares:
  """Returns the shares of the weights, from the sums at the edges of all cells."""
  both = jnp.stack([tail.positive, tail.negative], axis=1)
  cells = jnp.maximum(both[..., :-1] - both[..., 1:], 0)
  escaped = tail.positive + tail.negative
  return Shares(1 - escaped[:, 0], cells, escaped, tail.squares[:, 0])


def payload_of(
  problem: RateProblem,
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
  levels: Float[Array, 'leaves'],
) -> Float[Array, 'leaves']:
  """Returns bits per weight of each leaf in a file, on a grid of so many levels."""
  palette = None if problem.palette_levels is None else levels
  shares = shares_of(edges_of(problem.sums, threshold, step, palette).tail)
  last = levels.astype(jnp.int32)[:, None]
  escaped = jnp.take_along_axis(shares.escaped, last, axis=1)[:, 0]
  value_bits = escaped_value_bits(problem.sums, escaped, problem.mantissa)
  bits = payload_bits(shares.pruned, shares.cells, shares.escaped, problem.sizes, value_bits)
  return jnp.take_along_axis(bits, last, axis=1)[:, 0]


def entropy_of(
  sums: Sums,
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
  levels: Float[Array, 'leaves'],
  value_bits: Float[Array, 'leaves'],
  takes_all: bool = False,
) -> tuple[Float[Array, 'leaves'], Float[Array, 'leaves']]:
  """Returns the zeroth-order entropy of each leaf's codes and the share of its escaped weights.

  The entropy is in bits per weight, with `value_bits` for each escaped one; where the last cell
  `takes_all` weights beyond it, none escapes.
  """
  edges = edges_of(sums, threshold, step, levels if takes_all else None)
  shares = shares_of(edges.tail)
  number = jnp.arange(MAX_LEVELS, dtype=levels.dtype)[None, None]
  cells = jnp.where(number < levels[:, None, None], shares.cells, 0)
  last = levels.astype(jnp.int32)[:, None]
  escaped = jnp.take_along_axis(shares.escaped, last, axis=1)[:, 0]
  return code_entropy(shares.pruned, cells, escaped, value_bits), escaped
