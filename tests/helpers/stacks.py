"""Matrices as leaves apart, and stacked in one leaf whose slices they are."""

import ml_dtypes
import numpy as np

FIELDS = (
  *('scale', 'threshold', 'sparsity', 'step', 'offset', 'levels', 'escaped', 'bits', 'error'),
  *('entropy', 'payload', 'laplace_fit', 'dead_channels', 'dead_rows'),
)
"""Arrays of a `LeafAllocation`."""

COUNT = 4


def layers(dtype=np.float32, shape=(48, 40), seed=0):
  """Matrices of scales and tails of their own; some have outliers, one has few magnitudes."""
  rng = np.random.default_rng(seed)
  found = [0.02 * 3**i * rng.laplace(size=shape) for i in range(COUNT)]
  found[1][0, :3] = 40, -50, 60
  found[2] = np.sign(found[2]) * np.where(np.abs(found[2]) > 0.1, 0.25, 0.125)
  return [layer.astype(dtype) for layer in found]


def other(dtype=np.float32):
  return np.random.default_rng(9).laplace(size=(30, 50)).astype(dtype)


def apart(dtype=np.float32, **options):
  """A tree with each matrix in a leaf of its own."""
  named = {f'layer{i}': layer for i, layer in enumerate(layers(dtype, **options))}
  return {'a': other(dtype), **named, 'norm': np.ones(7, np.float32)}


def stacked(dtype=np.float32, shape=(COUNT,), **options):
  """The same tree with the matrices in one leaf, their axes in front."""
  stack = np.stack(layers(dtype, **options))
  stack = stack.reshape(*shape, *stack.shape[1:])
  return {'a': other(dtype), 'layer': stack, 'norm': np.ones(7, np.float32)}


def axes_of_stack(shape=(COUNT,)):
  """`slices=` of the stacked tree."""
  return lambda path, leaf: len(shape) if path == 'layer' else 0


DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
