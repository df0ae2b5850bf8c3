"""Fields of a `LeafAllocation`, predicted from a leaf's grid."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from opq_jax.allocation import laplace
from opq_jax.allocation.bins import BINS
from opq_jax.allocation.channels import Channels
from opq_jax.allocation.choices import ON_GRID, ON_LATTICE
from opq_jax.allocation.joined_statistics import JoinedStatistics
from opq_jax.allocation.rate_problem import RateProblem, entropy_of, payload_of
from opq_jax.allocation.units import binary_unit
from opq_jax.core.limits import GRID_MARGIN, MAX_LEVELS


class Grid(NamedTuple):
  """Grids of all leaves, in the units of the weights.

  Attributes:
    threshold, step, levels: as in `LeafAllocation`.
    choice: of `opq_jax.allocation.choices`.
  """

  threshold: Float[Array, 'leaves']
  step: Float[Array, 'leaves']
  levels: Float[Array, 'leaves']
  choice: Float[Array, 'leaves'] | Int32[Array, 'leaves']


class Moments(NamedTuple):
  """Moments of one leaf's histogram on a grid.

  Attributes:
    energy: E[w^2].
    offset: mean of |w| - threshold - (k - 1) step over the weights in cells, k their cell; 0 where
      no weight is.
    error: mean squared error with that offset.
    sparsity: share of pruned weights.
  """

  energy: Float[Array, '']
  offset: Float[Array, '']
  error: Float[Array, '']
  sparsity: Float[Array, '']


class _Prediction(NamedTuple):
  """Fields that the histogram or the Laplace density predicts, as in `LeafAllocation`."""

  sparsity: Float[Array, 'leaves']
  offset: Float[Array, 'leaves']
  escaped: Float[Array, 'leaves']
  clipped: Float[Array, 'leaves']
  error: Float[Array, 'leaves']
  entropy: Float[Array, 'leaves']
  payload: Float[Array, 'leaves']
  laplace_fit: Float[Array, 'leaves']


def describe(
  tree: JoinedStatistics,
  channels: Channels,
  unit: Float[Array, 'leaves'],
  grid: Grid,
  problem: RateProblem | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the fields of all `LeafAllocation`s, one dictionary per leaf and one per channel.

  Args:
    tree, channels, unit: all leaves, in the units of the weights and dimensionless.
    grid: the solution.
    problem: the histograms; None predicts from the Laplace density.
  """
  is_alive = tree.largest() > 0
  threshold = jnp.where(is_alive, grid.threshold, 0)
  step = jnp.where(is_alive, grid.step, 1)
  levels = jnp.where(is_alive, grid.levels, 0)
  grid = Grid(threshold, step, levels, grid.choice)
  if problem is None:
    predicted = _from_density(tree, channels, unit, grid)
  else:
    predicted = _from_histogram(tree, unit, grid, problem)
  reach = jnp.maximum(tree.maximum - channels.of(threshold), 0) / channels.of(step)
  offset = jnp.clip(predicted.offset, step * GRID_MARGIN, step - step * GRID_MARGIN)
  if problem is not None:
    first = tree.lattices.first - tree.lattices.threshold
    offset = jnp.where(grid.choice == ON_LATTICE, first, offset)
  per_leaf = {
    'threshold': threshold,
    'sparsity': jnp.where(is_alive, predicted.sparsity, 1),
    'step': step,
    'offset': offset,
    'levels': levels,
    'escaped': jnp.where(is_alive, predicted.escaped, 0),
    'clipped': jnp.where(is_alive, predicted.clipped, 0),
    'error': jnp.where(is_alive, predicted.error, 0),
    'entropy': jnp.where(is_alive, predicted.entropy, 0),
    'payload': jnp.where(is_alive, predicted.payload, 0),
    'laplace_fit': jnp.where(is_alive, predicted.laplace_fit, 1),
  }
  per_leaf = {name: value.astype(jnp.float32) for name, value in per_leaf.items()}
  per_leaf['levels'] = levels.astype(jnp.int32)
  most = MAX_LEVELS if problem is None or problem.palette_levels is None else levels
  most = jnp.maximum(channels.of(jnp.broadcast_to(jnp.asarray(most, step.dtype), step.shape)), 1)
  per_channel = {
    'scale': tree.scale.astype(jnp.float32),
    'bits': (1 + jnp.log2(jnp.clip(reach, 1, most))).astype(jnp.float32),
  }
  return per_leaf, per_channel


