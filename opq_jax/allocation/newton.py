"""Newton's method on the stationarity conditions of all leaves and one shared constraint.

Leaf i has k unknowns z_i (logarithms of its threshold, step, ...) and k conditions
r_i(z_i, log lambda) = 0; the multiplier lambda is shared, and fixed by sum_i c_i(z_i) = target.
The Jacobian is bordered block-diagonal: each leaf's k x k block is solved alone, for its residual
and for its slope in log lambda, and one scalar equation gives the step of log lambda.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_MAX_STEPS = 60  # each changes a threshold or a step by a factor of e at most


class _Iterate(NamedTuple):
  """State of the iteration.

  Attributes:
    steps: steps taken.
    z: unknowns of the leaves.
    multiplier: log lambda.
    moved: largest change of an unknown in the last step.
  """

  steps: Int32[Array, ''] | int
  z: Float[Array, 'leaves k']
  multiplier: Float[Array, '']
  moved: Float[Array, '']


def solve_stationarity(
  sums: Callable[[Array], list[Array]],
  conditions: Callable[[Array, Array, list[Array]], tuple[Array, Array]],
  start: Float[Array, 'leaves k'],
  multiplier: Float[Array, ''],
  target: Float[Array, ''],
) -> tuple[Float[Array, 'leaves k'], Float[Array, '']]:
  """Solves the conditions of all leaves together with the constraint.

  A leaf's conditions depend on its own unknowns and the multiplier alone, so k + 1 differences
  give the Jacobians of all leaves.  Differences are used because XLA takes several times as long to
  compile exact derivatives of the sums; they cost one iteration at most.

  Args:
    sums: z -> sums over the channels of each leaf; may depend on the first two unknowns only.
    conditions: (z, log lambda, sums) -> residuals [leaves, k], and the leaf's part [leaves] of the
      constraint.
    start: initial z; logarithms, so a step of 1 is a factor of e.
    multiplier: initial log lambda.
    target: sum of the parts of all leaves.

  Returns:
    z and log lambda after convergence (to the float's precision, or 60 steps).
  """
  k = start.shape[1]
  h = math.sqrt(float(jnp.finfo(start.dtype).eps))  # balances truncation and rounding
  # row 0 is the point itself, the others move one unknown each, the last one the multiplier
  moves = np.eye(k + 2, k + 1, -1, dtype=start.dtype)
  # sums ignore the third unknown and the multiplier, and such rows reuse the sums of row 0
  moves_sums = moves[: 1 + min(k, 2)]
  which_sums = np.where(np.arange(k + 2) < len(moves_sums), np.arange(k + 2), 0)

  def is_moving(iterate: _Iterate) -> Array:
    # convergence is quadratic: after a step of 4 h the next one is below the float's precision
    return (iterate.steps < _MAX_STEPS) & (iterate.moved > 4 * h)

  def step(iterate: _Iterate) -> _Iterate:
    z, multiplier = iterate.z, iterate.multiplier
    summed = jax.vmap(lambda move: sums(z + h * move[None, :k]))(moves_sums)
    residuals, parts = jax.vmap(
      lambda move, total: conditions(z + h * move[None, :k], multiplier + h * move[k], total)
    )(moves, [total[which_sums] for total in summed])
    slopes = (residuals[1:] - residuals[:1]) / h  # [unknown, leaves, residual]
    gradient = (parts[1 : k + 1] - parts[:1]).T / h
    # z moves by -J^-1 r, and by -J^-1 dr/dlog(lambda) for each unit of log lambda: one solve for
    # both
    right = jnp.stack([residuals[0], slopes[k]], axis=-1)
    solved = _solve_small(slopes[:k], right)
    # a leaf that has run out of room (all pruned) has a singular system: it stays where it is
    solved = jnp.where(jnp.isfinite(solved), solved, 0)
    towards, along = -solved[..., 0], -solved[..., 1]
    slope = jnp.sum(gradient * along)
    missing = target - jnp.sum(parts[0]) - jnp.sum(gradient * towards)
    # limited steps: far from the solution the linear model is wrong, and exp would overflow
    dm = jnp.clip(missing / jnp.where(jnp.abs(slope) > 0, slope, 1), -2, 2)
    dz = jnp.clip(towards + dm * along, -1, 1)
    return _Iterate(iterate.steps + 1, z + dz, multiplier + dm, jnp.max(jnp.abs(dz)))

  infinity = jnp.asarray(jnp.inf, start.dtype)
  end = jax.lax.while_loop(is_moving, step, _Iterate(0, start, multiplier, infinity))
  return end.z, end.multiplier


def _solve_small(columns: Float[Array, 'k leaves k'], right: Float[Array, 'leaves k n']) -> Array:
  """Solves one system per leaf of one or three unknowns, given the columns of the matrices.

  Cramer's rule compiles faster than an elimination, and Newton's method corrects its rounding.
  """
  if len(columns) == 1:
    return right / columns[0][..., None]
  first, second, third = columns
  rows = jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)
  determinant = jnp.sum(first * rows[0], axis=-1)
  numerators = [jnp.sum(row[..., None] * right, axis=-2) for row in rows]
  return jnp.stack(numerators, axis=-2) / determinant[:, None, None]
