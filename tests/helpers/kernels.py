"""Codes of kernels whose weights are not alike."""

import numpy as np

from opq_jax.coding import trellis

RNG = np.random.default_rng


def smooth_codes(shape, seed=0):
  """Laplace weights whose windows are smooth and whose inputs and outputs differ in scale."""
  rng = RNG(seed)
  weights = rng.laplace(size=shape)
  small = [axis for axis, n in enumerate(shape) if 1 < n <= 7]
  for axis in small:
    weights = np.cumsum(weights, axis)
  for axis, n in enumerate(shape):
    if n > 7:
      factors = np.exp(0.5 * rng.normal(size=n))
      weights *= np.expand_dims(factors, [a for a in range(len(shape)) if a != axis])
  step = np.abs(weights).mean()
  return np.clip(np.trunc(weights / step), -127, 127).astype(np.int8)


def codes_along_the_trellis(shape, seed=0, torch=False):
  """Of the same weights as `smooth_codes`, chosen without contexts, in the order of the coder."""
  half = smooth_codes(shape, seed).astype(np.int8) // 2
  view = np.moveaxis(half.reshape(*shape[:2], -1), -1, 0) if torch else half
  state, subsets = 0, np.zeros(view.size, np.uint8)
  for i, k in enumerate(view.reshape(-1).tolist()):
    subsets[i] = trellis.SUBSET_OF[state]
    state = trellis.NEXT[state, k & 1]
  chosen = trellis.join(np.ascontiguousarray(view), subsets.reshape(view.shape))
  return np.moveaxis(chosen, 0, -1).reshape(shape).copy() if torch else chosen


def scaled_codes(shape, seed=1):
  """Laplace codes whose inputs and outputs differ by powers of two, and those scales."""
  rng = RNG(seed)
  inputs, outputs = (np.exp2(rng.integers(-2, 3, n)) for n in shape[-2:])
  scales = np.broadcast_to(inputs[:, None] * outputs, shape)
  codes = np.trunc(rng.laplace(size=shape) * scales)
  return np.clip(codes, -127, 127).astype(np.int8), scales
