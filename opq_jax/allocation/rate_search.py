"""Search for the choices of all leaves at a given number of bits per weight.

    minimise  sum_i F_i(D_i)   subject to   sum_i n_i R_i = bits * sum_i n_i

with D_i the squared error of leaf i and R_i the bits per weight of its payload, tables and escaped
weights included, both from the leaf's true histogram.  One multiplier lambda serves all leaves.
Given lambda, a leaf minimises D + mu R per weight, mu = lambda / F_i'(D_i), over its four choices
(`opq_jax.allocation.choices`).

As lambda falls from infinity to 0, the bits rise from everything pruned to all values exact.  The
search keeps two points, `under` with at most the bits that are asked and `over` with more.  Its
answer is `under`: choices that were evaluated, never interpolated ones.  It has five stages:

    TRY_EXACT          lambda at its lower end, where all values are exact
    TRY_PRUNED         lambda at its upper end, where everything is pruned.  Where one of the two
                       ends is the answer, the search is done
    ALL_FREE           lambda between the ends
    RAISE_THRESHOLDS   leaves that jump from a grid to (next to) nothing between the two points make
                       the bits jump too.  Such leaves keep their grid, and their thresholds are
                       raised until the gap is filled
    HOLD_CHOICES       every leaf holds its choice, and lambda falls: the grids alone become finer

Where no stage fills the gap, the answer has fewer bits than asked.  (Our derivation.)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from opq_jax.allocation.choices import (
  FREE,
  ON_GRID,
  PRUNED,
  RAISED,
  Choices,
  Ends,
  choices_at,
  ends_of,
)
from opq_jax.allocation.rate_problem import RateProblem

_LOG2 = math.log(2.0)
_TRY_EXACT, _TRY_PRUNED, _ALL_FREE, _RAISE_THRESHOLDS, _HOLD_CHOICES, _DONE = range(6)  # stages
_TOLERANCE = 1e-4  # of the bits, relative: far below what contexts and headers change in a file
_MAX_TRIALS = 40  # of one stage; 4 to 15 are usual
_NARROW = 1e-5  # of lambda's logarithm, where a stage ends: float32 keeps a few 1e-6 of it
_GUESSED_TRIALS = 4  # of the free stage, before the secant takes over
_OVERSHOOT = 1.1  # of a guess: a little beyond the root, so that both ends of the bracket come near
_JUMP = 0.98  # of the payload at `over`: a leaf that has less at `under` jumps
_SLOPE = 2 * _LOG2  # of lambda's logarithm over the bits, where grids are fine: a bit quarters mu
_FINE_LAPLACE = 3.41  # mu over tau^2 / 4^bits of fine grids on Laplace weights: e^2 ln 2 * 2/3


class _Search(NamedTuple):
  """State of the search.

  Attributes:
    stage: one of the stages of the module's description, or DONE.
    trials: points tried in this stage.
    at_under, under: the best point of few enough bits, and the choices there.  A point is lambda's
      logarithm, and the part by which thresholds are raised.
    at_over, over: the point of too many bits, and the choices there.
    exact: choices of all values exact.
    held: FREE, RAISED or the choice that each leaf is held to.
    guess: of lambda's logarithm, from the last trial.
  """

  stage: Int32[Array, '']
  trials: Int32[Array, '']
  at_under: Float[Array, '2']
  under: Choices
  at_over: Float[Array, '2']
  over: Choices
  exact: Choices
  held: Int32[Array, 'leaves']
  guess: Float[Array, '']


def minimise_at_bits_per_weight(problem: RateProblem, bits: Float[Array, '']) -> Choices:
  """Returns the choices of all leaves with at most `bits` bits per weight over all of them.

  Returned choices take within 1e-4 of `bits`, or the most bits below that the search has met, or,
  where everything pruned takes more than `bits`, everything is pruned.
  """
  lowest, highest = _log_lambda_ends(problem)
  zero = jnp.zeros_like(lowest)
  nothing = Choices(
    jnp.zeros((5, len(problem.share)), problem.share.dtype), jnp.stack([bits, bits])
  )
  start = _Search(
    stage=jnp.int32(_TRY_EXACT),
    trials=jnp.int32(0),
    at_under=jnp.stack([highest, zero]),
    under=nothing,
    at_over=jnp.stack([lowest, zero]),
    over=nothing,
    exact=nothing,
    held=jnp.full(problem.share.shape, FREE, jnp.int32),
    guess=zero,
  )

  def is_open(search: _Search) -> Array:
    is_short = _excess(search.under, bits) < -_TOLERANCE
    return (search.stage < _DONE) & ((search.stage < _ALL_FREE) | is_short)

  step = functools.partial(_try_point, problem, ends_of(problem), bits, lowest)
  return jax.lax.while_loop(is_open, step, start).under


def _excess(choices: Choices, bits: Float[Array, '']) -> Float[Array, '']:
  """Returns log(bits of the choices / bits asked): positive where the choices take too many."""
  return jnp.log(choices.bits / bits)


def _select(test: Array, new: Any, old: Any) -> Any:
  """Selects between two trees of equal structure by one boolean."""
  return jax.tree.map(lambda x, y: jnp.where(test, x, y), new, old)


def _try_point(
  problem: RateProblem,
  ends: Ends,
  bits: Float[Array, ''],
  lowest: Float[Array, ''],
  search: _Search,
) -> _Search:
  """Tries a point between `at_under` and `at_over`, puts it in the place of one, and goes on."""
  part = _next_part(problem, bits, search)
  point = search.at_under + part * (search.at_over - search.at_under)
  log_lambda, raised = point
  found = choices_at(problem, ends, log_lambda, raised, bits, search.held)
  # beyond the free stage more bits may also cost more error: only less error is worth them
  is_better = (search.stage <= _ALL_FREE) | (found.cost <= search.under.cost)
  is_under = (_excess(found, bits) <= _TOLERANCE) & is_better
  is_under = jnp.where(search.stage < _ALL_FREE, search.stage > _TRY_EXACT, is_under)
  tried = point, found
  at_under, under = _select(is_under, tried, (search.at_under, search.under))
  at_over, over = _select(is_under, (search.at_over, search.over), tried)
  search = search._replace(
    trials=search.trials + 1,
    guess=log_lambda + _OVERSHOOT * _SLOPE * (found.bits - bits),
    at_under=at_under,
    under=under,
    at_over=at_over,
    over=over,
  )
  between = jnp.sum(jnp.abs(at_under - at_over))
  is_narrow = (between < _NARROW) | (search.trials >= _MAX_TRIALS)
  is_ended = (search.stage < _ALL_FREE) | is_narrow & (_excess(under, bits) < -_TOLERANCE)
  return _select(is_ended, _next_stage(bits, lowest, search), search)


def _next_part(problem: RateProblem, bits: Float[Array, ''], search: _Search) -> Float[Array, '']:
  """Returns where the next point lies between `at_under` (0) and `at_over` (1)."""
  # a secant of the log bits over log lambda, kept off both ends; every third trial halves, so that
  # a kink cannot hold the secant at one end
  span = _excess(search.over, bits) - _excess(search.under, bits)
  part = jnp.clip(-_excess(search.under, bits) / jnp.where(span > 0, span, 1), 0.02, 0.98)
  part = jnp.where(search.trials % 3 == 2, 0.5, part)
  # the ends are 2^68 apart: the first trials follow the slope of fine grids, from a guess
  start = search.at_under[0]
  distance = search.at_over[0] - start
  guess = jnp.where(search.trials == 0, _guess(problem, bits), search.guess)
  guess = (guess - start) / jnp.where(distance != 0, distance, 1)
  is_guessed = (search.stage == _ALL_FREE) & (search.trials < _GUESSED_TRIALS)
  is_guessed = is_guessed & (guess > 0) & (guess < 1)
  part = jnp.where(is_guessed, guess, part)
  # the first two stages try the ends themselves
  is_exact = (search.stage == _TRY_EXACT).astype(part.dtype)
  return jnp.where(search.stage < _ALL_FREE, is_exact, part)


def _next_stage(bits: Float[Array, ''], lowest: Float[Array, ''], search: _Search) -> _Search:
  """Returns the search at the start of its next stage."""
  zero = jnp.zeros_like(lowest)
  under, over = search.under, search.over
  # where all values exact have few enough bits, or everything pruned too many, that is the answer
  is_second = search.stage == _TRY_PRUNED
  exact = _select(search.stage == _TRY_EXACT, over, search.exact)
  all_exact = is_second & (_excess(exact, bits) <= 0)
  is_done = all_exact | (is_second & (_excess(under, bits) > 0))
  # leaves that jump from a grid to (next to) nothing
  falls = (under.choice == ON_GRID) & (under.payload < _JUMP * over.payload)
  jumps = (over.choice == ON_GRID) & (falls | (under.choice == PRUNED))
  from_ends, from_free = search.stage < _ALL_FREE, search.stage == _ALL_FREE
  held = jnp.where(jumps, RAISED, over.choice)
  held = jnp.where(from_free, held, under.choice)
  held = jnp.where(from_ends, search.held, held).astype(jnp.int32)
  # thresholds are raised between all the way and not at all; then lambda falls between its last
  # value of few enough bits and its lower end
  all_raised = search.at_over.at[1].set(1)
  at_under = _select(from_free, all_raised, search.at_under.at[1].set(0))
  at_over = _select(from_free, search.at_over, jnp.stack([lowest, zero]))
  # without a leaf that jumps there is no threshold to raise: one trial, and the stage ends
  skips = from_free & ~jnp.any(jumps)
  return _Search(
    stage=jnp.where(is_done, _DONE, search.stage + 1).astype(jnp.int32),
    trials=jnp.where(skips, _MAX_TRIALS - 1, 0).astype(jnp.int32),
    at_under=_select(from_ends, search.at_under, at_under),
    under=_select(all_exact, exact, under),
    at_over=_select(from_ends, search.at_over, at_over),
    over=_select(from_ends | from_free, over, exact),
    exact=exact,
    held=held,
    guess=search.guess,
  )


def _guess(problem: RateProblem, bits: Float[Array, '']) -> Float[Array, '']:
  """Returns log lambda at which fine grids on Laplace weights take these bits.

  Their entropy is log2(2 e tau / Delta) and mu = ln 2 Delta^2 / 6, so mu = 3.41 tau^2 / 4^bits.
  """
  scale = problem.sums.columns[:, 0, 2]
  log_mu = jnp.log(jnp.where(scale > 0, scale, 1))
  log_mu = jnp.where(scale > 0, math.log(_FINE_LAPLACE) + 2 * log_mu, 0)
  own = jnp.where(scale > 0, log_mu - problem.log_mu, 0)
  share = jnp.where(scale > 0, problem.share, 0)
  return jnp.sum(share * own) / jnp.sum(share) - _SLOPE * bits


def _log_lambda_ends(problem: RateProblem) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Returns log lambda at which all leaves are exact, and at which all are pruned."""
  largest = problem.sums.largest
  log_largest = jnp.where(largest > 0, jnp.log(largest), jnp.nan)
  # a survivor takes a bit and saves no more than its square
  top = 2 * log_largest + 1 - problem.log_mu
  # magnitudes reach down to 2^-32 of the largest, and an error to a quarter of that
  return jnp.nanmin(top) - 2 * 34 * _LOG2, jnp.nanmax(top)
