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


class Point(NamedTuple):
  """A point of the search.

  Attributes:
    log_lambda: logarithm of the multiplier.
    raised: part of the way from its own threshold to its largest |w| that the threshold of a
      RAISED leaf is moved.
  """

  log_lambda: Float[Array, '']
  raised: Float[Array, '']


class Choices(NamedTuple):
  """The choice of every leaf.

  Attributes:
    choice: PRUNED, ON_GRID, ON_LATTICE or EXACT.
    threshold, step, levels: of the grid, where it is ON_GRID.
    payload: bits per weight of each leaf in a file.
    bits: bits per weight over all leaves.
    cost: weighted squared error of all leaves, up to a factor.
  """

  choice: Int32[Array, 'leaves']
  threshold: Float[Array, 'leaves']
  step: Float[Array, 'leaves']
  levels: Float[Array, 'leaves']
  payload: Float[Array, 'leaves']
  bits: Float[Array, '']
  cost: Float[Array, '']


def choices_at(
  problem: RateProblem, point: Point, bits: Float[Array, ''], held: Int32[Array, 'leaves']
) -> Choices:
  """Returns the choices that minimise sum_i F_i + lambda n_i R_i.

  Args:
    problem: the leaves.
    point: multiplier and raised thresholds.
    bits: bits per weight that the search is asked for; a lattice of no more bits and no error is
      always kept.
    held: FREE, RAISED or a choice, for every leaf.
  """
  sums = problem.sums
  log_mu = problem.log_mu + point.log_lambda
  has_palettes = problem.palette_levels is not None
  grid = (best_palette if has_palettes else best_grid)(problem, log_mu)
  raised = grid.threshold + point.raised * (sums.largest - grid.threshold)
  grid = grid._replace(threshold=jnp.where(held == RAISED, raised, grid.threshold))
  price = jnp.exp(grid.log_price)
  levels, payload, error = (palette_levels if has_palettes else best_levels)(problem, grid)
  energy, nothing = sums.energy(), jnp.zeros_like(payload)
  nonzero = sums.nonzero()
  # in the order of the constants above
  rates = jnp.stack(
    [
      _payload_without_levels(problem, nothing + 1, nothing),
      payload,
      problem.lattice_bits,
      # no weight of a palette escapes
      nothing + jnp.inf if has_palettes else _payload_without_levels(problem, 1 - nonzero, nonzero),
    ]
  )
  errors = jnp.stack([energy, error, problem.lattice_error, nothing])
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
  return Choices(choice, grid.threshold, grid.step, levels, payload, total, cost)


def _payload_without_levels(
  problem: RateProblem, pruned: Float[Array, 'leaves'], escaped: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """Returns bits per weight of leaves without levels: each weight is pruned or escapes."""
  none = jnp.zeros((len(pruned), 2, 1), pruned.dtype)
  both = jnp.stack([escaped, escaped], axis=1)
  value_bits = escaped_value_bits(problem.sums, jnp.zeros_like(pruned), problem.mantissa)
  return payload_bits(pruned, none, both, problem.sizes, value_bits)[:, 0]
