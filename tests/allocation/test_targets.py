"""Targets that are equivalent, and arguments that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import allocate, init_state
from tests.helpers.allocations import tree

A = np.ones((8, 8), np.float32) * np.linspace(-1, 1, 8, dtype=np.float32)


REFUSED = [
  ({'w': np.where(A > 0.9, np.nan, A)}, {}, 'w: found NaN'),
  ({'w': np.where(A > 0.9, np.inf, A)}, {}, 'w: found NaN or infinite'),
  ({}, {}, 'empty tree'),
  ({'b': A[0]}, {}, 'no leaf to compress'),
  ({'w': A}, {'compression_rate': 0.4}, 'compression_rate: found 0.4, expected'),
  ({'w': A}, {'compression_rate': 3.9, 'corrected': False}, 'found 3.9, expected compression_rate'),
  ({'w': A}, {'bits_per_weight': 0.0}, 'bits_per_weight: found 0.0, expected'),
  ({'w': A}, {'bits_per_weight': 2.0, 'compression_rate': 16.0}, 'expected one of them'),
  ({'w': A}, {'file_rate': 2.0, 'bits_per_weight': 16.0}, 'expected it alone'),
  ({'w': A}, {'file_rate': -1.0}, 'file_rate: found -1.0, expected'),
  ({'w': A}, {'compression_rate': 9.0, 'bits': 3.0}, 'together'),
  ({'w': A}, {'sparsity': 0.5}, 'sparsity alone'),
  ({'w': A}, {'bits': 3.0}, 'bits alone'),
  ({'w': A}, {'sparsity': 1.0, 'bits': 3.0}, 'sparsity: found 1.0, expected'),
  ({'w': A}, {'sparsity': 0.5, 'bits': 0.5}, 'bits: found 0.5, expected'),
  ({'w': A}, {'sparsity': 0.5, 'bits': 8.0}, 'bits: found 8.0, expected'),
  ({'w': A}, {'objective': 'best'}, "objective: found 'best', expected"),
  ({'w': A}, {'objective': {'v': 1.0}}, 'objective: found'),
  ({'w': A}, {'objective': {'w': -1.0}}, 'w: found an objective of -1.0, expected'),
  ({'w': A.astype(np.int32)}, {'compressible': lambda *_: True}, 'w: found int32, expected'),
  ({'w': A}, {'objective': {'w': A[0]}}, r'w: found an objective of shape \(8,\), expected one'),
  ({'w': A, 'v': A}, {'objective': {'w': 1.0, 'v': None}}, 'v: found an objective of shape None'),
  ({'w': A}, {'compression_rate': A[0]}, r'compression_rate: found shape \(8,\).*use jax.vmap'),
  ({'w': A, 's': A[0, 0]}, {'compressible': lambda *_: True}, 's: found a scalar, expected'),
  ({'w': A}, {'channel_axis': 2}, 'w: found channel_axis 2, expected'),
]


@pytest.mark.parametrize(('params', 'options', 'message'), REFUSED, ids=[r[2] for r in REFUSED])
def test_allocate_refuses(params, options, message):
  with pytest.raises(ValueError, match=message):
    allocate(jax.tree.map(jnp.asarray, params), **options)


def test_targets_are_equivalent():
  params = tree()
  one, other = allocate(params, compression_rate=16.0), allocate(params, bits_per_weight=2.0)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(x, y)
  variables = {'net': params}
  allocation = allocate(variables, file_rate=12.0)
  data = opq_jax.file.serialize(variables, init_state(variables, allocation))
  original = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert 12.0 <= original / len(data) <= 12.1
