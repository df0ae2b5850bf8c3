"""A small tree of weights, and the actual rate, sparsity and width of an allocation."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from opq_jax import encode, init_state
from opq_jax.coding.payload import encode_codes
from opq_jax.core.limits import ESCAPE

KINDS = {
  'laplace': lambda rng, shape: rng.laplace(size=shape),
  'normal': lambda rng, shape: rng.normal(size=shape),
  'student': lambda rng, shape: rng.standard_t(4, size=shape),
  'mixture': lambda rng, shape: rng.laplace(size=shape) * np.exp(0.7 * rng.normal(size=shape[-1])),
}


@functools.cache
def tree(kind='laplace', dtype=jnp.float32):
  """Returns three leaves of about 10,000 weights of some kind, and a bias."""
  rng = np.random.default_rng(0)
  shapes = {'a': (96, 64), 'b': (3, 3, 24, 32), 'c': (128, 48)}
  leaves = {k: jnp.asarray(0.1 * KINDS[kind](rng, s), dtype) for k, s in shapes.items()}
  return {**leaves, 'bias': jnp.ones(64, dtype)}


class Measured(NamedTuple):
  """Numbers of the actual codes of a tree.

  Attributes:
    bits: bits per weight of the payloads and of the escaped weights beside them.
    sparsity: share of pruned weights.
    width: mean bits of a survivor at a fixed width.
  """

  bits: float
  sparsity: float
  width: float


def measured(params, allocation):
  """Measures an allocation by its codes."""
  codes = encode(params, init_state(params, allocation))
  n = bits = zeros = width = kept = 0.0
  for name, leaf in allocation.tree.items():
    if leaf is None:
      continue
    code = np.asarray(codes[name])
    n += code.size
    escaped = int(np.sum(code == ESCAPE))
    bits += 8 * len(encode_codes(np.where(code == ESCAPE, np.int8(0), code), contexts=False))
    value_bits = 8 * np.dtype(params[name].dtype).itemsize
    bits += escaped * (value_bits + np.log2(code.size / max(escaped, 1)) + 1.44)
    zeros += np.sum(code == 0)
    survivors = (code != 0).reshape(-1, code.shape[-1]).sum(0)
    width += np.sum(survivors * np.asarray(leaf.bits, float)) + escaped * value_bits
    kept += survivors.sum()
  return Measured(bits / n, zeros / n, width / max(kept, 1))


def sample(shape, kind='laplace', dtype=np.float32, seed=0):
  """Draws weights of some kind."""
  rng = np.random.default_rng(seed)
  draw = {
    'laplace': lambda: rng.laplace(size=shape),
    'normal': lambda: rng.normal(size=shape),
    'student': lambda: rng.standard_t(3, size=shape),
    'few': lambda: rng.integers(-3, 4, size=shape),
  }
  return jnp.asarray(draw[kind](), dtype)
