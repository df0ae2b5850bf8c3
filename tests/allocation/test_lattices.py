"""Leaves that were quantized before keep their few values."""

import warnings

import ml_dtypes
import numpy as np
import pytest

import opq_jax

RNG = np.random.default_rng


def drawn(values, shape=(96, 128), seed=0):
  """Draws values, each half as often as the one before it."""
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


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('rate', [5.0, 12.0, 18.0])
@pytest.mark.parametrize('kind', FEW)
def test_lattice_of_few_values(kind, rate, dtype):
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
def test_lattice_of_integers(steps):
  rounded = np.clip(np.round(RNG(0).laplace(size=(256, 256)) * steps / 5), -steps, steps)
  weights = (rounded * 0.003).astype(np.float32)
  with pytest.warns(UserWarning, match='found .* where 8, a rate of 4 was asked'):
    allocation = opq_jax.allocate(weights, bits_per_weight=8.0)
  values = opq_jax.apply_compression(weights, opq_jax.init_state(weights, allocation))
  np.testing.assert_allclose(np.asarray(values), weights, rtol=0, atol=0.003 * 2e-3)
  assert float(allocation.tree.payload) < 8


def test_trellis_keeps_lattices():
  params = {'few': drawn(FEW['ternary']).astype('f4'), 'dense': RNG(1).laplace(size=(128, 128))}
  params['dense'] = params['dense'].astype('f4')
  trellis = opq_jax.encoders.Trellis()
  coded, *_ = opq_jax.compress(params, bits_per_weight=2.5, encoder=trellis)
  np.testing.assert_array_equal(np.asarray(coded['few']), params['few'])
