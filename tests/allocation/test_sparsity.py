"""Thresholds at a sparsity, against SLSQP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opq_jax.allocation import laplace
from opq_jax.allocation.sparsity import minimise_at_sparsity
from tests.helpers.channel_problems import (
  PROBLEMS,
  assert_no_worse,
  random_problem,
  relative_error_cost,
  slsqp,
  solve,
  starts,
  with_slopes,
)


def sparsity_problem(channels, x):
  threshold = jnp.exp(x)
  pruned = laplace.pruned_fraction(threshold[channels.leaf], channels.scale)
  cost = relative_error_cost(channels, threshold, jnp.zeros_like(threshold))
  return jnp.stack([cost, jnp.sum(channels.share * pruned)])


SPARSITY = with_slopes(sparsity_problem)


@settings(max_examples=8)
@given(problem=PROBLEMS, sparsity=st.floats(0.01, 0.97))
def test_sparsity_least_cost(problem, sparsity):
  with jax.enable_x64(True):
    channels = random_problem(**problem)
    ours = np.log(solve(minimise_at_sparsity, channels, sparsity))
    (cost, found), _ = solve(SPARSITY, channels, ours)
    assert found == pytest.approx(sparsity, abs=1e-9)
    assert_no_worse(cost, slsqp(SPARSITY, channels, sparsity, starts(ours, problem['seed'])))
  narrow = random_problem(**problem, number=np.float32)
  narrow = np.log(solve(minimise_at_sparsity, narrow, sparsity).astype(float))
  with jax.enable_x64(True):
    (narrow_cost, narrow_found), _ = solve(SPARSITY, channels, narrow)
  assert narrow_cost == pytest.approx(cost, rel=1e-3)
  assert narrow_found == pytest.approx(sparsity, abs=1e-4)


def test_sparsity_of_squared_error():
  # beta_i = s / sqrt(omega_i), docs/method/allocation.md
  with jax.enable_x64(True):
    channels = random_problem(3, 0, 0.6, 'squared_error')
    threshold = solve(minimise_at_sparsity, channels, 0.7)
    omega = np.asarray(channels.price / channels.leaf_share())
    scaled = threshold * np.sqrt(omega)
  np.testing.assert_allclose(scaled, scaled[0], rtol=1e-9)


def test_sparsity_of_nothing():
  with jax.enable_x64(True):
    channels = random_problem(3, 0, 0.6, 'retained_signal')
    np.testing.assert_array_equal(solve(minimise_at_sparsity, channels, 0.0), 0)
