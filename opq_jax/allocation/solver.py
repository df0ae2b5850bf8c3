"""Thresholds and steps of all leaves, and what is said of them, from their joined statistics.

What is jitted here is compiled for the sizes of `JoinedStatistics` and the kind of target alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation import laplace
from opq_jax.allocation.fixed_width import minimise_at_bits
from opq_jax.allocation.histograms import (
  bins_at_rank,
  histogram_moments,
  interpolated_at_rank,
  magnitudes_at_rank,
  sums_of,
)
from opq_jax.allocation.joined_statistics import JoinedStatistics
from opq_jax.allocation.optimization import Channels, minimise_at_rate, minimise_at_sparsity
from opq_jax.allocation.rate_search import (
  EXACT,
  ON_GRID,
  ON_LATTICE,
  PRUNED,
  Leaves,
  entropy_of,
  minimise_at_bits_per_weight,
  payload_of,
)
from opq_jax.core.limits import MAX_LEVELS

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
  leaves = None if tree.histogram is None else _leaves(tree, channels, unit)
  if 'bits_per_weight' in targets:
    bits = targets['bits_per_weight'].astype(dtype)
    if leaves is None:
      threshold, step = (x * unit for x in minimise_at_rate(channels, bits))
      grid = _Grid(threshold, step, _cells(tree, threshold, step), jnp.full_like(step, ON_GRID))
    else:
      own, found = _own_unit(unit), minimise_at_bits_per_weight(leaves, bits)
      grid = _Grid(found.threshold * own, found.step * own, found.levels, found.choice)
      grid = _of_choice(grid, tree, own)
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
    escape_bits = None
    if leaves is not None:
      escape_bits = functools.partial(_escape_bits, tree, channels, unit, threshold, leaves)
    bits = targets['bits'].astype(dtype)
    step = minimise_at_bits(channels, bits, threshold / unit, left, reach, escape_bits) * unit
    grid = _Grid(threshold, step, _cells(tree, threshold, step), jnp.full_like(step, ON_GRID))
  return _describe(tree, channels, unit, grid, leaves)


class _Grid(NamedTuple):
  """What every leaf does (`opq_jax.allocation.rate_search`), in the units of the weights."""

  threshold: Float[Array, 'leaves']
  step: Float[Array, 'leaves']
  levels: Float[Array, 'leaves']
  choice: Float[Array, 'leaves'] | Int32[Array, 'leaves']


def _of_choice(grid: _Grid, tree: JoinedStatistics, own: Float[Array, 'leaves']) -> _Grid:
  """The grid of each choice: all pruned, all exact, and a lattice are grids too."""
  zero, choice = jnp.zeros_like(grid.step), grid.choice
  of = lambda on_grid, pruned, lattice, exact: jnp.select(
    [choice == PRUNED, choice == ON_LATTICE, choice == EXACT], [pruned, lattice, exact], on_grid
  )
  return _Grid(
    of(grid.threshold, tree.ends, tree.lattices.threshold, zero),
    of(grid.step, own, tree.lattices.step, own),
    of(grid.levels, zero, tree.lattices.levels, zero),
    choice,
  )


def _own_unit(unit: Float[Array, 'leaves']) -> Float[Array, 'leaves']:
  """A power of two, so that the bins of a histogram stay what they are."""
  return jnp.ldexp(jnp.ones_like(unit), jnp.frexp(unit)[1])


def _leaves(tree: JoinedStatistics, channels: Channels, unit: Float[Array, 'leaves']) -> Leaves:
  """The problem of `opq_jax.allocation.rate_search`."""
  own = _own_unit(unit)
  assert tree.histogram is not None
  sums = sums_of(tree.histogram, tree.ends / own, tree.numbers / own[:, None], tree.mantissa <= 7)
  if tree.power is None:
    tiny = jnp.finfo(unit.dtype).tiny
    log_mu = jnp.log(jnp.asarray(tree.sizes)) + jnp.log(jnp.maximum(sums.energy(), tiny))
  else:
    # mu = lambda / F', F = omega S^(power - 1) D, and S = 2 n t^2
    energy = jnp.log(2 * jnp.asarray(tree.sizes)) + 2 * jnp.log(unit)
    log_mu = (1 - jnp.asarray(tree.power)) * energy - jnp.log(tree.omegas) - 2 * jnp.log(own)
  is_linear = tree.power is not None
  bits = jnp.where(tree.lattices.levels > 0, tree.lattices.bits, jnp.inf)
  return Leaves(
    sums,
    jnp.asarray(tree.sizes),
    channels.leaf_share(),
    tree.mantissa,
    log_mu,
    is_linear,
    bits,
    tree.lattices.error * jnp.square(sums.largest),
  )


def _cells(
  tree: JoinedStatistics, threshold: Float[Array, 'leaves'], step: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """How many cells a sign there are up to the largest weight, 127 at most."""
  # a reach that is a whole number of steps up to rounding needs no cell more
  cells = jnp.ceil(jnp.maximum(tree.largest() - threshold, 0) / step * (1 - 1e-5))
  return jnp.minimum(cells, MAX_LEVELS)


def _escape_bits(
  tree: JoinedStatistics,
  channels: Channels,
  unit: Float[Array, 'leaves'],
  threshold: Float[Array, 'leaves'],
  leaves: Leaves,
  step: Float[Array, 'leaves grid'],
) -> Float[Array, 'leaves grid']:
  """Bits, per weight of all, of the values of what lies beyond 127 cells of `step` units."""
  end = threshold[:, None] + MAX_LEVELS * step * unit[:, None]
  positive, negative, *_ = leaves.sums.at(end / _own_unit(unit)[:, None])
  beyond = (positive + negative) * channels.leaf_share()[:, None]
  beyond = jnp.where(end >= tree.largest()[:, None], 0, beyond)
  return beyond * tree.value_bits[:, None]


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
    min_step=jnp.where(is_alive, safe / MAX_LEVELS / unit, 1e-3),
    block=block,
  )
  return channels, unit


def _describe(
  tree: JoinedStatistics,
  channels: Channels,
  unit: Float[Array, 'leaves'],
  grid: _Grid,
  leaves: Leaves | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Everything that is said of the leaves, given what they do."""
  is_alive = tree.largest() > 0
  threshold = jnp.where(is_alive, grid.threshold, 0)
  step = jnp.where(is_alive, grid.step, 1)
  levels = jnp.where(is_alive, grid.levels, 0)
  share = channels.leaf_share()
  at, width = threshold / unit, step / unit
  if leaves is not None:
    assert tree.histogram is not None
    own = _own_unit(unit)
    at, width = threshold / own, step / own
    centre, _ = leaves.sums.centres()
    moments = jax.vmap(histogram_moments)(tree.histogram, centre, at, width, levels, tree.mantissa)
    energy, offset, error, sparsity = moments
    error = error / jnp.maximum(energy, jnp.finfo(error.dtype).tiny)
    offset, fit = offset * own, energy * jnp.square(own / unit) / 2
    entropy, escaped = entropy_of(leaves.sums, at, width, levels, tree.value_bits)
    payload = payload_of(leaves, at, width, levels)
    on_lattice = grid.choice == ON_LATTICE
    of_lattice = leaves.lattice_error / jnp.maximum(energy, jnp.finfo(error.dtype).tiny)
    error = jnp.where(on_lattice, of_lattice, error)
    payload = jnp.where(on_lattice, tree.lattices.bits, payload)
  else:
    at, width = channels.of(at), channels.of(width)
    left = channels.share * (1 - laplace.pruned_fraction(at, channels.scale))
    offset = channels.sum(left * laplace.survivor_offset(width, channels.scale))
    offset = offset / jnp.maximum(channels.sum(left), jnp.finfo(left.dtype).tiny) * unit
    kept = channels.share * laplace.retained_energy(at, width, channels.scale)
    error = 1 - channels.sum(kept) / (2 * share)
    entropy = channels.sum(channels.share * laplace.entropy(at, width, channels.scale)) / share
    payload = entropy
    sparsity = 1 - channels.sum(left) / share
    fit = jnp.full_like(error, jnp.nan)
    end = at + channels.of(levels) * width
    escaped = channels.share * (1 - laplace.pruned_fraction(end, channels.scale))
    escaped = channels.sum(escaped) / share
    reaches = threshold + levels * step * (1 + 1e-4) >= tree.largest()
    escaped = jnp.where(reaches, 0, escaped)
  reach = jnp.maximum(tree.maximum - channels.of(threshold), 0) / channels.of(step)
  margin = step / 64
  offset = jnp.clip(offset, margin, step - margin)
  if leaves is not None:
    offset = jnp.where(on_lattice, tree.lattices.first - tree.lattices.threshold, offset)
  per_leaf = {
    'threshold': threshold,
    'sparsity': jnp.where(is_alive, sparsity, 1),
    'step': step,
    'offset': offset,
    'levels': levels,
    'escaped': jnp.where(is_alive, escaped, 0),
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
