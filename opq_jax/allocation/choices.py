"""The four choices of a leaf, and the best of them for one Lagrange multiplier.

    on a grid    threshold, step and number of levels; weights beyond the last cell escape
    pruned       all weights are 0: no bits but those of a table, all of the error
    a lattice    where the leaf has few distinct magnitudes, a grid that holds them exactly
    exact        every weight but zeros escapes: no error, the bits of the dtype

The best choice has the least F_i(D_i) + lambda n_i R_i, with squared error D, bits per weight R.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation.code_bits import escaped_value_bits, payload_bits
from opq_jax.allocation.exponential_tails import best_grid, best_levels
from opq_jax.allocation.palettes import best_palette, palette_levels
from opq_jax.allocation.rate_problem import RateProblem

PRUNED, ON_GRID, ON_LATTICE, EXACT = range(4)
FREE = -1
"""A leaf that is held to no choice."""
RAISED = 4
"""A leaf that is held to its grid, with a threshold that the search raises."""


class Choices(NamedTuple):
  """The choice of every leaf.

  The search selects among choices, and XLA compiles a kernel for each array that it selects: so
  the properties are rows of two arrays.

  Attributes:
    of_leaves: its rows are `choice`, `threshold`, `step`, `levels` and `payload`.
    of_all: `bits` and `cost`.
  """

  of_leaves: Float[Array, '5 leaves']
  of_all: Float[Array, '2']

  @property
  def choice(self) -> Int32[Array, 'leaves']:
    """PRUNED, ON_GRID, ON_LATTICE or EXACT."""
    return self.of_leaves[0].astype(jnp.int32)

  @property
  def threshold(self) -> Float[Array, 'leaves']:
    """The threshold of the grid, where the choice is ON_GRID."""
    return self.of_leaves[1]

  @property
  def step(self) -> Float[Array, 'leaves']:
    """Its step."""
    return self.of_leaves[2]

  @property
  def levels(self) -> Float[Array, 'leaves']:
    """Its levels a sign."""
    return self.of_leaves[3]

  @property
  def payload(self) -> Float[Array, 'leaves']:
    """Bits per weight of each leaf in a file."""
    return self.of_leaves[4]

  @property
  def bits(self) -> Float[Array, '']:
    """Bits per weight over all leaves."""
    return self.of_all[0]

  @property
  def cost(self) -> Float[Array, '']:
    """Weighted squared error of all leaves, up to a factor."""
    return self.of_all[1]


class Ends(NamedTuple):
  """Bits per weight of each leaf without a grid: all weights pruned, and all of them exact."""

  pruned: Float[Array, 'leaves']
  exact: Float[Array, 'leaves']


def ends_of(problem: RateProblem) -> Ends:
  """Returns the bits of all leaves pruned, and of all leaves exact."""
  sums, nonzero = problem.sums, problem.sums.nonzero()
  # the same for all leaves twice: with no weight that escapes, and with all but zeros
  escaped = jnp.concatenate([jnp.zeros_like(nonzero), nonzero])
  cells = jnp.zeros((len(escaped), 2, 1), escaped.dtype)
  value_bits = jnp.tile(escaped_value_bits(sums, nonzero, problem.mantissa), 2)
  sizes, both = jnp.tile(jnp.asarray(problem.sizes), 2), jnp.stack([escaped, escaped], axis=1)
  bits = payload_bits(1 - escaped, cells, both, sizes, value_bits)[:, 0]
  pruned, exact = jnp.split(bits, 2)
  # no weight of a palette escapes
  return Ends(pruned, exact if problem.palette_levels is None else jnp.full_like(exact, jnp.inf))


def choices_at(
  problem: RateProblem,
  ends: Ends,
  log_lambda: Float[Array, ''],
  raised: Float[Array, ''],
  bits: Float[Array, ''],
  held: Int32[Array, 'leaves'],
) -> Choices:
  """Returns the choices that minimise sum_i F_i + lambda n_i R_i.

  Args:
    problem: the leaves.
    ends: of `ends_of`.
    log_lambda: logarithm of the multiplier.
    raised: part of the way from its own threshold to its largest |w| that the threshold of a
      RAISED leaf is moved.
    bits: bits per weight that the search is asked for; a lattice of no more bits and no error is
      always kept.
    held: FREE, RAISED or a choice, for every leaf.
  """
  sums = problem.sums
  log_mu = problem.log_mu + log_lambda
  has_palettes = problem.palette_levels is not None
  grid = (best_palette if has_palettes else best_grid)(problem, log_mu)
  threshold = grid.threshold + raised * (sums.largest - grid.threshold)
  grid = grid._replace(threshold=jnp.where(held == RAISED, threshold, grid.threshold))
  price = jnp.exp(grid.log_price)
  levels, payload, error = (palette_levels if has_palettes else best_levels)(problem, grid)
  energy = sums.energy()
  # in the order of the constants above
  rates = jnp.stack([ends.pruned, payload, problem.lattice_bits, ends.exact])
  errors = jnp.stack([energy, error, problem.lattice_error, jnp.zeros_like(payload)])
  if problem.is_linear:
    costs = errors + price[None] * rates
  else:
    left = 1 - errors / jnp.where(energy > 0, energy, 1)[None]
    left = jnp.maximum(left, jnp.finfo(left.dtype).tiny)
    costs = jnp.exp(log_mu)[None] * rates - energy[None] * jnp.log(left)
  # a few values that somebody chose (binary, ternary weights) are kept where they take no more than
  # the average: rounding them again would spoil a network that was trained for them
  is_kept = ((problem.lattice_bits <= bits) & (problem.lattice_error == 0))[None]
  costs = jnp.where(is_kept & (np.arange(4)[:, None] != ON_LATTICE), jnp.inf, costs)
  best = jnp.argmin(costs, axis=0).astype(jnp.int32)
  choice = jnp.where(held < 0, best, jnp.where(held == RAISED, ON_GRID, held)).astype(jnp.int32)
  payload = jnp.take_along_axis(rates, choice[None], axis=0)[0]
  payload = jnp.where(sums.largest > 0, payload, 0)
  error = jnp.take_along_axis(errors, choice[None], axis=0)[0]
  # errors over mu: omega_i D_i up to a factor, which the least log_mu keeps in range
  weight = jnp.exp(jnp.min(problem.log_mu) - problem.log_mu)
  cost = jnp.sum(problem.share * error * weight)
  total = jnp.sum(problem.share * payload)
  rows = [choice.astype(payload.dtype), grid.threshold, grid.step, levels, payload]
  return Choices(jnp.stack(rows), jnp.stack([total, cost]))
