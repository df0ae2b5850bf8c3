"""Leaves that were quantized before keep their few values."""

import warnings

import ml_dtypes
import numpy as np
import pytest

import opq_jax

RNG = np.random.default_rng


def drawn(values, shape=(96, 128), seed=0):
  """Values that occur more rarely the farther they are from the first."""
  share = 0.5 ** np.arange(len(values))
  return RNG(seed).choice(np.asarray(values), shape, p=share / share.sum())


FEW = {
  'binary': [0.03, -0.03],
  'ternary': [0, 0.03, -0.03],
  'zero or one value': [0, 0.7],
  'two of one sign': [0.1, 0.7],
  'two of two signs': [-1.3, 2.7],
  'two and zero': [0, 0.1, 0.7],
  'far apart': [1e-3, -3.3e2],
}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('rate', [5.0, 12.0, 18.0])
@pytest.mark.parametrize('kind', FEW)
def test_leaves_of_two_or_three_values_are_exact(kind, rate, dtype):
  few = drawn(FEW[kind]).astype(dtype)
  params = {'few': few, 'dense': RNG(1).laplace(size=(256, 256)).astype(dtype)}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    allocation = opq_jax.allocate(params, compression_rate=rate)
  state = opq_jax.init_state(params, allocation)
  values = opq_jax.apply_compression(params, state)
  np.testing.assert_array_equal(np.asarray(values['few']), few)
  loaded, _ = opq_jax.load(opq_jax.file.serialize(params, state))
  np.testing.assert_array_equal(loaded['few'], few)
  # at the bits of its own entropy, and the other leaf has what is left
  _, counts = np.unique(few, return_counts=True)
  entropy = -np.sum(counts / few.size * np.log2(counts / few.size))
  assert float(allocation.tree['few'].payload) == pytest.approx(entropy, abs=0.02)
  assert float(allocation.tree['few'].error) == 0


@pytest.mark.parametrize('steps', [7, 127])
def test_a_grid_of_integers_is_kept_to_float32s_last_bits(steps):
  rounded = np.clip(np.round(RNG(0).laplace(size=(256, 256)) * steps / 5), -steps, steps)
  weights = (rounded * 0.003).astype(np.float32)
  with pytest.warns(UserWarning, match='found .* where 8, a rate of 4 was asked'):
    allocation = opq_jax.allocate(weights, bits_per_weight=8.0)
  values = opq_jax.apply_compression(weights, opq_jax.init_state(weights, allocation))
  np.testing.assert_allclose(np.asarray(values), weights, rtol=0, atol=0.003 * 2e-3)
  assert float(allocation.tree.payload) < 8


def test_a_trellis_leaves_what_is_exact_as_it_is():
  params = {'few': drawn(FEW['ternary']).astype('f4'), 'dense': RNG(1).laplace(size=(128, 128))}
  params['dense'] = params['dense'].astype('f4')
  trellis = opq_jax.encoders.Trellis()
  coded, *_ = opq_jax.compress(params, bits_per_weight=2.5, encoder=trellis)
  np.testing.assert_array_equal(np.asarray(coded['few']), params['few'])


@pytest.mark.parametrize('name', ['float8_e4m3fn', 'float8_e5m2'])
def test_float8_checkpoints_are_read_and_compressed(tmp_path, name):
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
def test_arrays_of_the_other_byte_order_are_the_same(dtype):
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
def test_finite_float16_weights_stay_finite(scale):
  weights = np.clip(RNG(0).laplace(scale=scale, size=(128, 64)), -65504, 65504).astype('f2')
  for rate in (6.0, 20.0):
    state = opq_jax.init_state(weights, opq_jax.allocate(weights, compression_rate=rate))
    assert np.isfinite(np.asarray(opq_jax.apply_compression(weights, state))).all()
