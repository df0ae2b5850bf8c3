"""The search for a rate meets it, whatever the weights, at nearly the least cost."""

import itertools
import warnings

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.allocation.exponential_tails import best_grid
from opq_jax.allocation.histogram_sums import sums_of
from opq_jax.allocation.rate_problem import RateProblem
from opq_jax.coding import escapes
from opq_jax.coding import payload as entropy_coding
from opq_jax.core.limits import ESCAPE

SHAPE = (128, 192)
DTYPES = (
  np.float32,
  np.float16,
  ml_dtypes.bfloat16,
  ml_dtypes.float8_e4m3fn,
  ml_dtypes.float8_e5m2,
)


def weights_of(kind, rng):
  laplace = rng.laplace(size=SHAPE)
  match kind:
    case 'laplace':
      return laplace
    case 'normal':
      return rng.normal(size=SHAPE)
    case 'uniform':
      return rng.uniform(-1, 1, SHAPE)
    case 'student':
      return rng.standard_t(2, SHAPE)
    case 'log-normal':
      return np.exp(2 * rng.normal(size=SHAPE)) * np.sign(laplace)
    case 'outliers':
      return np.where(rng.random(SHAPE) < 3e-4, 500, 1) * laplace
    case 'half zeros':
      return np.where(rng.random(SHAPE) < 0.5, 0, laplace)
    case 'pruned by magnitude':
      return np.where(np.abs(laplace) < np.quantile(np.abs(laplace), 0.9), 0, laplace)
    case 'nearly all zeros':
      return np.where(rng.random(SHAPE) < 0.99, 0, laplace)
    case 'int8 grid':
      return np.clip(np.round(laplace * 20), -127, 127) * 0.003
    case 'ternary':
      return np.clip(np.round(laplace), -1, 1) * 0.03
    case 'far from zero':
      return np.abs(laplace) + 5
    case 'mixed scales':
      return laplace * np.exp(2 * rng.normal(size=SHAPE[-1]))
  raise ValueError(kind)


KINDS = [
  *('laplace', 'normal', 'uniform', 'student', 'log-normal', 'outliers', 'half zeros'),
  *('pruned by magnitude', 'nearly all zeros', 'int8 grid', 'ternary', 'far from zero'),
  'mixed scales',
]


def drawn(kind, dtype, seed=0):
  weights = weights_of(kind, np.random.default_rng(seed))
  if np.dtype(dtype).itemsize == 1:  # in the middle of what they can hold
    weights = weights / np.abs(weights).max() * 200
  return weights.astype(dtype)


def bits_in_a_file(codes, values):
  """Returns the bits per weight of the actual payload and of the escaped weights beside it."""
  is_escaped = (codes == ESCAPE).reshape(-1)
  on_grid = np.where(codes == ESCAPE, 0, codes).astype(np.int8)
  size = len(entropy_coding.encode_codes(on_grid, contexts=False))
  if is_escaped.any():
    size += len(escapes.encode(np.flatnonzero(is_escaped), values.reshape(-1)[is_escaped]))
  return 8 * size / codes.size


def compressed(weights, **targets):
  """Returns codes, values, allocation and the messages of the warnings."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    allocation = opq_jax.allocate({'w': weights}, **targets)
  state = opq_jax.init_state({'w': weights}, allocation)
  codes = np.asarray(opq_jax.encode({'w': weights}, state)['w'])
  values = np.asarray(opq_jax.apply_compression({'w': weights}, state)['w'])
  return codes, values, allocation.tree['w'], [str(warning.message) for warning in said]


@pytest.mark.slow
@hypothesis.given(
  st.sampled_from(KINDS), st.sampled_from(DTYPES), st.floats(-2.0, 4.9), st.integers(0, 3)
)
@hypothesis.settings(max_examples=60)
def test_search_meets_bits(kind, dtype, log_bits, seed):
  bits = 2.0**log_bits
  weights = drawn(kind, dtype, seed)
  codes, values, leaf, said = compressed(weights, bits_per_weight=bits)
  found = bits_in_a_file(codes, values)
  # a table of few codes is predicted to a few bytes
  slack = 0.005 * bits + 8 * 40 / codes.size
  assert found <= bits + slack
  if float(leaf.payload) < 0.995 * bits:
    assert any('bits per weight' in text for text in said)
  # nothing is clipped, and nothing becomes infinite
  wide, exact = values.astype(np.float64), weights.astype(np.float64)
  assert np.isfinite(wide).all()
  on_grid = (codes != 0) & (codes != ESCAPE)
  assert (np.abs(wide - exact)[on_grid] <= 1.002 * float(leaf.step)).all()
  assert (wide == exact)[codes == ESCAPE].all()


@pytest.mark.parametrize('kind', KINDS)
def test_search_errs_less_with_bits(kind):
  weights = drawn(kind, np.float32)
  # below 2 bits, a grid from zero on is none for weights that are all far from it
  few = () if kind == 'far from zero' else (0.25, 0.5, 1)
  errors = [
    float(np.square(compressed(weights, bits_per_weight=b)[1] - weights).sum())
    for b in (*few, 2, 3, 4, 6, 8, 12, 20, 33)
  ]
  assert all(b <= a * 1.01 for a, b in itertools.pairwise(errors)), errors
  assert errors[-1] == 0


@pytest.mark.parametrize('dtype', DTYPES)
def test_search_is_exact_at_the_top(dtype):
  weights = drawn('student', dtype)
  bits = 8 * np.dtype(dtype).itemsize
  _, values, _, said = compressed(weights, bits_per_weight=bits + 1.0)
  np.testing.assert_array_equal(values, weights)
  assert any('all values are exact' in text for text in said)


def cost(weights, price, threshold, step):
  """Returns D + price R of a grid, per weight, from the weights themselves."""
  magnitude = np.abs(weights).reshape(-1)
  cell = np.where(magnitude > threshold, 1 + np.floor((magnitude - threshold) / step), 0)
  kept = cell > 0
  rest = (magnitude - threshold - (cell - 1) * step)[kept]
  error = np.sum(magnitude[~kept] ** 2) + np.sum((rest - rest.mean()) ** 2)
  share = np.unique(cell, return_counts=True)[1] / magnitude.size
  return error / magnitude.size + price * (kept.mean() - np.sum(share * np.log2(share)))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student', 'half zeros', 'mixed scales'])
@pytest.mark.parametrize('price', [0.01, 0.1, 0.5])
def test_best_grid_is_nearly_best(kind, price):
  weights = drawn(kind, np.float32)
  weights = weights / np.abs(weights).mean()
  statistics = opq_jax.allocation.leaf_statistics(weights)
  one = lambda x: jnp.asarray(x, jnp.float32)[None]
  sums = sums_of(
    statistics.histogram[None],
    statistics.largest[None],
    jnp.full((1, statistics.histogram.shape[1]), jnp.nan),
    jnp.zeros(1, bool),
  )
  sizes = one(weights.size), one(1), one(23), one(0)
  leaves = RateProblem(sums, *sizes, True, one(jnp.inf), one(0))
  threshold, step, _ = (float(x[0]) for x in best_grid(leaves, one(np.log(price))))
  factors = np.geomspace(0.6, 1.6, 13)
  best = min(cost(weights, price, threshold * f, step * g) for f in factors for g in factors)
  assert cost(weights, price, threshold, step) <= 1.006 * best
