"""Narrow dtypes, the other byte order, and the ends of what a dtype holds."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import allocate
from tests.helpers.allocations import measured, tree

RNG = np.random.default_rng


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_allocate_narrow_dtypes(dtype):
  params = tree(dtype=dtype)
  bits, _, _ = measured(params, allocate(params, compression_rate=15.0))
  assert bits == pytest.approx(32 / 15, rel=0.01)


def test_allocate_grid_of_bfloat16():
  wide = jnp.asarray(RNG(0).laplace(size=(256, 64)), jnp.bfloat16).astype(jnp.float32)
  for bits in (2.0, 5.0, 6.5):
    leaf, same = (
      allocate({'w': w}, bits_per_weight=bits).tree['w'] for w in (wide.astype(jnp.bfloat16), wide)
    )
    assert float(leaf.error) <= 1.02 * float(same.error)
    assert float(leaf.step) == pytest.approx(float(same.step), rel=0.03)


@pytest.mark.parametrize('name', ['float8_e4m3fn', 'float8_e5m2'])
def test_compress_float8(tmp_path, name):
  import safetensors.numpy

  from opq_jax import cli
  from opq_jax.weights import read_weights

  weights = (RNG(0).laplace(size=(96, 64)) * 20).astype(getattr(ml_dtypes, name))
  path = tmp_path / 'f8.safetensors'
  safetensors.numpy.save_file({'w': weights, 'b': np.ones(3, 'f4')}, path)
  read = read_weights(path)['w']
  assert read.dtype == weights.dtype and read.tobytes() == weights.tobytes()
  assert cli.main(['compress', str(path), str(tmp_path / 'f8.opq'), '--bits-per-weight', '9']) == 0
  loaded, _ = opq_jax.load(tmp_path / 'f8.opq')
  assert loaded['w'].dtype == weights.dtype
  np.testing.assert_array_equal(loaded['w'].astype('f4'), weights.astype('f4'))
  assert cli.main(['verify', str(tmp_path / 'f8.opq'), '--against', str(path)]) == 0


@pytest.mark.parametrize('dtype', ['f4', 'f2'])
def test_allocate_byte_order(dtype):
  weights = RNG(0).laplace(size=(64, 48)).astype(f'<{dtype}')
  results = []
  for order in '<>':
    params = {'w': weights.astype(f'{order}{dtype}')}
    state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.0))
    codes = opq_jax.encode(params, state)
    values = opq_jax.apply_compression(params, state)
    np.testing.assert_array_equal(opq_jax.decode(codes, state, params)['w'], values['w'])
    results.append((np.asarray(values['w']), opq_jax.file.serialize(params, state)))
  np.testing.assert_array_equal(results[0][0], results[1][0])
  assert results[0][1] == results[1][1]


@pytest.mark.parametrize('scale', [2e3, 2e4])
def test_allocate_float16_is_finite(scale):
  weights = np.clip(RNG(0).laplace(scale=scale, size=(128, 64)), -65504, 65504).astype('f2')
  for rate in (6.0, 20.0):
    state = opq_jax.init_state(weights, opq_jax.allocate(weights, compression_rate=rate))
    assert np.isfinite(np.asarray(opq_jax.apply_compression(weights, state))).all()
