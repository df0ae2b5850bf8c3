"""Thresholds and steps of all leaves, and what is said of them, from their joined statistics.

What is jitted here is compiled for the sizes of `JoinedStatistics` and the kind of target alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from opq_jax import laplace
from opq_jax.fixed_width import minimise_at_bits
from opq_jax.histograms import (
  bins_at_rank,
  code_shares,
  counts_beyond,
  entropy_of_shares,
  histogram_min_step,
  histogram_moments,
  interpolated_at_rank,
  magnitudes_at_rank,
  payload_of_shares,
)
from opq_jax.joined_statistics import JoinedStatistics
from opq_jax.optimization import Channels, Measured, minimise_at_rate, minimise_at_sparsity

MAX_LEVELS = 127  # a code is one int8
# of all weights, what a leaf of zeros counts
_SHARE_OF_ZEROS = 1e-7


@functools.partial(jax.jit, static_argnames='block')
def ranks(tree: JoinedStatistics, sparsity: Array, block: int) -> tuple[Array, Array, Array]:
  """How many weights every leaf prunes; in which bin the last of them is, and which it is there."""
  channels, _ = _channels(tree, block)
  assert tree.histogram is not None
  _, left = _predicted(channels, sparsity.astype(tree.scale.dtype))
  rank = _rank(tree, channels, left)
  return rank, *bins_at_rank(tree.histogram, rank)


@jax.jit
def thresholds(
  fine: Int32[Array, 'leaves bins'],
  ends: Float[Array, 'leaves'],
  coarse: Int32[Array, 'leaves'],
  left: Int32[Array, 'leaves'],
  rank: Int32[Array, 'leaves'],
) -> Float32[Array, 'leaves']:
  return magnitudes_at_rank(fine, ends.astype(jnp.float32), coarse, left, rank)


def _predicted(
  channels: Channels, sparsity: Float[Array, '']
) -> tuple[Float[Array, 'leaves'], Float[Array, 'channels']]:
  """Thresholds in units of t_i and survivors, as a share of all weights, by the closed form."""
  threshold = minimise_at_sparsity(channels, sparsity)
  left = 1 - laplace.pruned_fraction(channels.of(threshold), channels.scale)
  return threshold, channels.share * left


def _rank(tree: JoinedStatistics, channels: Channels, left: Float[Array, 'channels']) -> Array:
  """The number of weights that every leaf prunes."""
  pruned = 1 - channels.sum(left) / channels.leaf_share()
  return jnp.round(pruned * tree.sizes).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames='block')
def solve(
  tree: JoinedStatistics,
  targets: dict[str, Array],
  seen: tuple[Array, Array] | None,
  block: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """The fields of all leaves' `LeafAllocation`: those per leaf, and those per channel, joined.

  Args:
    tree: all leaves; with histograms the answer is corrected by them.
    targets: what is asked.
    seen: what `_second_look` has found, where there was one.
    block: of the layout.
  """
  dtype = tree.scale.dtype
  channels, unit = _channels(tree, block)
  measure, measured = None, None
  if tree.histogram is not None:
    beyond = counts_beyond(tree.histogram)
    measure = functools.partial(_measure, beyond, tree.ends / unit, tree.sizes, channels)
  if 'compression_rate' in targets:
    bits = 32 / targets['compression_rate'].astype(dtype)
    threshold, step, measured = minimise_at_rate(channels, bits, measure)
    threshold = threshold * unit
  else:
    if seen is not None:
      threshold, left = seen[0].astype(dtype), seen[1]
    else:
      threshold, left = _predicted(channels, targets['sparsity'].astype(dtype))
      threshold = threshold * unit
      if tree.histogram is not None:
        rank = _rank(tree, channels, left)
        ends = tree.ends.astype(jnp.float32)
        threshold = interpolated_at_rank(tree.histogram, ends, rank).astype(dtype)
    reach = jnp.maximum(tree.maximum - channels.of(threshold), 0) / channels.of(unit)
    step = minimise_at_bits(channels, targets['bits'].astype(dtype), threshold / unit, left, reach)
    if measure is not None:
      measured = measure(threshold / unit, step)
  return _describe(tree, channels, unit, threshold, step * unit, measured)


def _channels(tree: JoinedStatistics, block: int) -> tuple[Channels, Float[Array, 'leaves']]:
  """The problem in dimensionless form, and the unit of length t_i of every leaf."""
  largest = tree.largest()
  is_alive = largest > 0
  safe = jnp.where(is_alive, largest, 1)
  total = functools.partial(
    jax.ops.segment_sum,
    segment_ids=tree.leaf,
    num_segments=tree.leaves,
    indices_are_sorted=True,
  )
  # tau / max lies in [0, 1]: no square of it overflows or, where it counts, underflows
  scale = tree.scale / safe[tree.leaf]
  share = total(tree.share)
  spread = jnp.where(is_alive, jnp.sqrt(total(tree.share * scale * scale) / share), 1)
  unit = safe * spread
  min_step = safe / MAX_LEVELS
  if tree.histogram is not None:
    ends = jnp.where(is_alive, tree.ends, 1)
    min_step = jax.vmap(histogram_min_step, in_axes=(0, 0, None))(tree.histogram, ends, MAX_LEVELS)
  # rounding to a narrow dtype moves a value by at most an eighth of a step: it stays in its cell
  min_step = jnp.maximum(min_step, safe * (8 * tree.rounding))
  price = None
  if tree.power is not None:
    # share * unit^2 is the energy S_i, up to a constant; of units in the largest of them, whose
    # logarithm would cost digits
    tiny = jnp.finfo(unit.dtype).tiny
    ratio = unit / jnp.maximum(jnp.max(jnp.where(is_alive, unit, 0)), tiny)
    energy = jnp.log(share) + 2 * jnp.log(jnp.maximum(ratio, tiny))
    log_price = tree.power * energy + jnp.log(tree.omegas)
    highest = jnp.max(jnp.where(is_alive, log_price, -jnp.inf))
    # a leaf of zeros has no unit; with this price it is solved as the others are, and as soon
    usual = _SHARE_OF_ZEROS * jnp.sum(is_alive, dtype=unit.dtype)
    price = jnp.where(is_alive, jnp.exp(log_price - highest), usual)
  channels = Channels(
    # a leaf of zeros takes no bits: it is solved as if its scales were 1 and its weights next to
    # none, and overruled in the end
    scale=jnp.where(is_alive[tree.leaf], scale / spread[tree.leaf], 1),
    share=jnp.where(
      is_alive[tree.leaf], tree.share, _SHARE_OF_ZEROS * tree.share / share[tree.leaf]
    ),
    leaf=tree.leaf,
    leaves=tree.leaves,
    price=price,
    min_step=jnp.where(is_alive, min_step / unit, 1e-3),
    block=block,
  )
  return channels, unit


def _measure(
  beyond: Int32[Array, 'leaves 2 edges'],
  ends: Float[Array, 'leaves'],
  sizes: Float[Array | np.ndarray, 'leaves'],
  channels: Channels,
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
) -> Measured:
  """What thresholds and steps in units of t_i truly cost, by the counts of `counts_beyond`."""
  shares = code_shares(beyond, ends, threshold, step)
  payload = payload_of_shares(*shares, sizes)
  bits = jnp.sum(channels.leaf_share() * payload)
  return Measured(bits, entropy_of_shares(*shares), payload)


def _describe(
  tree: JoinedStatistics,
  channels: Channels,
  unit: Float[Array, 'leaves'],
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
  measured: Measured | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Everything that is said of the leaves, given their thresholds and steps.

  Args:
    measured: what `_measure` says of them, where there are histograms.
  """
  largest = tree.largest()
  is_alive = largest > 0
  threshold = jnp.where(is_alive, threshold, 0)
  step = jnp.where(is_alive, step, 1)
  share = channels.leaf_share()
  # a reach that is a whole number of steps up to rounding needs no cell more
  cells = jnp.ceil(jnp.maximum(largest - threshold, 0) / step * (1 - 1e-5))
  levels = jnp.minimum(cells, MAX_LEVELS)
  inner = threshold / unit, step / unit
  if tree.histogram is not None:
    assert measured is not None
    entropy, payload = measured.entropy, measured.payload
    moments = jax.vmap(histogram_moments)(tree.histogram, tree.ends / unit, *inner, levels)
    energy, offset, error, sparsity = moments
    error = error / jnp.maximum(energy, jnp.finfo(error.dtype).tiny)
    fit = energy / 2
  else:
    at, width = channels.of(inner[0]), channels.of(inner[1])
    left = channels.share * (1 - laplace.pruned_fraction(at, channels.scale))
    offset = channels.sum(left * laplace.survivor_offset(width, channels.scale))
    offset = offset / jnp.maximum(channels.sum(left), jnp.finfo(left.dtype).tiny)
    kept = channels.share * laplace.retained_energy(at, width, channels.scale)
    error = 1 - channels.sum(kept) / (2 * share)
    entropy = channels.sum(channels.share * laplace.entropy(at, width, channels.scale)) / share
    payload = entropy
    sparsity = 1 - channels.sum(left) / share
    fit = jnp.full_like(error, jnp.nan)
  # deeper inside its cell than rounding to a narrow dtype moves a value, so that it stays there
  margin = step / 64 + 1.1 * tree.rounding * largest
  reach = jnp.maximum(tree.maximum - channels.of(threshold), 0) / channels.of(step)
  per_leaf = {
    'threshold': threshold,
    'sparsity': jnp.where(is_alive, sparsity, 1),
    'step': step,
    'offset': jnp.clip(offset * unit, margin, step - margin),
    'levels': levels,
    'error': jnp.where(is_alive, error, 0),
    'entropy': jnp.where(is_alive, entropy, 0),
    'payload': jnp.where(is_alive, payload, 0),
    'laplace_fit': jnp.where(is_alive, fit, 1),
  }
  per_leaf = {name: value.astype(jnp.float32) for name, value in per_leaf.items()}
  per_leaf['levels'] = levels.astype(jnp.int32)
  per_channel = {
    'scale': tree.scale.astype(jnp.float32),
    'bits': (1 + jnp.log2(jnp.clip(reach, 1, MAX_LEVELS))).astype(jnp.float32),
  }
  return per_leaf, per_channel
