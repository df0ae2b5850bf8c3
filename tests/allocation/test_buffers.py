"""Masks under names that say nothing: their values do."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.allocation.buffers import is_buffer
from opq_jax.weights import compress_stored, open_weights

AHEAD = np.triu(np.ones((40, 40), bool), 1)
MASKS = {
  '-inf': np.where(AHEAD, -np.inf, 0),
  'least': np.where(AHEAD, np.finfo(np.float32).min, 0),
  '-1e4': np.where(AHEAD, -1e4, 0),
  '0 and 1': np.where(AHEAD, 0.0, 1.0),
  'ones': np.ones((40, 40)),
  'four axes': np.where(AHEAD, -1e9, 0)[None, None],
}
WEIGHTS = {
  'zeros': np.zeros((40, 40)),
  'two values': np.where(AHEAD, -0.5, 0),
  'signs': np.where(AHEAD, -1.0, 1.0),
  'one that is none': np.where(AHEAD, -np.inf, np.eye(40) / 2),
  'large': np.where(AHEAD, -1e4, 3.0),
}


def network(mask, dtype=np.float32):
  kernel = np.random.default_rng(0).laplace(size=(64, 48)).astype(dtype)
  with np.errstate(over='ignore'):
    return {'causal': np.asarray(mask).astype(dtype), 'w': kernel}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('name', MASKS)
def test_allocate_leaves_masks(name, dtype):
  params = network(MASKS[name], dtype)
  with pytest.warns(UserWarning, match='causal: found masks by their values'):
    network_ = opq_jax.compress(params, compression_rate=8.0)
  assert network_.allocation.tree['causal'] is None
  loaded, _ = opq_jax.load(opq_jax.file.serialize(network_.params, network_.state))
  assert loaded['causal'].tobytes() == params['causal'].tobytes()
  alone = opq_jax.allocate({'w': params['w']}, compression_rate=8.0)
  assert float(network_.allocation.tree['w'].step) == float(alone.tree['w'].step)


@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_are_no_masks(name):
  assert not is_buffer(WEIGHTS[name].astype(np.float32))
  assert not is_buffer(jnp.asarray(WEIGHTS[name], jnp.bfloat16))


def test_allocate_takes_masks_that_are_chosen():
  params = network(MASKS['0 and 1'])
  allocation = opq_jax.allocate(params, compression_rate=8.0, compressible=lambda *_: True)
  assert allocation.tree['causal'] is not None


@pytest.mark.parametrize('flags', [[], ['--trellis']])  # leaf by leaf, and in memory
def test_command_leaves_masks(tmp_path, monkeypatch, capsys, flags):
  monkeypatch.chdir(tmp_path)
  params = network(MASKS['least'])
  safetensors.numpy.save_file(params, 'net.safetensors')
  assert cli.main(['compress', 'net.safetensors', 'net.opq', *flags]) == 0
  assert 'by name or values: masks by their values (causal)' in capsys.readouterr().err
  assert opq_jax.load('net.opq')[0]['causal'].tobytes() == params['causal'].tobytes()
  assert cli.main(['verify', 'net.opq', '--against', 'net.safetensors']) == 0


def test_compress_stored_leaves_masks(tmp_path):
  params = network(MASKS['-inf'], ml_dtypes.bfloat16)
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  with pytest.warns(UserWarning, match='causal: found masks'):
    compress_stored(
      open_weights(tmp_path / 'net.safetensors'), tmp_path / 'net.opq', compression_rate=8.0
    )
    allocation = opq_jax.allocate(params, compression_rate=8.0)
  opq_jax.save(tmp_path / 'again.opq', params, opq_jax.init_state(params, allocation))
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'again.opq').read_bytes()
