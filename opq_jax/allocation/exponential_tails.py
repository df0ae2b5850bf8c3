"""Grids in closed form: threshold, step and levels of a leaf for a price of its bits.

A grid minimises D + mu R, squared error and bits per weight.  Whatever the density, its tail beyond
a threshold beta is nearly exponential, with the scale tau = E[|w| - beta; |w| > beta] of the
survivors.  For an exponential tail the best step Delta, and the edge between the codes 0 and 1,
where both cost the same, are (docs/method/allocation.md):

    mu      =  tau^2 ln 2 (d coth(d / 2) - 2),   d = Delta / tau
    beta^2  =  delta^2 + mu (log2 p_0 - log2 p_1)

with delta the offset of the centroid in its cell, and p_0 and p_1 the true shares of the weights
that are pruned and, of one sign, in the first cell.  A few rounds of the two converge.  (Our
derivation.)

Zeros do not count in tau, nor do weights beyond 127 cells.  On Laplace, Gaussian and Student-t
weights, half of them zeros or not, D + mu R is within .6 % of the least over all thresholds and
steps (`tests/allocation/test_rate_search.py`).  The grid suits a leaf least if all its weights are
far from zero: below 2 bits such a leaf may err more with more bits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.allocation import laplace
from opq_jax.allocation.code_bits import escaped_value_bits, payload_bits
from opq_jax.allocation.histogram_sums import Sums, Tail
from opq_jax.allocation.rate_problem import Edges, RateProblem, edges_of, shares_of
from opq_jax.core.limits import MAX_LEVELS, STEP_BITS

_LOG2 = math.log(2.0)
_ROUNDS = 9  # of threshold and step; they end within about 1 % of a minimum that is flat
_FAR = 60.0  # d = Delta / tau beyond which coth(d / 2) is 1 in every float
_FINE_STEP = math.sqrt(6 / _LOG2)  # Delta over sqrt(mu) as Delta / tau -> 0: mu = ln 2 Delta^2 / 6
_MAX_LOG_ODDS = 64.0  # bits: more than the odds of any two shares of a leaf of 2^31 weights
_LEAST = 2.0**-33  # of the largest |w|: below every magnitude that a histogram tells from zero


class Grid(NamedTuple):
  """Grids of all leaves.

  Attributes:
    threshold: beta.
    step: Delta.
    log_price: log mu, the price of a bit in squared error at the grid's own distortion.
  """

  threshold: Float[Array, 'leaves']
  step: Float[Array, 'leaves']
  log_price: Float[Array, 'leaves']


class _Tail(NamedTuple):
  """The weights beyond a threshold.

  Attributes:
    share: their share of the leaf.
    scale: mean excess |w| - threshold of the weights within 127 cells.
    pruning_error: squared error of the weights below the threshold, per weight of the leaf.
  """

  share: Float[Array, 'leaves']
  scale: Float[Array, 'leaves']
  pruning_error: Float[Array, 'leaves']


class Levels(NamedTuple):
  """Levels a sign, with the bits and the squared error per weight that they give."""

  levels: Float[Array, 'leaves']
  bits: Float[Array, 'leaves']
  error: Float[Array, 'leaves']


def best_grid(problem: RateProblem, log_mu: Float[Array, 'leaves']) -> Grid:
  """Returns the grids that nearly minimise D + mu R.

  Args:
    problem: the leaves.
    log_mu: log mu of every leaf at D = 0.  Where the objective is not linear in D, mu falls with D:
      mu = lambda / F'(D) = lambda (energy - D).
  """
  sums = problem.sums
  energy = sums.energy()
  least = _least(sums)

  def improve(_: Array, grid: Grid) -> Grid:
    threshold, step, log_price = grid
    tail = _tail(sums, threshold, step)
    price = jnp.exp(log_price)
    step = _best_step(price, tail.scale)
    offset = laplace.survivor_offset(step, tail.scale)
    beyond = sums.at(threshold + step)
    first = (tail.share - beyond.positive - beyond.negative) / 2
    square = offset * offset + price * odds_of(tail.share, first)
    wanted = jnp.sqrt(jnp.maximum(square, least * least))
    # the geometric mean of old and new damps the iteration
    threshold = jnp.clip(jnp.sqrt(threshold * wanted), least, sums.largest)
    if not problem.is_linear:
      error = tail.pruning_error + tail.share * laplace.survivor_error(step, tail.scale)
      kept = jnp.maximum(1 - error / jnp.where(energy > 0, energy, 1), 1e-6)
      log_price = (log_price + log_mu + jnp.log(kept)) / 2
    return Grid(threshold, step, log_price)

  step = _FINE_STEP * jnp.exp(log_mu / 2)
  start = Grid(jnp.clip(step / 2, least, sums.largest), step, log_mu)
  threshold, step, log_price = jax.lax.fori_loop(0, _ROUNDS, improve, start)
  step = _best_step(jnp.exp(log_price), _tail(sums, threshold, step).scale)
  return Grid(threshold, rounded_step(step), log_price)


def odds_of(
  survivors: Float[Array, 'leaves'], first: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """Returns log2 p_0 - log2 p_1.

  Args:
    survivors: 1 - p_0, the share of the weights beyond the threshold.
    first: p_1, the share of the first cell of one sign.
  """
  tiny = jnp.finfo(first.dtype).tiny
  odds = jnp.log2(jnp.maximum(1 - survivors, tiny) / jnp.maximum(first, tiny))
  # an empty share counts as `tiny`, and such odds mean nothing
  return jnp.clip(odds, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)


def rounded_step(step: Float[Array, 'leaves']) -> Float[Array, 'leaves']:
  """Rounds a step as `opq_jax.compression.records.exact_grid` will round it.

  Many equal weights may lie beside an edge, and must be counted on the side where they will be
  coded.
  """
  # the first bit of a mantissa is not stored
  return jax.lax.reduce_precision(step, jnp.finfo(step.dtype).nexp, STEP_BITS - 1)


def _least(sums: Sums) -> Array:
  """Returns a magnitude below every weight that a histogram tells from zero."""
  return sums.largest * _LEAST


def _tail(sums: Sums, threshold: Array, step: Array) -> _Tail:
  """Returns the tail beyond a threshold; escaped weights do not count in its scale."""
  ends = sums.at(jnp.stack([threshold, threshold + MAX_LEVELS * step], axis=1))
  return _tail_of(sums, threshold, ends)


def _tail_of(sums: Sums, threshold: Array, edges: Tail) -> _Tail:
  """Returns the tail beyond a threshold, given the sums at edges from it to 127 cells further."""
  tail, far = (Tail(*(column[:, k] for column in edges)) for k in (0, -1))
  left = tail.positive + tail.negative
  inside = left - far.positive - far.negative
  scale = (tail.magnitude - far.magnitude) / jnp.where(inside > 0, inside, 1) - threshold
  # a difference of sums: below 2^-9 of the threshold, a bin's width or so, it means nothing
  least = jnp.maximum(threshold * 2.0**-9, _least(sums))
  return _Tail(left, jnp.maximum(scale, least), tail.squares)


def _best_step(price: Array, scale: Array) -> Array:
  """Solves price = tau^2 ln 2 (d coth(d / 2) - 2) for Delta = d tau."""
  x = price / (scale * scale * _LOG2)
  # leading order of both limits, x = d^2 / 6 and x = d - 2; three Newton steps lead to 3e-5 of d
  d = jnp.sqrt(x * (x + 6))
  for _ in range(3):
    half = jnp.minimum(d, _FAR) / 2
    near, far = jnp.minimum(half, 1.0), jnp.maximum(half, 1.0)
    # d coth(d / 2) - 2 and its derivative, by the series where the formulas would cancel
    square = near * near
    series = square * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    slope = near * (2 / 3 - square * (4 / 45 - square * (4 / 315 - square * 8 / 4725)))
    value = 2 * jnp.where(half < 1, series, far / jnp.tanh(far) - 1)
    slope = jnp.where(half < 1, slope, 1 / jnp.tanh(far) - far / jnp.square(jnp.sinh(far)))
    value = jnp.where(d > _FAR, d - 2, value)
    d = jnp.maximum(d - (value - x) / jnp.maximum(slope, 1e-6), d / 4)
  return d * scale


def best_levels(problem: RateProblem, grid: Grid) -> Levels:
  """Returns the number of levels of each leaf that minimises D + mu R on its grid.

  Weights beyond the last level escape: no error, for the bits of their values.
  """
  sums, (threshold, step, log_price) = problem.sums, grid
  edges = edges_of(sums, threshold, step)
  shares = shares_of(edges.tail)
  scale = _tail_of(sums, threshold, edges.tail).scale
  # the bits of a value depend little on the edge: one estimate, in the upper half of the reach,
  # serves all numbers of levels, and the chosen one is corrected below
  upper = threshold + 0.6 * jnp.minimum(MAX_LEVELS * step, sums.largest - threshold)
  beyond = sums.at(upper)
  about = escaped_value_bits(sums, beyond.positive + beyond.negative, problem.mantissa)
  bits = payload_bits(shares.pruned, shares.cells, shares.escaped, problem.sizes, about)
  # levels beyond the largest weight would hold nothing; a reach of a whole number of steps up to
  # rounding needs no level more
  number = jnp.arange(MAX_LEVELS + 1, dtype=step.dtype)[None]
  needed = jnp.ceil(jnp.maximum(sums.largest - threshold, 0) / step * (1 - 1e-5))
  bits = jnp.where(number <= needed[:, None], bits, jnp.inf)
  error = shares.pruning_error[:, None] + _error_in_cells(sums, edges, step, scale)
  cost = error + jnp.exp(log_price)[:, None] * bits
  best = jnp.argmin(cost, axis=1)[:, None]
  of_best = lambda x: jnp.take_along_axis(x, best, axis=1)[:, 0]
  levels = best[:, 0].astype(threshold.dtype)
  escaped = of_best(shares.escaped)
  exact = escaped_value_bits(sums, escaped, problem.mantissa) - about
  return Levels(levels, of_best(bits) + escaped * exact, of_best(error))


def _error_in_cells(sums: Sums, edges: Edges, step: Array, scale: Array) -> Array:
  """Returns squared error per weight in the first 0, 1, ... 127 cells, with their best offset."""
  tail, inner = edges.tail, edges.magnitude[:, :-1]
  beyond = tail.positive + tail.negative
  count = beyond[:, :-1] - beyond[:, 1:]
  first = tail.magnitude[:, :-1] - tail.magnitude[:, 1:]
  second = tail.squares[:, 1:] - tail.squares[:, :-1]
  # moments of the excess over each cell's inner edge
  rest = first - inner * count
  square = second - 2 * inner * first + inner * inner * count
  moments = jnp.cumsum(jnp.stack([count, rest, square]), axis=2)
  count, rest, square = jnp.pad(moments, ((0, 0), (0, 0), (1, 0)))
  found = square - rest * rest / jnp.where(count > 0, count, 1)
  # a small error is lost in the rounding of these sums; but it belongs to a fine grid, where the
  # closed form is exact
  fine = count * laplace.survivor_error(step, scale)[:, None]
  return jnp.where(found > 1e-4 * sums.energy()[:, None], found, fine)
