import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from opq_jax.allocation import laplace
from opq_jax.encoders import trellis_grids


@pytest.mark.slow
@pytest.mark.parametrize('slope', [2.0, 1.0, 0.3, 0.1, 0.02])
@pytest.mark.parametrize('scale', [1.0, 0.03])
def test_slope_of_optimal_plain_grid(slope, scale):
  def cost(logarithms):
    threshold, step = jnp.exp(jnp.float32(logarithms))
    one = jnp.float32(1)
    bits = laplace.entropy(threshold, step, one)
    return float(laplace.distortion(threshold, step, one) + slope * bits)

  start = np.log([1.8 * slope**0.5, 3.0 * slope**0.5])
  options = {'xatol': 1e-4, 'fatol': 1e-7}
  best = scipy.optimize.minimize(cost, start, method='Nelder-Mead', options=options)
  threshold, step = (float(x) for x in scale * np.exp(best.x))
  q = np.exp(-step / scale)
  first = threshold + scale - step * q / (1 - q)
  weights = (scale * np.random.default_rng(0).laplace(size=40_000)).astype(np.float32)
  fit = trellis_grids.fit(weights, first, threshold, step)
  assert fit.slope == pytest.approx(slope * scale**2, rel=0.03)
