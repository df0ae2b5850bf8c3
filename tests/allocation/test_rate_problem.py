"""Bits and moments predicted from a histogram, against those of the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.allocation import leaf_statistics
from opq_jax.allocation.bins import BINS
from opq_jax.allocation.description import histogram_moments
from opq_jax.allocation.histogram_sums import sums_of
from opq_jax.allocation.rate_problem import RateProblem, entropy_of, payload_of
from opq_jax.coding import escapes
from opq_jax.coding.payload import encode_codes
from tests.helpers.allocations import sample


def summed(stats):
  """Returns the sums of one leaf's histogram, in a unit of 1."""
  unknown = jnp.full((1, BINS), jnp.nan)
  is_coarse = jnp.asarray([jnp.finfo(stats.dtype).nmant <= 7])
  return sums_of(stats.histogram[None], stats.largest[None], unknown, is_coarse)


# none with an edge that is a number of few bits
GRIDS = [(0.013, 0.11, 127), (0.21, 0.51, 127), (0.71, 1.31, 4), (2.53, 3.51, 2), (0.11, 0.021, 60)]


def codes_on(weights, threshold, step, levels):
  """Returns the codes of a grid, -128 beyond its last level, by numpy."""
  flat = np.asarray(weights, np.float64).ravel()
  cell = 1 + np.floor((np.abs(flat) - threshold) / step)
  codes = np.where(np.abs(flat) > threshold, np.sign(flat) * np.minimum(cell, 127), 0)
  return np.where((np.abs(flat) > threshold) & (cell > levels), -128, codes).astype(np.int8)


def empirical_entropy(codes):
  _, counts = np.unique(codes, return_counts=True)
  share = counts / counts.sum()
  return -np.sum(share * np.log2(share))


@pytest.mark.parametrize('shape', [(3, 3, 16, 16), (40, 7, 36), (300, 500)], ids=str)
def test_payload_of_matches_coder(shape):
  weights = sample(shape)
  sums = summed(leaf_statistics(weights, -1))
  one = lambda x: jnp.float32([x])

  @jax.jit
  def payloads(threshold, step, levels):
    sizes = one(weights.size), one(1), one(23), one(0)
    leaves = RateProblem(sums, *sizes, True, one(jnp.inf), one(0))
    return payload_of(leaves, threshold, step, levels)

  for threshold, step, levels in GRIDS:
    codes = codes_on(weights, threshold, step, levels)
    expected = 8 * len(encode_codes(np.where(codes == -128, 0, codes).astype(np.int8)))
    places = np.flatnonzero(codes == -128)
    if places.size:
      expected += 8 * len(escapes.encode(places, np.asarray(weights).ravel()[places]))
    found = float(payloads(one(threshold), one(step), one(levels))[0])
    assert found == pytest.approx(expected / codes.size, rel=0.015)


@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_entropy_of_matches_codes(kind, dtype):
  weights = sample((40, 7, 36), kind).astype(dtype)
  stats = leaf_statistics(weights, -1)
  sums = summed(stats)
  one = lambda x: jnp.float32([x])
  moments = jax.jit(histogram_moments)
  for threshold, step, levels in GRIDS:
    codes = codes_on(weights, threshold, step, levels)
    found, escaped = entropy_of(sums, one(threshold), one(step), one(levels), one(0))
    slack = 5e-3 if dtype == jnp.float32 else 0.03  # many weights lie on an edge
    assert float(found[0]) == pytest.approx(empirical_entropy(codes), abs=slack)
    assert float(escaped[0]) == pytest.approx((codes == -128).mean(), abs=slack)
    on_grid = (codes != 0) & (codes != -128)
    flat = np.abs(np.asarray(weights, np.float64).ravel())
    cell = np.abs(codes.astype(int)) - 1
    rest = (flat - threshold - step * cell)[on_grid]
    centre, mantissa = sums.centres()[0][0], jnp.finfo(dtype).nmant
    energy, offset, _, sparsity = moments(
      stats.histogram, centre, *map(jnp.float32, (threshold, step, levels, mantissa))
    )
    assert float(energy) == pytest.approx(np.mean(flat**2), rel=1e-3)
    assert float(offset) == pytest.approx(rest.mean(), rel=2e-2, abs=2 * slack * step)
    assert float(sparsity) == pytest.approx((codes == 0).mean(), abs=slack)
