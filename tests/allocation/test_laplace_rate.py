"""The joint target in closed form, against SLSQP and the table of docs/method/allocation.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from opq_jax.allocation import laplace
from opq_jax.allocation.laplace_rate import minimise_at_rate
from tests.helpers.channel_problems import (
  LEAVES,
  PROBLEMS,
  assert_no_worse,
  random_problem,
  relative_error_cost,
  slsqp,
  solve,
  starts,
  with_slopes,
)


def rate_problem(channels, x):
  threshold, step = jnp.exp(x[:LEAVES]), jnp.exp(x[LEAVES:])
  bits = laplace.entropy(threshold[channels.leaf], step[channels.leaf], channels.scale)
  cost = relative_error_cost(channels, threshold, step)
  return jnp.stack([cost, jnp.sum(channels.share * bits)])


RATE = with_slopes(rate_problem)


@pytest.mark.slow
@settings(max_examples=4)
@given(problem=PROBLEMS, bits=st.floats(0.3, 6))
def test_rate_least_cost(problem, bits):
  with jax.enable_x64(True):
    channels = random_problem(**problem)
    ours = np.log(np.concatenate(solve(minimise_at_rate, channels, bits)))
    (cost, found), _ = solve(RATE, channels, ours)
    assert found == pytest.approx(bits, rel=1e-9)
    assert_no_worse(cost, slsqp(RATE, channels, bits, starts(ours, problem['seed'])))
  narrow = np.concatenate(
    solve(minimise_at_rate, random_problem(**problem, number=np.float32), bits)
  )
  with jax.enable_x64(True):
    (narrow_cost, narrow_found), _ = solve(RATE, channels, np.log(narrow.astype(float)))
  assert narrow_cost == pytest.approx(cost, rel=1e-4 * max(1, bits))
  assert narrow_found == pytest.approx(bits, rel=1e-4)


TABLE = [  # lambda, beta, Delta, D/2, R, pruned: docs/method/allocation.md
  (2, 3.668, 4.806, 0.7195, 0.199, 0.975),
  (1, 2.188, 3.163, 0.4043, 0.648, 0.888),
  (0.5, 1.372, 2.157, 0.1994, 1.219, 0.747),
  (0.2, 0.782, 1.335, 0.0760, 1.969, 0.542),
  (0.1, 0.525, 0.937, 0.0371, 2.507, 0.408),
  (0.05, 0.358, 0.660, 0.0183, 3.027, 0.301),
]


@pytest.mark.parametrize('row', TABLE, ids=lambda row: str(row[0]))
def test_rate_table_of_the_method(row):
  price, *expected = row
  with jax.enable_x64(True):
    one = np.float64(1)

    def best(z):
      threshold, step = jnp.exp(z)
      bits = laplace.entropy(threshold, step, one)
      return laplace.distortion(threshold, step, one) + price * bits

    slope = jax.jit(jax.grad(best))
    z = minimize(jax.jit(best), np.zeros(2), jac=slope, method='BFGS', options={'gtol': 1e-9}).x
    threshold, step = np.exp(z)
    bits = laplace.entropy(threshold, step, one)
    table = [
      threshold, step, laplace.distortion(threshold, step, one) / 2, bits,
      laplace.pruned_fraction(threshold, one),
    ]  # fmt: skip
    np.testing.assert_allclose(table, expected, rtol=2e-3)
    # all leaves alike: the solver's answer is that row, whatever the objective
    for objective in ('retained_signal', 'relative_error'):
      channels = random_problem(0, 2, 0.0, objective)
      channels = channels._replace(share=jnp.full_like(channels.share, 1 / len(channels.share)))
      thresholds, steps = solve(minimise_at_rate, channels, float(bits))
      np.testing.assert_allclose(thresholds, threshold, rtol=1e-7)
      np.testing.assert_allclose(steps, step, rtol=1e-7)


def test_rate_channels_of_zeros():
  with jax.enable_x64(True):
    channels = random_problem(5, 2, 0.3, 'relative_error')
    dead = np.arange(len(channels.leaf)) % 4 == 0
    channels = channels._replace(scale=jnp.where(dead, 0, channels.scale))
    ours = np.log(np.concatenate(solve(minimise_at_rate, channels, 1.5)))
    (cost, found), _ = solve(RATE, channels, ours)
    assert found == pytest.approx(1.5, rel=1e-9)
    assert_no_worse(cost, slsqp(RATE, channels, 1.5, starts(ours, 5)))


def test_rate_under_vmap():
  channels = random_problem(9, 0, 0.3, 'retained_signal', np.float32)
  rates = np.float32([0.5, 1, 2])
  many = solve(lambda ch, b: jax.vmap(lambda x: minimise_at_rate(ch, x))(b), channels, rates)
  for i, rate in enumerate(rates):
    one = solve(minimise_at_rate, channels, rate)
    np.testing.assert_allclose([m[i] for m in many], one, rtol=2e-4)
