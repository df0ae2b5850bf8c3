"""Thresholds, steps and levels of all leaves whose codes take the bits that are asked.

    minimise  sum_i F_i(D_i)   subject to   sum_i n_i R_i = bits * sum_i n_i

with D_i the squared error of leaf i and R_i the bits per weight of its payload, tables and escaped
weights included, both from the leaf's true histogram.  One multiplier lambda serves all leaves;
given it, a leaf minimises D + mu R per weight, mu = lambda / F_i'(D_i), over what it can do:

    on a grid    threshold, step and number of levels, weights beyond the last cell escaped
    pruned       all weights are 0: no bits but those of a table, all of the error
    a lattice    where the leaf has few distinct magnitudes, a grid that holds them exactly
    exact        every weight but zeros is escaped: no error, the bits of the dtype

The grid is in closed form.  Whatever the density, its tail beyond a threshold beta is nearly
exponential, with the scale tau = E[|w| - beta; |w| > beta] of the survivors.  For an exponential
tail the best step Delta is that of METHOD.md section 4, and the edge between the codes 0 and 1 is
where both cost the same:

    mu      =  tau^2 ln 2 (d coth(d / 2) - 2),   d = Delta / tau
    beta^2  =  delta^2 + mu (log2 p_0 - log2 p_1)

with delta the offset of the centroid in its cell, and p_0 and p_1 the true shares of the weights
that are pruned and, of one sign, in the first cell.  A few rounds of the two converge.  (Our
derivation.)  Zeros do not count in tau, nor does what lies beyond 127 cells; on Laplace, Gaussian
and Student-t weights, half of them zeros or not, D + mu R is within .6 % of the least over all
thresholds and steps (`tests/test_rate_search.py`).  The weights that it suits least are those that
are all far from zero: below 2 bits they may err more with more bits.

As lambda falls from infinity to 0 the bits rise from those of everything pruned to those of all
values exact.  The search keeps two multipliers, one with at most the bits that are asked and one
with more, and so ends at a true answer.  Where no multiplier gives these bits, because leaves jump
from one thing to another, it prunes those further that jump from a grid to nothing; then it holds
what each leaf does and refines the grids alone.  Where that does not fill the gap either, the
answer has fewer bits than asked.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation import laplace
from opq_jax.allocation.histograms import Sums, code_entropy, escaped_value_bits, payload_bits
from opq_jax.core.limits import MAX_LEVELS, STEP_BITS

PRUNED, ON_GRID, ON_LATTICE, EXACT = range(4)
_LOG2 = math.log(2.0)
_ROUNDS = 9  # of threshold and step
_TOLERANCE = 1e-4  # of the bits
_MOST_TRIALS = 40  # of one stage
_NARROW = 1e-5  # of lambda's logarithm, where a stage ends
_FIRST, _SECOND, _FREE, _ENDED = 0, 1, 2, 5  # stages
_FURTHER = len((PRUNED, ON_GRID, ON_LATTICE, EXACT))  # on a grid whose threshold is raised
_SLOPE = 2 * _LOG2  # of lambda's logarithm over the bits, where grids are fine
_FAR = 60.0  # of d, where coth is 1
_FINE_STEP = math.sqrt(6 / _LOG2)  # over the root of mu, where steps are small beside the scale


class Leaves(NamedTuple):
  """The problem; lengths in the unit of each leaf.

  Attributes:
    sums: of the histograms.
    sizes: weights of each leaf.
    share: of all weights.
    mantissa: bits of that of the dtype of each leaf.
    log_mu: of each leaf at lambda = 1, for an objective that is linear in the errors; up to a
      number that is the same for all.  Otherwise of F = -log(1 - D / energy) at D = 0.
    is_linear: whether it is.
    lattice_bits, lattice_error: bits and squared error per weight of a leaf on its lattice; the
      bits are infinite where it has none.
  """

  sums: Sums
  sizes: Float[Array | np.ndarray, 'leaves']
  share: Float[Array, 'leaves']
  mantissa: Float[Array, 'leaves']
  log_mu: Float[Array, 'leaves']
  is_linear: bool
  lattice_bits: Float[Array, 'leaves']
  lattice_error: Float[Array, 'leaves']


class Found(NamedTuple):
  """What every leaf does.

  Attributes:
    choice: PRUNED, ON_GRID, ON_LATTICE or EXACT.
    threshold, step, levels: on a grid.
    payload: bits per weight of each leaf in a file.
    bits: per weight over all leaves.
    cost: of the errors of all leaves, up to a factor.
  """

  choice: Int32[Array, 'leaves']
  threshold: Float[Array, 'leaves']
  step: Float[Array, 'leaves']
  levels: Float[Array, 'leaves']
  payload: Float[Array, 'leaves']
  bits: Float[Array, '']
  cost: Float[Array, '']


def minimise_at_bits_per_weight(leaves: Leaves, bits: Float[Array, '']) -> Found:
  """What every leaf does, with at most `bits` bits per weight over all of them.

  The bits found are within 1e-4 of those asked, or the most below them that the search has met,
  or, where everything pruned has more, the bits of everything pruned.
  """
  low, high = _multipliers(leaves)
  zero = jnp.zeros_like(low)
  off = lambda found: jnp.log(found.bits / bits)
  choose = lambda test, new, old: jax.tree.map(lambda x, y: jnp.where(test, x, y), new, old)

  def is_open(state: _Search) -> Array:
    return (state.stage < _ENDED) & ((state.stage < _FREE) | (off(state.under) < -_TOLERANCE))

  def step(state: _Search) -> _Search:
    # a secant in lambda's logarithm and that of the bits, kept off both ends; every third halves
    span = off(state.over) - off(state.under)
    part = jnp.clip(-off(state.under) / jnp.where(span > 0, span, 1), 0.02, 0.98)
    part = jnp.where(state.trials % 3 == 2, 0.5, part)
    # first a guess, then by the slope of fine grids, a little too far so that both ends are near
    distance = state.at_over.log_lambda - state.at_under.log_lambda
    guess = jnp.where(state.trials == 0, _guess(leaves, bits), state.guess)
    guess = (guess - state.at_under.log_lambda) / jnp.where(distance != 0, distance, 1)
    is_guessed = (state.stage == _FREE) & (state.trials < 4) & (guess > 0) & (guess < 1)
    part = jnp.where(is_guessed, guess, part)
    # the first two trials are the ends
    part = jnp.where(state.stage < _FREE, (state.stage == _FIRST).astype(part.dtype), part)
    at = jax.tree.map(lambda x, y: x + part * (y - x), state.at_under, state.at_over)
    found = _at(leaves, at, bits, state.held)
    # beyond the free stage, only what errs less is worth more bits
    is_better = (state.stage <= _FREE) | (found.cost <= state.under.cost)
    is_under = (off(found) <= _TOLERANCE) & is_better
    is_under = jnp.where(state.stage < _FREE, state.stage > _FIRST, is_under)
    tried = at, found
    at_under, under = choose(is_under, tried, (state.at_under, state.under))
    at_over, over = choose(is_under, (state.at_over, state.over), tried)
    guess = at.log_lambda + 1.1 * _SLOPE * (found.bits - bits)
    both = {'at_under': at_under, 'under': under, 'at_over': at_over, 'over': over}
    state = state._replace(trials=state.trials + 1, guess=guess, **both)
    between = sum(jnp.abs(x - y) for x, y in zip(at_under, at_over, strict=True))
    is_narrow = (between < _NARROW) | (state.trials >= _MOST_TRIALS)
    ends = (state.stage < _FREE) | is_narrow & (off(under) < -_TOLERANCE)
    return choose(ends, next_stage(state), state)

  def next_stage(state: _Search) -> _Search:
    # where all values exact have few enough bits, or everything pruned too many, that is the answer
    is_second = state.stage == _SECOND
    most = choose(state.stage == _FIRST, state.over, state.most)
    all_exact = is_second & (off(most) <= 0)
    is_done = all_exact | (is_second & (off(state.under) > 0))
    # leaves that jump from a grid to next to nothing are pruned further on that grid: a stage of
    # thresholds; then all hold what they do, and lambda falls
    on_grid, under = state.over.choice == ON_GRID, state.under
    gap = (under.choice == ON_GRID) & (under.payload < 0.98 * state.over.payload)
    jumps = on_grid & (gap | (under.choice == PRUNED))
    is_free, is_thresholds = state.stage < _FREE, state.stage == _FREE
    held = jnp.where(jumps, _FURTHER, state.over.choice)
    held = jnp.where(is_thresholds, held, state.under.choice)
    held = jnp.where(is_free, state.held, held).astype(jnp.int32)
    further = _Point(state.at_over.log_lambda, jnp.ones_like(zero))
    at_under = choose(is_thresholds, further, _Point(state.at_under.log_lambda, zero))
    at_over = choose(is_thresholds, state.at_over, _Point(low, zero))
    over = choose(is_free | is_thresholds, state.over, most)
    # without a leaf that jumps, the stage of thresholds ends at once
    skip = is_thresholds & ~jnp.any(jumps)
    return _Search(
      stage=jnp.where(is_done, _ENDED, state.stage + 1).astype(jnp.int32),
      trials=jnp.where(skip, _MOST_TRIALS - 1, 0).astype(jnp.int32),
      at_under=choose(is_free, state.at_under, at_under),
      under=choose(all_exact, most, state.under),
      at_over=choose(is_free, state.at_over, at_over),
      over=over,
      most=most,
      held=held,
      guess=state.guess,
    )

  zeros = jnp.zeros_like(leaves.share)
  nothing = Found(zeros.astype(jnp.int32), zeros, zeros, zeros, zeros, bits, bits)
  start = _Search(
    jnp.int32(_FIRST),
    jnp.int32(0),
    _Point(high, zero),
    nothing,
    _Point(low, zero),
    nothing,
    nothing,
    jnp.full(leaves.share.shape, -1, jnp.int32),
    zero,
  )
  return jax.lax.while_loop(is_open, step, start).under


class _Point(NamedTuple):
  """Where a search is: the multiplier, and how far the thresholds of some leaves are raised."""

  log_lambda: Float[Array, '']
  raised: Float[Array, '']


class _Search(NamedTuple):
  """A search between two points, `under` of few enough bits and `over` of too many.

  Attributes:
    stage: the trials of all values exact and of everything pruned; then all leaves free, thresholds
      alone, grids alone; and ended.
    trials: of the stage.
    at_under, under, at_over, over: the points, and the choices of the leaves there.
    most: all values exact.
    held: the choice that each leaf is held to, `_FURTHER` where its threshold is raised, or -1.
    guess: of lambda's logarithm, by the last trial.
  """

  stage: Int32[Array, '']
  trials: Int32[Array, '']
  at_under: _Point
  under: Found
  at_over: _Point
  over: Found
  most: Found
  held: Int32[Array, 'leaves']
  guess: Float[Array, '']


def _guess(leaves: Leaves, bits: Float[Array, '']) -> Float[Array, '']:
  """log lambda at which fine grids on Laplace weights take these bits: mu = 3.41 tau^2 / 4^bits."""
  scale = leaves.sums.columns[:, 0, 2]
  log_mu = jnp.where(scale > 0, math.log(3.41) + 2 * jnp.log(jnp.where(scale > 0, scale, 1)), 0)
  own = jnp.where(scale > 0, log_mu - leaves.log_mu, 0)
  share = jnp.where(scale > 0, leaves.share, 0)
  return jnp.sum(share * own) / jnp.sum(share) - _SLOPE * bits


def _multipliers(leaves: Leaves) -> tuple[Array, Array]:
  """log lambda at which all leaves are exact, and at which all are pruned."""
  largest = jnp.where(leaves.sums.largest > 0, jnp.log(leaves.sums.largest), jnp.nan)
  # a survivor takes a bit and saves no more than its square; numbers reach down by 2**-32
  top = 2 * largest + 1 - leaves.log_mu
  return jnp.nanmin(top) - 2 * 34 * _LOG2, jnp.nanmax(top)


def _at(leaves: Leaves, at: _Point, bits: Array, held: Int32[Array, 'leaves']) -> Found:
  """The choices of the leaves at a multiplier; a leaf that is held keeps its choice."""
  sums = leaves.sums
  log_mu = leaves.log_mu + at.log_lambda
  threshold, step, log_price = _grid(leaves, log_mu)
  raised = threshold + at.raised * (sums.largest - threshold)
  threshold = jnp.where(held == _FURTHER, raised, threshold)
  price = jnp.exp(log_price)
  levels, payload, error = _levels(leaves, threshold, step, price)
  energy, nothing = sums.energy(), jnp.zeros_like(payload)
  nonzero = jnp.sum(sums.columns[:, 1, :2], axis=1)
  rates = jnp.stack(
    [
      _payload(leaves, nothing + 1, nothing),
      payload,
      leaves.lattice_bits,
      _payload(leaves, 1 - nonzero, nonzero),
    ]
  )
  errors = jnp.stack([energy, error, leaves.lattice_error, nothing])
  if leaves.is_linear:
    costs = errors + price[None] * rates
  else:
    left = 1 - errors / jnp.where(energy > 0, energy, 1)[None]
    left = jnp.maximum(left, jnp.finfo(left.dtype).tiny)
    costs = jnp.exp(log_mu)[None] * rates - energy[None] * jnp.log(left)
  # few values that somebody chose are kept where they take no more than what all have on average
  is_kept = ((leaves.lattice_bits <= bits) & (leaves.lattice_error == 0))[None]
  costs = jnp.where(is_kept & (np.arange(4)[:, None] != ON_LATTICE), jnp.inf, costs)
  best = jnp.argmin(costs, axis=0).astype(jnp.int32)
  choice = jnp.where(held < 0, best, jnp.where(held == _FURTHER, ON_GRID, held)).astype(jnp.int32)
  payload = jnp.take_along_axis(rates, choice[None], axis=0)[0]
  payload = jnp.where(sums.largest > 0, payload, 0)
  error = jnp.take_along_axis(errors, choice[None], axis=0)[0]
  cost = jnp.sum(leaves.share * error * jnp.exp(jnp.min(leaves.log_mu) - leaves.log_mu))
  return Found(choice, threshold, step, levels, payload, jnp.sum(leaves.share * payload), cost)


def _payload(leaves: Leaves, pruned: Array, escaped: Array) -> Array:
  """Of a leaf without levels, of which all that is not zero may be escaped."""
  none = jnp.zeros((len(pruned), 2, 1), pruned.dtype)
  both = jnp.stack([escaped, escaped], axis=1)
  value_bits = escaped_value_bits(leaves.sums, jnp.zeros_like(pruned), leaves.mantissa)
  return payload_bits(pruned, none, both, leaves.sizes, value_bits)[:, 0]


def _grid(leaves: Leaves, log_mu: Array) -> tuple[Array, Array, Array]:
  """Threshold, step and log mu of each leaf's grid, where `log_mu` is that of no error."""
  sums = leaves.sums
  energy = sums.energy()
  tiny = jnp.finfo(log_mu.dtype).tiny
  least = _least(sums)
  step = _FINE_STEP * jnp.exp(log_mu / 2)
  threshold = jnp.clip(step / 2, least, sums.largest)

  def better(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    threshold, step, log_price = carry
    left, scale, below = _tail(sums, threshold, step)
    price = jnp.exp(log_price)
    step = _step(price, scale)
    offset = laplace.survivor_offset(step, scale)
    beyond = sums.at(threshold + step)
    first = (left - beyond[0] - beyond[1]) / 2
    odds = jnp.log2(jnp.maximum(1 - left, tiny) / jnp.maximum(first, tiny))
    # shares of nothing say nothing
    odds = jnp.clip(odds, -64, 64)
    square = offset * offset + price * odds
    wanted = jnp.sqrt(jnp.maximum(square, least * least))
    threshold = jnp.clip(jnp.sqrt(threshold * wanted), least, sums.largest)
    if not leaves.is_linear:
      error = below + left * laplace.survivor_error(step, scale)
      kept = jnp.maximum(1 - error / jnp.where(energy > 0, energy, 1), 1e-6)
      log_price = (log_price + log_mu + jnp.log(kept)) / 2
    return threshold, step, log_price

  start = threshold, step, log_mu
  threshold, step, log_price = jax.lax.fori_loop(0, _ROUNDS, better, start)
  step = _step(jnp.exp(log_price), _tail(sums, threshold, step)[1])
  # as it will be (`opq_jax.compression.codes.exact_grid`): many equal weights may lie beside an
  # edge
  mantissa, exponent = jnp.frexp(step)
  step = jnp.ldexp(jnp.round(mantissa * 2.0**STEP_BITS), exponent - STEP_BITS)
  return threshold, step, log_price


def _least(sums: Sums) -> Array:
  """Less than any weight that a histogram tells from zero."""
  return sums.largest * 2.0**-33


def _tail(sums: Sums, threshold: Array, step: Array) -> tuple[Array, Array, Array]:
  """The share of the weights beyond a threshold, the scale of their excess, and the error below it.

  What is beyond 127 cells, and escapes, has no say in the scale.
  """
  positive, negative, magnitude, below = sums.at(threshold)
  left = positive + negative
  far_positive, far_negative, far, _ = sums.at(threshold + MAX_LEVELS * step)
  inside = left - far_positive - far_negative
  scale = (magnitude - far) / jnp.where(inside > 0, inside, 1) - threshold
  least = jnp.maximum(threshold * 2.0**-9, _least(sums))
  return left, jnp.maximum(scale, least), below


def _step(price: Array, scale: Array) -> Array:
  """Delta of price = tau^2 ln 2 (d coth(d / 2) - 2), d = Delta / tau."""
  x = price / (scale * scale * _LOG2)
  d = jnp.sqrt(x * (x + 6))
  for _ in range(3):
    half = jnp.minimum(d, _FAR) / 2
    near, far = jnp.minimum(half, 1.0), jnp.maximum(half, 1.0)
    # d coth(d / 2) - 2 and its derivative, by the series where they would cancel
    square = near * near
    series = square * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    slope = near * (2 / 3 - square * (4 / 45 - square * (4 / 315 - square * 8 / 4725)))
    value = 2 * jnp.where(half < 1, series, far / jnp.tanh(far) - 1)
    slope = jnp.where(half < 1, slope, 1 / jnp.tanh(far) - far / jnp.square(jnp.sinh(far)))
    value = jnp.where(d > _FAR, d - 2, value)
    d = jnp.maximum(d - (value - x) / jnp.maximum(slope, 1e-6), d / 4)
  return d * scale


def _levels(
  leaves: Leaves, threshold: Array, step: Array, price: Array
) -> tuple[Array, Array, Array]:
  """The best number of levels of each leaf, and with it bits and squared error per weight."""
  sums = leaves.sums
  pruned, cells, escaped, below = shares_of(sums, threshold, step)
  _, scale, _ = _tail(sums, threshold, step)
  # the bits of values in the upper half are about right for any number of levels
  upper = threshold + 0.6 * jnp.minimum(MAX_LEVELS * step, sums.largest - threshold)
  about = escaped_value_bits(sums, upper, leaves.mantissa)
  bits = payload_bits(pruned, cells, escaped, leaves.sizes, about)
  # more levels than the largest weight needs hold nothing
  number = jnp.arange(MAX_LEVELS + 1, dtype=step.dtype)[None]
  needed = jnp.ceil(jnp.maximum(sums.largest - threshold, 0) / step * (1 - 1e-5))
  bits = jnp.where(number <= needed[:, None], bits, jnp.inf)
  error = below[:, None] + _error_in_cells(sums, threshold, step, scale)
  cost = error + price[:, None] * bits
  best = jnp.argmin(cost, axis=1)[:, None]
  of_best = lambda x: jnp.take_along_axis(x, best, axis=1)[:, 0]
  levels = best[:, 0].astype(threshold.dtype)
  exact = escaped_value_bits(sums, threshold + levels * step, leaves.mantissa) - about
  return levels, of_best(bits) + of_best(escaped) * exact, of_best(error)


def _error_in_cells(sums: Sums, threshold: Array, step: Array, scale: Array) -> Array:
  """Squared error per weight in the first 0, 1, ... 127 cells, with the best offset for them."""
  k = jnp.arange(MAX_LEVELS + 1, dtype=step.dtype)[None]
  edge = threshold[:, None] + step[:, None] * k
  positive, negative, magnitude, below = sums.at(edge)
  inner, beyond = edge[:, :-1], positive + negative
  count, first = beyond[:, :-1] - beyond[:, 1:], magnitude[:, :-1] - magnitude[:, 1:]
  second = below[:, 1:] - below[:, :-1]
  # of the excess over each cell's inner edge
  rest = first - inner * count
  square = second - 2 * inner * first + inner * inner * count
  total = lambda x: jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0)))
  count, rest, square = total(count), total(rest), total(square)
  found = square - rest * rest / jnp.where(count > 0, count, 1)
  # differences of large sums say nothing of small errors; small errors are of fine grids, and known
  fine = count * laplace.survivor_error(step, scale)[:, None]
  return jnp.where(found > 1e-4 * sums.energy()[:, None], found, fine)


