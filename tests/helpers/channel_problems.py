"""Random allocation problems of eight leaves, and SLSQP to compare their answers with."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from scipy.optimize import minimize

from opq_jax.allocation import laplace
from opq_jax.allocation.channels import Channels

LEAVES = 8
# channels of every leaf, 32 in all, so that one program serves every layout
LAYOUTS = [np.array([5, 1, 8, 3, 7, 1, 3, 4]), np.array([25, 1, 1, 1, 1, 1, 1, 1]), np.full(8, 4)]
PROBLEMS = st.fixed_dictionaries(
  {
    'seed': st.integers(0, 10**6),
    'layout': st.integers(0, len(LAYOUTS) - 1),
    'spread': st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    'objective': st.sampled_from(['retained_signal', 'relative_error', 'squared_error']),
  }
)


def random_problem(seed, layout, spread, objective, number=np.float64):
  """Draws eight leaves of 1e2 ... 1e6 weights, with channels of lognormal scales."""
  rng = np.random.default_rng(seed)
  counts = LAYOUTS[layout]
  leaf = np.repeat(np.arange(LEAVES, dtype=np.int32), counts)
  share = np.repeat(10 ** rng.uniform(2, 6, size=LEAVES) / counts, counts)
  share /= share.sum()
  scale = np.exp(spread * rng.normal(size=len(leaf)))
  per_leaf = np.bincount(leaf, share)
  scale /= np.sqrt(np.bincount(leaf, share * scale**2) / per_leaf)[leaf]
  price = {
    'retained_signal': None,
    'relative_error': np.ones(LEAVES),
    'squared_error': per_leaf * 10 ** rng.uniform(-4, 0, size=LEAVES),
  }[objective]
  if price is not None:
    price = jnp.asarray(price / price.max(), number)
  as_array = lambda x: jnp.asarray(x, number)
  return Channels(
    as_array(scale), as_array(share), leaf, LEAVES, price, as_array(np.full(LEAVES, 1e-6))
  )


@functools.cache
def compiled(make):
  """Returns the jitted `make(channels, *args)`, with arrays as arguments."""

  def call(scale, share, leaf, price, min_step, *args):
    return make(Channels(scale, share, leaf, LEAVES, price, min_step), *args)

  return jax.jit(call)


def solve(make, channels, *args):
  """Returns `make(channels, *args)` as numpy, compiled once a kind of objective and dtype."""
  return solver(make, channels)(*args)


def solver(make, channels):
  """Returns `solve` of one problem, for many calls: its arrays are on the device."""
  dtype = channels.scale.dtype
  arrays = channels.scale, channels.share, channels.leaf, channels.price, channels.min_step
  arrays = jax.device_put(arrays)
  # as NumPy's: the compiled function places them itself, without a call for each
  return lambda *args: jax.device_get(
    compiled(make)(*arrays, *(np.asarray(a, dtype) for a in args))
  )


def relative_error_cost(channels, threshold, step):
  at, width = threshold[channels.leaf], step[channels.leaf]
  kept = channels.sum(channels.share * laplace.retained_energy(at, width, channels.scale))
  return jnp.sum(channels.cost(kept / (2 * channels.leaf_share())))


def with_slopes(problem):
  """Returns a function of (cost, constraint) and their exact Jacobian."""

  def both(channels, x, *args):
    function = lambda x: problem(channels, x, *args)
    return function(x), jax.jacrev(function)(x)

  return both


def slsqp(problem, channels, target, starts, *args, lowest=-14):
  """Returns the least cost that SLSQP finds from several starts, inf if it meets no target."""
  last = {}
  evaluate = solver(problem, channels)
  args = jax.device_put([np.asarray(a, channels.scale.dtype) for a in args])

  def at(x):
    if last.get('x') != x.tobytes():
      values, slopes = evaluate(x, *args)
      last.update(x=x.tobytes(), values=values, slopes=slopes)
    return last['values'], last['slopes']

  best = math.inf
  for start in starts:
    found = minimize(
      lambda x: at(x)[0][0],
      start,
      jac=lambda x: at(x)[1][0],
      bounds=[(lowest, 6)] * len(start),
      constraints={
        'type': 'eq', 'fun': lambda x: at(x)[0][1] - target, 'jac': lambda x: at(x)[1][1]
      },
      method='SLSQP',
      options={'maxiter': 400, 'ftol': 1e-13},
    )  # fmt: skip
    if abs(at(found.x)[0][1] - target) < 1e-8:
      best = min(best, float(found.fun))
  return best


def starts(ours, seed):
  """Returns a start near our answer, and one that does not depend on it."""
  rng = np.random.default_rng(seed)
  ours = np.clip(ours, -10, 5)
  return [ours + 0.3 * rng.normal(size=ours.shape), np.full(ours.shape, 0.1)]


def assert_no_worse(cost, reference, tolerance=1e-6):
  """Checks a cost relatively, but for 1e-12: near zero a relative error means nothing."""
  assert cost <= reference * (1 + tolerance) + 1e-12, (cost, reference, cost / reference - 1)