def _from_histogram(
  tree: JoinedStatistics, unit: Float[Array, 'leaves'], grid: Grid, problem: RateProblem
) -> _Prediction:
  """Predicts from the true histograms, in binary units."""
  assert tree.histogram is not None
  own = binary_unit(unit)
  threshold, step, levels = grid.threshold / own, grid.step / own, grid.levels
  centre, _ = problem.sums.centres()
  has_palettes = problem.palette_levels is not None
  moments = jax.vmap(functools.partial(histogram_moments, takes_all=has_palettes))(
    tree.histogram, centre, threshold, step, levels, tree.mantissa
  )
  energy = jnp.maximum(moments.energy, jnp.finfo(moments.error.dtype).tiny)
  entropy, escaped = entropy_of(
    problem.sums, threshold, step, levels, tree.value_bits, has_palettes
  )
  payload = payload_of(problem, threshold, step, levels)
  clipped = jnp.zeros_like(escaped)
  if has_palettes:
    tail = problem.sums.at(threshold + levels * step)
    clipped = jnp.where(grid.choice == ON_GRID, tail.positive + tail.negative, clipped)
  on_lattice = grid.choice == ON_LATTICE
  return _Prediction(
    sparsity=moments.sparsity,
    offset=moments.offset * own,
    escaped=escaped,
    clipped=clipped,
    error=jnp.where(on_lattice, problem.lattice_error / energy, moments.error / energy),
    entropy=entropy,
    payload=jnp.where(on_lattice, tree.lattices.bits, payload),
    laplace_fit=moments.energy * jnp.square(own / unit) / 2,
  )


def _from_density(
  tree: JoinedStatistics, channels: Channels, unit: Float[Array, 'leaves'], grid: Grid
) -> _Prediction:
  """Predicts from the Laplace density, in dimensionless units."""
  share = channels.leaf_share()
  threshold, step = channels.of(grid.threshold / unit), channels.of(grid.step / unit)
  left = channels.share * (1 - laplace.pruned_fraction(threshold, channels.scale))
  offset = channels.sum(left * laplace.survivor_offset(step, channels.scale))
  offset = offset / jnp.maximum(channels.sum(left), jnp.finfo(left.dtype).tiny) * unit
  kept = channels.share * laplace.retained_energy(threshold, step, channels.scale)
  error = 1 - channels.sum(kept) / (2 * share)
  entropy = channels.sum(channels.share * laplace.entropy(threshold, step, channels.scale)) / share
  end = threshold + channels.of(grid.levels) * step
  escaped = channels.share * (1 - laplace.pruned_fraction(end, channels.scale))
  # the density has no largest weight, but the leaf has
  reaches = grid.threshold + grid.levels * grid.step * (1 + 1e-4) >= tree.largest()
  return _Prediction(
    sparsity=1 - channels.sum(left) / share,
    offset=offset,
    escaped=jnp.where(reaches, 0, channels.sum(escaped) / share),
    clipped=jnp.zeros_like(error),
    error=error,
    entropy=entropy,
    payload=entropy,
    laplace_fit=jnp.full_like(error, jnp.nan),
  )


def histogram_moments(
  histogram: Int32[Array, '2 bins'],
  centre: Float[Array, ' bins'],
  threshold: Float[Array, ''],
  step: Float[Array, ''],
  levels: Float[Array, ''],
  mantissa: Float[Array, ''],
  takes_all: bool = False,
) -> Moments:
  """Returns the moments of one leaf on a grid.

  Args:
    histogram: counts by sign and magnitude.
    centre: |w| that stands for each bin.
    threshold: inner edge of the first cell.
    step: width of the cells.
    levels: cells a sign; weights beyond the last one escape.
    mantissa: bits of the mantissa of the leaf's dtype, to which a value is rounded in its cell.
    takes_all: whether the last cell takes the weights beyond it, and none escape.
  """
  counts = jnp.sum(histogram, axis=0).astype(centre.dtype)
  cells = (centre - threshold) / step
  place = jnp.minimum(jnp.floor(cells), jnp.maximum(levels - 1, 0))
  rest = centre - threshold - step * place
  is_pruned = (centre <= threshold) | (jnp.arange(BINS) == 0)
  # the largest weight may lie on the edge of the last cell: 2^-10 of a step is rounding
  is_escaped = False if takes_all else cells >= levels + 2.0**-10
  on_grid = jnp.where(is_pruned | is_escaped, 0, counts)
  pruned = jnp.where(is_pruned, counts, 0)
  squares, lost = (x * centre * centre for x in (counts, pruned))
  # one sum of six rows has fewer kernels to compile than six sums
  rows = jnp.stack([counts, squares, pruned, lost, on_grid, on_grid * rest])
  total, energy, pruned, lost, survivors, rests = jnp.sum(rows, axis=1)
  total = jnp.maximum(total, 1)
  offset = rests / jnp.maximum(survivors, 1)
  # the stored value is rounded to the dtype, and moved by one unit in the last place back into its
  # cell where rounding has left it (`opq_jax.compression.codes`)
  unit = jnp.ldexp(jnp.ones_like(centre), jnp.frexp(centre)[1] - 1 - mantissa.astype(jnp.int32))
  edge, value = centre - rest, centre - rest + offset
  value = jnp.round(value / unit) * unit
  value = jnp.where(
    value < edge, value + unit, jnp.where(value >= edge + step, value - unit, value)
  )
  error = lost + jnp.sum(on_grid * jnp.square(centre - value))
  return Moments(energy / total, offset, error / total, pruned / total)