def payload_of(leaves: Leaves, threshold: Array, step: Array, levels: Array) -> Array:
  """Bits per weight of each leaf in a file, with these levels."""
  pruned, cells, escaped, _ = shares_of(leaves.sums, threshold, step)
  value_bits = escaped_value_bits(leaves.sums, threshold + levels * step, leaves.mantissa)
  bits = payload_bits(pruned, cells, escaped, leaves.sizes, value_bits)
  return jnp.take_along_axis(bits, levels.astype(jnp.int32)[:, None], axis=1)[:, 0]


def shares_of(
  sums: Sums, threshold: Float[Array, 'leaves'], step: Float[Array, 'leaves']
) -> tuple[Array, Array, Array, Array]:
  """Shares of the weights of each leaf.

  Returns:
    that of the pruned [leaves], of each cell of a sign [leaves, 2, 127], of what is beyond 0, 1,
    ... 127 cells [leaves, 128]; and the squared error of pruning, per weight [leaves].
  """
  k = jnp.arange(MAX_LEVELS + 1, dtype=step.dtype)[None]
  positive, negative, _, below = sums.at(threshold[:, None] + step[:, None] * k)
  both = jnp.stack([positive, negative], axis=1)
  cells = jnp.maximum(both[..., :-1] - both[..., 1:], 0)
  escaped = positive + negative
  return 1 - escaped[:, 0], cells, escaped, below[:, 0]


def entropy_of(
  sums: Sums, threshold: Array, step: Array, levels: Array, value_bits: Array
) -> tuple[Array, Array]:
  """Zeroth-order entropy of each leaf's codes, bits per weight, and the share that is escaped."""
  pruned, cells, escaped, _ = shares_of(sums, threshold, step)
  number = jnp.arange(MAX_LEVELS, dtype=levels.dtype)[None, None]
  cells = jnp.where(number < levels[:, None, None], cells, 0)
  last = levels.astype(jnp.int32)[:, None]
  escaped = jnp.take_along_axis(escaped, last, axis=1)[:, 0]
  return code_entropy(pruned, cells, escaped, value_bits), escaped
