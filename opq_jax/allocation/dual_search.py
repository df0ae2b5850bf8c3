"""Search for one number per leaf by its Lagrangian on grids: no derivatives, and a lower bound.

    minimise sum_i cost_i(x_i)   subject to   sum_i need_i(x_i) = budget

Given the multiplier every leaf takes the best node of its own grid; the multiplier is bisected; the
grids are refined around the choices.  Kinks and several minima of a leaf do not matter, and the
Lagrangian's minimum bounds the cost from below.  (Our own; duality as in any textbook.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GRID = 65
"""Nodes that are compared per leaf: 64 intervals, halved exactly."""

_ROUNDS = 4  # refinements; each narrows the grid by a factor of 32 where nothing jumps
_CLOSINGS = 4  # refinements between the two last choices, each by a factor of 64
_BISECTIONS = 30  # of the log multiplier between -30 and 30: to the precision of float32
_EDGE = 30.0  # of the log multiplier: costs are relative errors, needs are bits
_SLACK = 2.0  # of the log multiplier from one grid to a finer one, where it is nearly the same

Evaluate = Callable[[Array, Array], tuple[Array, Array]]
"""(low, high) -> costs and needs [leaves, GRID] at the nodes from `low` to `high` of each leaf."""


class Minimum(NamedTuple):
  """Result of a dual search.

  Attributes:
    x: number of every leaf; together they meet the budget.
    cost: their cost.
    bound: lower bound of the cost of any numbers between the same ends that meet the budget.
    log_multiplier: multiplier of the budget.
    leaf: the leaf that jumps farthest at this multiplier.
  """

  x: Float[Array, 'leaves']
  cost: Float[Array, '']
  bound: Float[Array, '']
  log_multiplier: Float[Array, '']
  leaf: Int[Array, '']


class _Bracket(NamedTuple):
  """Log multipliers: at `under` the leaves need too much, at `over` too little."""

  under: Array
  over: Array


class _Refinement(NamedTuple):
  """State of the refinement.

  Attributes:
    low, high: ends of the grids.
    many, few: choices of the leaves just under and just over the multiplier.
    bound: as in `Minimum`.
    bracket: around the multiplier.
  """

  low: Float[Array, 'leaves']
  high: Float[Array, 'leaves']
  many: Float[Array, 'leaves']
  few: Float[Array, 'leaves']
  bound: Float[Array, '']
  bracket: _Bracket


class _Segment(NamedTuple):
  """A segment between two choices of all leaves, with needs and costs at its ends."""

  first: Float[Array, 'leaves']
  last: Float[Array, 'leaves']
  need_first: Float[Array, '']
  need_last: Float[Array, '']
  cost_first: Float[Array, '']
  cost_last: Float[Array, '']


def dual_search(
  evaluate: Evaluate,
  budget: Float[Array, ''],
  low: Float[Array, 'leaves'],
  high: Float[Array, 'leaves'],
) -> Minimum:
  """Returns the best numbers between `low` and `high` that meet the budget.

  Just under the final multiplier the choices need too much, just over it too little; a mixture of
  the two meets the budget.
  """

  def refine(_: Array, state: _Refinement) -> _Refinement:
    low, high = state.low, state.high
    width = (high - low) / (GRID - 1)
    cost, need = evaluate(low, high)

    def bisect(_: Array, bracket: _Bracket) -> _Bracket:
      middle = (bracket.under + bracket.over) / 2
      lagrangian = cost + jnp.exp(middle) * need
      # several times faster than argmin, which XLA's CPU backend does not vectorise
      is_best = lagrangian <= jnp.min(lagrangian, axis=1, keepdims=True)
      # of equal nodes the one that needs most: `over` then never has a choice that needs too much
      too_many = jnp.sum(jnp.max(jnp.where(is_best, need, 0), axis=1)) > budget
      return _Bracket(
        jnp.where(too_many, middle, bracket.under), jnp.where(too_many, bracket.over, middle)
      )

    under, over = jax.lax.fori_loop(0, _BISECTIONS, bisect, state.bracket)
    many, few = (
      low + width * jnp.argmin(cost + jnp.exp(x) * need, axis=1).astype(low.dtype)
      for x in (under, over)
    )
    # any multiplier gives a lower bound; near the root it is the best one
    multiplier = jnp.exp(over)
    bound = jnp.sum(jnp.min(cost + multiplier * need, axis=1)) - multiplier * budget
    return _Refinement(
      jnp.maximum(jnp.minimum(many, few) - width, low),
      jnp.minimum(jnp.maximum(many, few) + width, high),
      many,
      few,
      bound,
      _Bracket(under - _SLACK, over + _SLACK),
    )

  edge = jnp.asarray(_EDGE, low.dtype)
  state = _Refinement(low, high, low, high, edge, _Bracket(-edge, edge))
  state = jax.lax.fori_loop(0, _ROUNDS, refine, state)

  def close(_: Array, segment: _Segment) -> _Segment:
    first, last = segment.first, segment.last
    cost, need = (jnp.sum(x, axis=0) for x in evaluate(first, last))
    # needs fall along the segment, from `many` to `few`: the last node above the budget begins the
    # part that crosses it.  The ends of a leaf may be in either order
    k = jnp.clip(jnp.sum((need > budget).astype(jnp.int32)) - 1, 0, GRID - 2)
    width = (last - first) / (GRID - 1)
    first = first + width * k.astype(low.dtype)
    return _Segment(first, first + width, need[k], need[k + 1], cost[k], cost[k + 1])

  zero = jnp.zeros((), low.dtype)
  segment = _Segment(state.many, state.few, zero, zero, zero, zero)
  segment = jax.lax.fori_loop(0, _CLOSINGS, close, segment)
  drop = segment.need_first - segment.need_last
  part = jnp.clip((segment.need_first - budget) / jnp.where(drop > 0, drop, 1), 0, 1)
  return Minimum(
    x=segment.first + (segment.last - segment.first) * part,
    cost=segment.cost_first + (segment.cost_last - segment.cost_first) * part,
    bound=state.bound,
    log_multiplier=state.bracket.over - _SLACK,
    leaf=jnp.argmax(jnp.abs(state.many - state.few)).astype(jnp.int32),
  )


def best_node(
  cost: Float[Array, 'leaves grid'],
  need: Float[Array, 'leaves grid'],
  budget: Float[Array, ''],
  log_multiplier: Float[Array, ''],
  leaf: Int[Array, ''],
) -> Int[Array, '']:
  """Returns the node of one leaf i at which a lower bound of all costs is least.

  With leaf i at node k all costs together are at least

      cost_ik + max_mu [ sum_{j != i} min_l (cost_jl + mu need_jl) + mu (need_ik - budget) ]

  Args:
    cost, need: at the nodes of all leaves.
    budget: of the needs.
    log_multiplier: of the last search; mu is tried within a factor of e^3 of it.
    leaf: i.
  """
  spread = jnp.linspace(-3, 3, 65, dtype=cost.dtype)
  multiplier = jnp.exp(log_multiplier + spread)
  # one multiplier after the other: [65, leaves, grid] would not stay in the cache
  least = jax.lax.map(lambda mu: jnp.min(cost + mu * need, axis=1), multiplier)
  others = jnp.sum(least, axis=1) - least[:, leaf] - multiplier * budget
  bound = jnp.max(others[:, None] + multiplier[:, None] * need[leaf][None], axis=0)
  return jnp.argmin(cost[leaf] + bound)
