"""Steps at a budget of fixed-width bits: the second step of the paper, and a search for it.

    minimise sum_i F_i(D_i(Delta_i))   subject to   sum_ij m_ij b_ij(Delta_i) = bits * sum_ij m_ij

in the units of `opq_jax.allocation.channels`.  The problem is the paper's (Hu et al., AAAI 2021);
the search is our own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation import laplace
from opq_jax.allocation.channels import Channels
from opq_jax.allocation.dual_search import GRID, Minimum, best_node, dual_search
from opq_jax.core.limits import MAX_LEVELS

_LOG2 = math.log(2.0)
_MAX_SEARCHES = 8  # each holds one more leaf near its best place
_LOG_LEVELS = math.log(MAX_LEVELS)
_LOG_FINEST = math.log(2.0**-12)  # step over t_i at which hardly a weight is within 127 cells
# ends, as parts of the span of log steps, and nodes of the error's table: one node beyond either
# end, since interpolation is best between nodes
_TABLE = -0.04, 1.04, 33


class _Best(NamedTuple):
  """State of the searches.

  Attributes:
    searches: searches made.
    low, high: ends of each leaf's log steps in the next search.
    best: least cost of all searches so far.
    bound: lower bound of the last search.
  """

  searches: Int32[Array, '']
  low: Float[Array, 'leaves']
  high: Float[Array, 'leaves']
  best: Minimum
  bound: Float[Array, '']


def minimise_at_bits(
  channels: Channels,
  bits: Float[Array, ''],
  threshold: Float[Array, 'leaves'],
  survivors: Float[Array, 'channels'],
  reach: Float[Array, 'channels'],
  escape_bits: Callable[[Float[Array, 'leaves grid']], Float[Array, 'leaves grid']] | None = None,
) -> Float[Array, 'leaves']:
  """Returns steps Delta_i, in units of t_i, with which survivors need `bits` bits on average.

  Channel j needs b_ij = 1 + log2(clip(r_ij / Delta_i, 1, 127)): a sign, and an index into the part
  of the shared grid that it reaches.  A weight beyond 127 cells also takes the bits of its value.

  Delta V' rises only up to Delta = 3.49 tau, so a leaf's Lagrangian may have two minima, a fine
  grid and one cell per sign, and b_ij has a kink in every channel.  `dual_search` compares grids of
  steps instead of derivatives, and its answer comes with a lower bound of the cost.  Where the two
  differ, some leaf jumps from one minimum to the other just at the multiplier that meets the
  budget, and its best step may lie between them, where no multiplier takes it.  That leaf is then
  held near its best place (`best_node`), and the search is repeated until cost and bound meet.
  With several leaves that jump, the problem has many local minima; the search finds a good one.

  Args:
    channels: the problem.
    bits: bits per surviving weight.
    threshold: beta_i in units of t_i.
    survivors: m_ij / n, the share of all weights that survives in each channel.
    reach: r_ij >= 0, largest surviving |w| - beta_i of each channel, in units of t_i.
    escape_bits: steps -> bits of the values beyond 127 cells, per weight of the tree.  They must be
      0 where 127 cells reach the largest weight: once no step in question is finer, they are not
      asked for any more, and a budget that counts them would be missed.  None: no step is so fine
      that a weight lies beyond.
  """
  tiny = jnp.finfo(survivors.dtype).tiny
  share, leaf = channels.leaf_share(), channels.leaf
  total = jnp.maximum(jnp.sum(survivors), tiny)
  pruned = channels.sum(
    channels.share * laplace.pruning_error(channels.of(threshold), channels.scale)
  )
  log_reach = jnp.log(jnp.maximum(reach, tiny))
  coarsest = jnp.maximum(channels.max(log_reach), _LOG_FINEST)
  # the finest step of use: 127 cells reach the largest weight, or, with escaped weights, only a
  # fraction of the leaf's scale
  finest = coarsest - _LOG_LEVELS
  if escape_bits is not None:
    finest = jnp.minimum(finest, _LOG_FINEST)
  span = jnp.where(coarsest > finest, coarsest - finest, 1)

  # the error is a smooth function of the log step: a table saves most exponentials of the search
  nodes = jnp.linspace(*_TABLE, dtype=finest.dtype)
  log_steps = channels.of(finest[:, None] + (coarsest - finest)[:, None] * nodes[None])
  scale = jnp.broadcast_to(channels.scale[:, None], log_steps.shape)
  error = channels.sum(survivors[:, None] * laplace.survivor_error(jnp.exp(log_steps), scale))
  # in logarithms, in which the error of fine steps is a line, 2 log Delta: little is left to fit
  log_error = jnp.log(jnp.maximum(error, tiny))

  def evaluate(low: Array, high: Array) -> tuple[Array, Array]:
    """Returns costs, and bits per survivor of the tree, at GRID log steps from `low` to `high`."""
    width = (high - low) / (GRID - 1)
    log_step = low[:, None] + width[:, None] * jnp.arange(GRID, dtype=low.dtype)[None]
    place = (log_step - finest[:, None]) / span[:, None]
    error = jnp.exp(_interpolate(log_error, (place - nodes[0]) / (nodes[1] - nodes[0])))
    cost = channels.cost(1 - (error + pruned[:, None]) / (2 * share[:, None]))
    beyond = log_reach - channels.of(low)

    def index_bits(beyond: Array) -> Array:
      """Sums m_j max(0, beyond_j - (log step - low)) over the channels, at every node."""
      # a channel counts up to the last node that it reaches: sums by that node, then cumulated,
      # so that the channels are visited once and not once a node
      last = jnp.ceil(beyond / channels.of(jnp.where(width > 0, width, tiny)))
      index = leaf * (GRID + 1) + jnp.clip(last, 0, GRID).astype(jnp.int32)
      both = jnp.stack([survivors * beyond, survivors], axis=1)
      sums = jax.ops.segment_sum(both, index, channels.leaves * (GRID + 1))
      sums = sums.reshape(-1, GRID + 1, 2)
      sums = jax.lax.cumsum(sums, axis=1, reverse=True)[:, 1:]
      return sums[..., 0] - (log_step - low[:, None]) * sums[..., 1]

    def within(index: Array) -> Array:
      return index / _LOG2

    def limited(index: Array) -> Array:
      assert escape_bits is not None
      # an index of at most 127 cells, and the values of the weights beyond them
      index = index - index_bits(beyond - _LOG_LEVELS)
      return index / _LOG2 + escape_bits(jnp.exp(log_step))

    index = index_bits(beyond)
    if escape_bits is None:
      more = within(index)
    else:
      # in later rounds 127 cells mostly suffice, and the second sum is saved
      needs_more = jnp.any(coarsest - low > _LOG_LEVELS * (1 + 1e-6))
      more = jax.lax.cond(needs_more, limited, within, index)
    return cost, (channels.sum(survivors)[:, None] + more) / total

  def is_open(state: _Best) -> Array:
    tolerance = max(1e-7, 64 * float(jnp.finfo(finest.dtype).eps))
    has_gap = state.best.cost - state.bound > tolerance * state.best.cost
    return (state.searches == 0) | ((state.searches < _MAX_SEARCHES) & has_gap)

  def search(state: _Best) -> _Best:
    low, high = state.low, state.high
    result = dual_search(evaluate, bits, low, high)
    is_better = (state.searches == 0) | (result.cost < state.best.cost)
    best = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), result, state.best)
    # the next search holds the leaf that jumps within two nodes of its best place; costs may rise
    # there, so the best answer of all searches is kept
    node = best_node(*evaluate(low, high), bits, result.log_multiplier, result.leaf)
    width = (high - low) / (GRID - 1)
    inner = low + width * jnp.maximum(node - 2, 0).astype(low.dtype)
    outer = low + width * jnp.minimum(node + 2, GRID - 1).astype(low.dtype)
    is_held = np.arange(channels.leaves, dtype=np.int32) == result.leaf
    low, high = jnp.where(is_held, inner, low), jnp.where(is_held, outer, high)
    return _Best(state.searches + 1, low, high, best, result.bound)

  zero = jnp.zeros((), finest.dtype)
  nothing = Minimum(finest, zero, zero, zero, jnp.int32(0))
  state = jax.lax.while_loop(is_open, search, _Best(jnp.int32(0), finest, coarsest, nothing, zero))
  return jnp.exp(state.best.x)


def _interpolate(
  table: Float[Array, 'leaves nodes'], position: Float[Array, 'leaves grid']
) -> Float[Array, 'leaves grid']:
  """Interpolates by the quintic through the six nodes around each position, counted in nodes."""
  first = jnp.clip(jnp.floor(position) - 2, 0, table.shape[1] - 6)
  x = position - first
  index = first.astype(jnp.int32)
  value = jnp.zeros_like(x)
  for k in range(6):
    weight = math.prod([(x - i) / (k - i) for i in range(6) if i != k])
    value += weight * jnp.take_along_axis(table, index + k, axis=1)
  return value
