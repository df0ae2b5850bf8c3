"""Thresholds, steps and levels of all leaves from their joined statistics.

A program is compiled for the sizes of `JoinedStatistics` and the kind of targets alone, so networks
of about the same size share it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.allocation.channels import Channels
from opq_jax.allocation.choices import EXACT, ON_GRID, ON_LATTICE, PRUNED
from opq_jax.allocation.description import Grid, describe
from opq_jax.allocation.fixed_width import minimise_at_bits
from opq_jax.allocation.joined_statistics import JoinedStatistics
from opq_jax.allocation.laplace_rate import minimise_at_rate
from opq_jax.allocation.ranks import interpolated_at_rank
from opq_jax.allocation.rate_problem import RateProblem
from opq_jax.allocation.rate_search import minimise_at_bits_per_weight
from opq_jax.allocation.second_look import Counted
from opq_jax.allocation.sparsity import predict_survivors, pruned_ranks
from opq_jax.allocation.targets import BitsPerWeight, SparsityAndBits, Targets
from opq_jax.allocation.units import binary_unit, channels_of, rate_problem_of
from opq_jax.core.limits import MAX_LEVELS


class _Problem(NamedTuple):
  """All forms of one problem.

  Attributes:
    tree: the statistics, in the units of the weights.
    channels: the same in dimensionless form.
    unit: t_i, the unit of length of `channels`.
    rate: the histograms in binary units; None where only closed forms are asked for.
  """

  tree: JoinedStatistics
  channels: Channels
  unit: Float[Array, 'leaves']
  rate: RateProblem | None


@functools.partial(jax.jit, static_argnames='block')
def solve(
  tree: JoinedStatistics, targets: Targets, counted: Counted | None, block: int
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the fields of all `LeafAllocation`s, one dictionary per leaf and one per channel.

  Args:
    tree: all leaves; with histograms the answer is corrected by them.
    targets: the problem.
    counted: exact thresholds and survivors, where the weights were read again.
    block: of the layout.
  """
  channels, unit = channels_of(tree, block)
  palette = targets.palette_levels if isinstance(targets, BitsPerWeight) else None
  rate = None if tree.histogram is None else rate_problem_of(tree, channels, unit, palette)
  problem = _Problem(tree, channels, unit, rate)
  if isinstance(targets, BitsPerWeight):
    grid = _grid_at_rate(problem, targets)
  else:
    grid = _grid_at_bits(problem, targets, counted)
  return describe(tree, channels, unit, grid, rate)


def _grid_at_rate(problem: _Problem, targets: BitsPerWeight) -> Grid:
  """Solves the joint target, by the histograms where there are any."""
  tree, channels, unit, rate = problem
  bits = targets.bits_per_weight.astype(tree.scale.dtype)
  if rate is None:
    threshold, step = (x * unit for x in minimise_at_rate(channels, bits))
    return _full_grid(tree, threshold, step)
  # a power of two near t_i: lengths divided by it stay in the bins of the histogram
  own, choices = binary_unit(unit), minimise_at_bits_per_weight(rate, bits)
  grid = Grid(choices.threshold * own, choices.step * own, choices.levels, choices.choice)
  return _of_choice(grid, tree, own)


def _grid_at_bits(problem: _Problem, targets: SparsityAndBits, counted: Counted | None) -> Grid:
  """Solves the two targets of the paper, one after the other."""
  tree, channels, unit, rate = problem
  dtype = tree.scale.dtype
  if counted is not None:
    threshold, left = counted.threshold.astype(dtype), counted.survivors
  else:
    threshold, left = predict_survivors(channels, targets.sparsity.astype(dtype))
    threshold = threshold * unit
    if tree.histogram is not None:
      rank = pruned_ranks(channels, left, tree.sizes)
      ends = tree.ends.astype(jnp.float32)
      threshold = interpolated_at_rank(tree.histogram, ends, rank).astype(dtype)
  reach = jnp.maximum(tree.maximum - channels.of(threshold), 0) / channels.of(unit)
  escape_bits = None
  if rate is not None:
    escape_bits = functools.partial(_escape_bits, problem, rate, threshold)
  bits = targets.bits.astype(dtype)
  step = minimise_at_bits(channels, bits, threshold / unit, left, reach, escape_bits) * unit
  return _full_grid(tree, threshold, step)


def _full_grid(
  tree: JoinedStatistics, threshold: Float[Array, 'leaves'], step: Float[Array, 'leaves']
) -> Grid:
  """Returns the grid whose levels reach the largest weight, or are 127."""
  # a reach that is a whole number of steps up to rounding needs no cell more
  cells = jnp.ceil(jnp.maximum(tree.largest() - threshold, 0) / step * (1 - 1e-5))
  levels = jnp.minimum(cells, MAX_LEVELS)
  return Grid(threshold, step, levels, jnp.full_like(step, ON_GRID))


def _of_choice(grid: Grid, tree: JoinedStatistics, own: Float[Array, 'leaves']) -> Grid:
  """Returns the grid of each choice: all pruned, all exact and a lattice are grids too."""
  zero, choice = jnp.zeros_like(grid.step), grid.choice

  # exact: threshold 0 and no levels, so every weight but 0 escapes; pruned: no weight is beyond the
  # largest.  Their steps are never used, but must be positive
  def of(on_grid: Array, pruned: Array, lattice: Array | float, exact: Array) -> Array:
    return jnp.select(
      [choice == PRUNED, choice == ON_LATTICE, choice == EXACT], [pruned, lattice, exact], on_grid
    )

  return Grid(
    of(grid.threshold, tree.ends, tree.lattices.threshold, zero),
    of(grid.step, own, tree.lattices.step, own),
    of(grid.levels, zero, tree.lattices.levels, zero),
    choice,
  )


def _escape_bits(
  problem: _Problem,
  rate: RateProblem,
  threshold: Float[Array, 'leaves'],
  step: Float[Array, 'leaves grid'],
) -> Float[Array, 'leaves grid']:
  """Returns bits, per weight of the tree, of the values beyond 127 cells of `step` units."""
  tree, channels, unit, _ = problem
  end = threshold[:, None] + MAX_LEVELS * step * unit[:, None]
  tail = rate.sums.at(end / binary_unit(unit)[:, None])
  beyond = (tail.positive + tail.negative) * channels.leaf_share()[:, None]
  # interpolation within the last bin would leave some beyond its largest weight
  beyond = jnp.where(end >= tree.largest()[:, None], 0, beyond)
  return beyond * tree.value_bits[:, None]
