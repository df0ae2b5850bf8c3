"""Rounding, as an encoder of trees and of single leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax.encoders import Rounding


def problem(dtype='float32'):
  kernel = jnp.asarray(np.random.default_rng(0).laplace(size=(64, 48)), dtype)
  kernel = kernel.at[2, 3].set(200.0)  # escapes
  params = {'kernel': kernel, 'bias': jnp.ones(48)}
  return params, opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.0))


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rounding_is_apply_compression(dtype):
  params, grids = problem(dtype)
  expected = opq_jax.apply_compression(params, grids)
  coded = Rounding().choose_codes(params, grids)
  assert_same(tuple(coded), (expected, grids))
  assert_same(tuple(jax.jit(Rounding().choose_codes)(params, grids)), (expected, grids))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rounding_makes_masks_anew(dtype):
  params, grids = problem(dtype)
  grid = grids.tree['kernel']
  values, same = Rounding().choose_leaf(params['kernel'], grid, None, 0.0)
  assert_same((values, same), (opq_jax.apply_compression(params, grids)['kernel'], grid))
  # other weights than those that the grid was made for, in float32 as a fit gives them
  moved = -jnp.flip(params['kernel'].astype(jnp.float32) * 1.01)
  values, its_grid = Rounding().choose_leaf(moved, grid, None, 0.0)
  assert values.dtype == params['kernel'].dtype
  kinds = np.asarray(its_grid.kinds)
  rounded = np.asarray(moved.astype(dtype), np.float32)
  np.testing.assert_array_equal(kinds != 0, np.abs(rounded) > np.asarray(grid.threshold))
  assert kinds[-3, -4] == 2 and (kinds != np.asarray(grid.kinds)).any()
  assert_same(its_grid, dataclasses.replace(grid, kinds=its_grid.kinds))
  on_grid = kinds == 1
  error = np.abs(np.asarray(values, np.float32) - np.asarray(moved))[on_grid]
  assert error.max() <= 1.01 * float(grid.step)


def test_rounding_names_leaves_in_errors():
  params, grids = problem()
  with pytest.raises(ValueError, match='kernel: found shape'):
    Rounding().choose_codes({**params, 'kernel': params['kernel'][1:]}, grids)
  with pytest.raises(ValueError, match='bias: not found in the tree'):
    Rounding().choose_codes({'kernel': params['kernel']}, grids)
