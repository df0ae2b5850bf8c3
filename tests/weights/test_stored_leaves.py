"""Leaves that stay on disk until they are read."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.weights import is_streamable, open_weights
from tests.helpers.weight_trees import large_tree


def test_open_weights_names_no_checkpoint(orbax_folder, tmp_path):
  leaf = open_weights(orbax_folder)['params']['conv']['bias']
  np.testing.assert_array_equal(leaf.read(), large_tree()['conv.bias'])
  shutil.rmtree(orbax_folder)
  orbax_folder.mkdir()
  for call in (open_weights, lambda _: leaf.read()):
    with pytest.raises((ValueError, OSError), match=f'{orbax_folder}'):
      call(orbax_folder)


def test_open_weights_names_text(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'net', {'w': np.ones((2, 2)), 'name': 'resnet'})
  for read in (open_weights, opq_jax.weights.read_weights):
    with pytest.raises(ValueError, match=r'net: name: found .* expected an array of numbers'):
      read(tmp_path / 'net')


@pytest.mark.parametrize('name', ['net.opq', 'net.safetensors', 'folder/model.safetensors'])
def test_open_weights_names_opq_files(tmp_path, name):
  """Codes and grids are no weights, whatever the file's name."""
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'config.json').write_text('{}')
  params = {'w': np.random.default_rng(0).laplace(size=(16, 16)).astype(np.float32)}
  network = opq_jax.compress(params, bits_per_weight=3.0)
  opq_jax.save(tmp_path / name, network.params, network.state)
  path = tmp_path / name.split('/')[0]
  with pytest.raises(ValueError, match=r'net\.opq.*suffix|found an \.opq file'):
    open_weights(path)


@pytest.mark.parametrize('name', ['net.npz', 'net.pt', 'net'])
def test_open_weights_names_other_formats(tmp_path, name):
  (tmp_path / name).write_bytes(b'anything')
  with pytest.raises(ValueError, match=r'net.*found suffix .*expected \.safetensors.*read_weights'):
    open_weights(tmp_path / name)


@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'changed'])
def test_open_weights_names_damaged_files(tmp_path, damage):
  path = tmp_path / 'net.safetensors'
  safetensors.numpy.save_file({'w': np.ones((64, 64), np.float32)}, path)
  leaf = open_weights(path)['w']
  if damage == 'changed':
    safetensors.numpy.save_file({'w': np.ones((4, 64), np.float32)}, path)
    with pytest.raises(ValueError, match=r'net.safetensors: w: found \(4, 64\), expected'):
      leaf.read()
    return
  contents = {'cut': path.read_bytes()[:-1], 'text': b'no weights', 'empty': b''}
  path.write_bytes(contents[damage])
  for call in (open_weights, is_streamable, lambda _: leaf.read()):
    with pytest.raises(ValueError, match=r'net.safetensors: expected a safetensors file'):
      call(path)


def test_is_streamable_refuses_opq(tmp_path):
  params = {'w': np.ones((8, 8), np.float32)}
  state = opq_jax.CompressionState({'w': None})
  opq_jax.save(tmp_path / 'net.safetensors', params, state)
  assert not is_streamable(tmp_path / 'net.safetensors')
  assert not is_streamable(tmp_path / 'net.npz')
