"""Grids of few levels, for runtimes that keep indices of a fixed width in memory.

A palette of b bits has 0 and 2^(b-1) - 1 levels a sign, and no weight escapes: those beyond the
last cell take its level, and their error is part of the leaf's.  As without palettes a grid
minimises D + mu R; with nothing but palettes asked for, mu is next to 0, and it minimises D.

Where the levels are bounded, the tail beyond the threshold is no exponential that goes on for ever,
and the closed form of the step (`opq_jax.allocation.exponential_tails`) does not hold: a finer step
makes smaller errors in the cells and larger ones beyond them.  So steps and thresholds are
compared, on a grid of both that is refined twice.  The edge between the codes 0 and 1, where both
cost the same, still obeys

    beta^2  =  delta^2 + mu (log2 p_0 - log2 p_1)

with delta the mean offset of all survivors from the inner edges of their cells, those beyond the
last cell among them.  The first grid of thresholds lies around it: all edges move with the
threshold, so it is near the best one only.  (Our derivation.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.allocation import laplace
from opq_jax.allocation.code_bits import payload_bits
from opq_jax.allocation.exponential_tails import Grid, Levels, best_grid, odds_of, rounded_step
from opq_jax.allocation.histogram_sums import Sums
from opq_jax.allocation.rate_problem import Edges, RateProblem, edges_of, shares_of
from opq_jax.core.limits import GRID_MARGIN

_STEPS, _RATIOS = 17, 9  # compared at a time
_GRIDS = 3  # of them, each between the neighbours of the best point of the last
_REACH = 1.4  # of the logarithm of a threshold around the one that suits a step: a factor of four
_ROUNDS = 6  # of threshold and offset
_LEAST_STEP = 0.25  # of the mean |w| over the levels: cells of a finer step hold few of the weights


class _Region(NamedTuple):
  """Where the next grid of steps and thresholds lies.

  Attributes:
    log_step, steps: its middle, and half its width.
    log_ratio, ratios: the same of the thresholds, over those that suit the steps.
  """

  log_step: Float[Array, 'leaves']
  steps: Float[Array, 'leaves']
  log_ratio: Float[Array, 'leaves']
  ratios: Float[Array, 'leaves']


class _Offset(NamedTuple):
  """The levels that suit cells best.

  Attributes:
    share: of the survivors.
    offset: of the levels from the inner edges of their cells.
    error: squared error of the survivors, per weight of the leaf.
  """

  share: Float[Array, 'leaves']
  offset: Float[Array, 'leaves']
  error: Float[Array, 'leaves']


def best_palette(problem: RateProblem, log_mu: Float[Array, 'leaves']) -> Grid:
  """Returns the grids of at most `problem.palette_levels` levels that nearly minimise D + mu R.

  Args:
    problem: the leaves.
    log_mu: log mu of every leaf at D = 0, as in `best_grid`.
  """
  sums, most = problem.sums, float(problem.palette_levels or 0)
  free = best_grid(problem, log_mu)
  price = jnp.exp(free.log_price)
  tiny = jnp.finfo(price.dtype).tiny
  # coarser steps than the largest weight have none in their second cell
  mean = sums.columns[:, 0, 2] / jnp.maximum(sums.nonzero(), tiny)
  high = jnp.log(jnp.maximum(jnp.maximum(sums.largest, free.step), tiny))
  low = jnp.minimum(jnp.log(jnp.maximum(free.step, _LEAST_STEP * mean / most)), high)
  low = jnp.where(sums.largest > 0, low, high)
  steps = jnp.linspace(-1, 1, _STEPS, dtype=price.dtype)[:, None]
  ratios = jnp.linspace(-1, 1, _RATIOS, dtype=price.dtype)[:, None]
  start = _Region(
    (low + high) / 2, (high - low) / 2, jnp.zeros_like(low), jnp.full_like(low, _REACH)
  )

  def threshold_of(suited: Array, log_ratio: Array) -> Array:
    return jnp.minimum(suited * jnp.exp(log_ratio), sums.largest)

  def of_best(values: Array, place: Array) -> Array:
    return jnp.take_along_axis(values, place, axis=0)[0]

  def refine(_: Array, region: _Region) -> _Region:
    def at_step(log_step: Array) -> tuple[Array, Array]:
      """Returns the least cost with a step, and the ratio that has it."""
      step = rounded_step(jnp.exp(log_step))
      suited = _threshold(problem, free.threshold, step, price)

      def cost_of(log_ratio: Array) -> Array:
        grid = Grid(threshold_of(suited, log_ratio), step, free.log_price)
        found = palette_levels(problem, grid)
        return found.error + price * found.bits

      tried = region.log_ratio[None] + region.ratios[None] * ratios
      costs = jax.lax.map(cost_of, tried)
      best = jnp.argmin(costs, axis=0)[None]
      return of_best(costs, best), of_best(tried, best)

    tried = region.log_step[None] + region.steps[None] * steps
    costs, of_steps = jax.lax.map(at_step, tried)
    best = jnp.argmin(costs, axis=0)[None]
    # the next grid reaches the neighbours of the best point
    return _Region(
      log_step=of_best(tried, best),
      steps=2 * region.steps / (_STEPS - 1),
      log_ratio=of_best(of_steps, best),
      ratios=2 * region.ratios / (_RATIOS - 1),
    )

  found = jax.lax.fori_loop(0, _GRIDS, refine, start)
  step = rounded_step(jnp.exp(found.log_step))
  suited = _threshold(problem, free.threshold, step, price)
  threshold = threshold_of(suited, found.log_ratio)
  # where the levels are no bound the closed form stands, which moves smoothly with the price
  fits = sums.largest - free.threshold <= most * free.step
  return Grid(
    jnp.where(fits, free.threshold, threshold), jnp.where(fits, free.step, step), free.log_price
  )


def _threshold(
  problem: RateProblem,
  start: Float[Array, 'leaves'],
  step: Float[Array, 'leaves'],
  price: Float[Array, 'leaves'],
) -> Float[Array, 'leaves']:
  """Returns the threshold between 0 and the first level that suits a step."""
  sums, cells = problem.sums, problem.palette_levels or 0
  least = sums.largest * 2.0**-33  # below every magnitude that a histogram tells from zero

  def improve(_: Array, threshold: Array) -> Array:
    edges = edges_of(sums, threshold, step, _levels(problem, threshold, step), cells)
    found = _offset(sums, edges, step)
    first = edges.tail.positive + edges.tail.negative
    odds = odds_of(found.share, (first[:, 0] - first[:, 1]) / 2)
    square = found.offset * found.offset + price * odds
    wanted = jnp.sqrt(jnp.maximum(square, least * least))
    # the geometric mean of old and new damps the iteration
    return jnp.clip(jnp.sqrt(threshold * wanted), least, sums.largest)

  # half a step suits a grid whose bits cost nothing
  start = jnp.clip(jnp.maximum(start, step / 4), least, sums.largest)
  return jax.lax.fori_loop(0, _ROUNDS, improve, start)


def _levels(
  problem: RateProblem, threshold: Float[Array, 'leaves'], step: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """Returns how many levels of a grid are used: all, or as many as reach the largest weight."""
  # a reach of a whole number of steps up to rounding needs no level more
  reach = jnp.maximum(problem.sums.largest - threshold, 0) / step * (1 - 1e-5)
  return jnp.minimum(jnp.ceil(reach), float(problem.palette_levels or 0))


def palette_levels(problem: RateProblem, grid: Grid) -> Levels:
  """Returns levels, bits and squared error of a grid whose last level takes all beyond it."""
  sums, cells = problem.sums, problem.palette_levels or 0
  levels = _levels(problem, grid.threshold, grid.step)
  edges = edges_of(sums, grid.threshold, grid.step, levels, cells)
  shares = shares_of(edges.tail)
  none = jnp.zeros_like(levels)
  bits = payload_bits(shares.pruned, shares.cells, shares.escaped, problem.sizes, none)
  bits = jnp.take_along_axis(bits, levels.astype(jnp.int32)[:, None], axis=1)[:, 0]
  return Levels(levels, bits, shares.pruning_error + _offset(sums, edges, grid.step).error)


def _offset(sums: Sums, edges: Edges, step: Float[Array, 'leaves']) -> _Offset:
  """Returns the best common offset of all levels, and the error with it."""
  inner, tail = edges.magnitude[:, :-1], edges.tail
  beyond = tail.positive + tail.negative
  count = beyond[:, :-1] - beyond[:, 1:]
  first = tail.magnitude[:, :-1] - tail.magnitude[:, 1:]
  second = tail.squares[:, 1:] - tail.squares[:, :-1]
  # moments of the excess over the inner edges of the weights' cells
  share = jnp.sum(count, axis=1)
  rest = jnp.sum(first - inner * count, axis=1)
  square = jnp.sum(second - 2 * inner * first + inner * inner * count, axis=1)
  mean = rest / jnp.where(share > 0, share, 1)
  # a level stays inside its cell, whatever lies beyond the last one
  offset = jnp.clip(mean, step * GRID_MARGIN, step - step * GRID_MARGIN)
  found = square - 2 * offset * rest + offset * offset * share
  # a small error is lost in the rounding of these sums; but it belongs to a fine grid, of whose
  # cells the closed form is exact
  fine = share * laplace.survivor_error(step, jnp.maximum(mean, step * GRID_MARGIN))
  return _Offset(share, offset, jnp.where(found > 1e-5 * sums.energy(), found, fine))
