"""Steps at a budget of fixed-width bits: the second step of the paper, and its search.

    minimise sum_i F_i(D_i(Delta_i))   subject to   sum_ij m_ij b_ij(Delta_i) = bits * sum_ij m_ij

in the units of `opq_jax.allocation.optimization`.  The problem is the paper's (Hu et al., AAAI
2021); the search is our own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opq_jax.allocation import laplace
from opq_jax.allocation.optimization import Channels

_LOG2 = math.log(2.0)
_GRID = 65  # steps of every leaf that are compared at a time
_ROUNDS = 4  # each narrows the grid by a factor of 32 where nothing jumps
_MOST_SEARCHES = 8
_LOG_MOST = math.log(127.0)  # cells a sign, at most
_LOG_LEAST = math.log(2.0**-12)  # step over t_i, where hardly a weight is within 127 cells


def minimise_at_bits(
  channels: Channels,
  bits: Float[Array, ''],
  threshold: Float[Array, 'leaves'],
  survivors: Float[Array, 'channels'],
  reach: Float[Array, 'channels'],
  escape_bits: Callable[[Float[Array, 'leaves grid']], Float[Array, 'leaves grid']] | None = None,
) -> Float[Array, 'leaves']:
  """Steps Delta_i, in units of t_i, with which survivors need `bits` bits on average.

  b_ij = 1 + log2(clip(r_ij / Delta_i, 1, 127)) is what channel j needs: a sign, and an index into
  the part of the shared grid that it reaches; a weight beyond 127 cells takes the bits of its value
  beside.  Delta V' rises up to Delta = 3.49 tau only, so a leaf's
  Lagrangian may have two minima, a fine grid and one cell a sign, and b_ij has a kink in every
  channel.  Neither matters to a search on a grid of steps (`_dual_search`), and its answer comes
  with a lower bound of the cost.  Where the two differ, some leaf jumps from one minimum to the
  other just at the multiplier that meets the budget, and the best may have it in between, where no
  multiplier takes it.  Then that leaf is held near its best place (`_best_node`), and the search
  repeated, until cost and bound meet.

  With several such leaves the problem has many local minima, and this finds a good one of them.

  Args:
    channels: the problem.
    bits: per surviving weight.
    threshold: beta_i in units of t_i.
    survivors: m_ij / n, the share of all weights that survives in each channel.
    reach: r_ij >= 0, largest surviving |w| - beta_i of each channel, in units of t_i.
    escape_bits: steps -> bits of the values of what is then beyond 127 cells, per weight of all.
      Without, no step is so fine that anything is beyond.
  """
  tiny = jnp.finfo(survivors.dtype).tiny
  share, leaf = channels.leaf_share(), channels.leaf
  total = jnp.maximum(jnp.sum(survivors), tiny)
  pruned = channels.sum(
    channels.share * laplace.pruning_error(channels.of(threshold), channels.scale)
  )
  log_reach = jnp.log(jnp.maximum(reach, tiny))
  most = jnp.maximum(channels.max(log_reach), _LOG_LEAST)
  # far below any step that is of use: from 127 cells in a fraction of the leaf's scale to 127 that
  # hold its largest weight
  least = most - _LOG_MOST
  if escape_bits is not None:
    least = jnp.minimum(least, _LOG_LEAST)
  span = jnp.where(most > least, most - least, 1)

  # the error is a smooth function of the log step: tabulated once, the exponentials are few
  nodes = jnp.linspace(-0.04, 1.04, 33, dtype=least.dtype)
  y = channels.of(least[:, None] + (most - least)[:, None] * nodes[None])
  scale = jnp.broadcast_to(channels.scale[:, None], y.shape)
  error = channels.sum(survivors[:, None] * laplace.survivor_error(jnp.exp(y), scale))
  log_error = jnp.log(jnp.maximum(error, tiny))

  def evaluate(low: Array, high: Array) -> tuple[Array, Array]:
    """Costs, and bits per survivor of the tree, at _GRID log steps from `low` to `high`."""
    width = (high - low) / (_GRID - 1)
    log_step = low[:, None] + width[:, None] * jnp.arange(_GRID, dtype=low.dtype)[None]
    where = (log_step - least[:, None]) / span[:, None]
    error = jnp.exp(_interpolate(log_error, (where - nodes[0]) / (nodes[1] - nodes[0])))
    cost = channels.cost(1 - (error + pruned[:, None]) / (2 * share[:, None]))
    # a channel needs an index up to some node of the grid: sums over the channels by that node
    beyond = log_reach - channels.of(low)

    def index_bits(beyond: Array) -> Array:
      """Sums of m_j max(0, beyond_j - (log step - low)) over the channels."""
      last = jnp.ceil(beyond / channels.of(jnp.where(width > 0, width, tiny)))
      index = leaf * (_GRID + 1) + jnp.clip(last, 0, _GRID).astype(jnp.int32)

      both = jnp.stack([survivors * beyond, survivors], axis=1)
      sums = jax.ops.segment_sum(both, index, channels.leaves * (_GRID + 1))
      sums = sums.reshape(-1, _GRID + 1, 2)
      sums = jax.lax.cumsum(sums, axis=1, reverse=True)[:, 1:]
      return sums[..., 0] - (log_step - low[:, None]) * sums[..., 1]

    def within(_: Array) -> Array:
      return index_bits(beyond) / _LOG2

    def limited(log_step: Array) -> Array:
      assert escape_bits is not None
      # the index of a code of up to 127 cells, and the share of the weights beyond them
      index = index_bits(beyond) - index_bits(beyond - _LOG_MOST)
      return index / _LOG2 + escape_bits(jnp.exp(log_step))

    # once the grids are nearly found, 127 cells mostly suffice
    needs_more = jnp.any(most - low > _LOG_MOST * (1 + 1e-6))
    more = within(log_step)
    if escape_bits is not None:
      more = jax.lax.cond(needs_more, limited, lambda _: more, log_step)
    return cost, (channels.sum(survivors)[:, None] + more) / total

  def is_open(carry: tuple) -> Array:
    i, _, _, best, bound = carry
    tolerance = max(1e-7, 64 * float(jnp.finfo(least.dtype).eps))
    return (i == 0) | ((i < _MOST_SEARCHES) & (best.cost - bound > tolerance * best.cost))

  def search(carry: tuple) -> tuple:
    i, low, high, best, _ = carry
    found = _dual_search(evaluate, bits, low, high)
    is_better = (i == 0) | (found.cost < best.cost)
    best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), found, best)
    node = _best_node(*evaluate(low, high), bits, found.log_multiplier, found.leaf)
    width = (high - low) / (_GRID - 1)
    inner = low + width * jnp.maximum(node - 2, 0).astype(low.dtype)
    outer = low + width * jnp.minimum(node + 2, _GRID - 1).astype(low.dtype)
    is_held = np.arange(channels.leaves, dtype=np.int32) == found.leaf
    low, high = jnp.where(is_held, inner, low), jnp.where(is_held, outer, high)
    return i + 1, low, high, best, found.bound

  zero = jnp.zeros((), least.dtype)
  nothing = _Found(least, zero, zero, zero, jnp.int32(0))
  carry = jax.lax.while_loop(is_open, search, (jnp.int32(0), least, most, nothing, zero))
  return jnp.exp(carry[3].log_step)


class _Found(NamedTuple):
  """What a dual search found.

  Attributes:
    log_step: of every leaf; they meet the budget.
    cost: of these.
    bound: what no log steps between the same ends that meet the budget cost less than.
    log_multiplier: of the budget.
    leaf: the one that jumps farthest at this multiplier.
  """

  log_step: Float[Array, 'leaves']
  cost: Float[Array, '']
  bound: Float[Array, '']
  log_multiplier: Float[Array, '']
  leaf: Int[Array, '']


def _dual_search(
  evaluate: Callable[[Array, Array], tuple[Array, Array]],
  bits: Float[Array, ''],
  low: Float[Array, 'leaves'],
  high: Float[Array, 'leaves'],
) -> _Found:
  """The best log steps between `low` and `high`, by bisection of the multiplier on a grid.

  Given the multiplier every leaf takes the best point of its own grid; the multiplier is bisected;
  the grid is refined around the choices.  Just under the final multiplier the choices need too
  many bits, just over it too few; a mixture of the two meets the budget.
  """

  def refine(_: Array, carry: tuple) -> tuple:
    low, high, _, _, _, bracket = carry
    width = (high - low) / (_GRID - 1)
    cost, need = evaluate(low, high)

    def bisect(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
      under, over = bracket
      middle = (under + over) / 2
      lagrangian = cost + jnp.exp(middle) * need
      # several times faster than argmin, which XLA's CPU backend does not vectorise
      is_best = lagrangian <= jnp.min(lagrangian, axis=1, keepdims=True)
      too_many = jnp.sum(jnp.max(jnp.where(is_best, need, 0), axis=1)) > bits
      return jnp.where(too_many, middle, under), jnp.where(too_many, over, middle)

    under, over = jax.lax.fori_loop(0, 30, bisect, bracket)
    many, few = (
      low + width * jnp.argmin(cost + jnp.exp(x) * need, axis=1).astype(low.dtype)
      for x in (under, over)
    )
    multiplier = jnp.exp(over)
    bound = jnp.sum(jnp.min(cost + multiplier * need, axis=1)) - multiplier * bits
    inner = jnp.maximum(jnp.minimum(many, few) - width, low)
    outer = jnp.minimum(jnp.maximum(many, few) + width, high)
    # on a finer grid the multiplier is nearly the same
    return inner, outer, many, few, bound, (under - 2, over + 2)

  edge = jnp.asarray(30.0, low.dtype)
  carry = low, high, low, high, edge, (-edge, edge)
  _, _, many, few, bound, bracket = jax.lax.fori_loop(0, _ROUNDS, refine, carry)

  def close(_: Array, carry: tuple) -> tuple:
    first, last, _ = carry
    cost, need = (jnp.sum(x, axis=0) for x in evaluate(first, last))
    k = jnp.clip(jnp.sum((need > bits).astype(jnp.int32)) - 1, 0, _GRID - 2)
    width = (last - first) / (_GRID - 1)
    first = first + width * k.astype(low.dtype)
    return first, first + width, jnp.stack([need[k], need[k + 1], cost[k], cost[k + 1]])

  first, last, ends = jax.lax.fori_loop(0, 4, close, (many, few, jnp.zeros(4, low.dtype)))
  drop = ends[0] - ends[1]
  part = jnp.clip((ends[0] - bits) / jnp.where(drop > 0, drop, 1), 0, 1)
  return _Found(
    log_step=first + (last - first) * part,
    cost=ends[2] + (ends[3] - ends[2]) * part,
    bound=bound,
    log_multiplier=bracket[1] - 2,
    leaf=jnp.argmax(jnp.abs(many - few)).astype(jnp.int32),
  )


def _best_node(
  cost: Float[Array, 'leaves grid'],
  need: Float[Array, 'leaves grid'],
  bits: Float[Array, ''],
  log_multiplier: Float[Array, ''],
  leaf: Int[Array, ''],
) -> Int[Array, '']:
  """Where on its grid one leaf i is least costly, as far as a bound says.

  With leaf i at node k all costs together are at least

      cost_ik + max_mu [ sum_{j != i} min_l (cost_jl + mu need_jl) + mu (need_ik - bits) ]
  """
  spread = jnp.linspace(-3, 3, 65, dtype=cost.dtype)
  multiplier = jnp.exp(log_multiplier + spread)
  least = jax.lax.map(lambda mu: jnp.min(cost + mu * need, axis=1), multiplier)
  others = jnp.sum(least, axis=1) - least[:, leaf] - multiplier * bits
  bound = jnp.max(others[:, None] + multiplier[:, None] * need[leaf][None], axis=0)
  return jnp.argmin(cost[leaf] + bound)


def _interpolate(
  table: Float[Array, 'leaves nodes'], position: Float[Array, 'leaves grid']
) -> Float[Array, 'leaves grid']:
  """The quintic through the six nodes around each position, counted in nodes from the first."""
  first = jnp.clip(jnp.floor(position) - 2, 0, table.shape[1] - 6)
  x = position - first
  index = first.astype(jnp.int32)
  value = jnp.zeros_like(x)
  for k in range(6):
    weight = math.prod([(x - i) / (k - i) for i in range(6) if i != k])
    value += weight * jnp.take_along_axis(table, index + k, axis=1)
  return value
