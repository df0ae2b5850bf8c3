"""Files of trees that never were in memory: the bytes of the others, and what it takes."""

import functools
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from experiments.benchmarks.resources import large_trees
from opq_jax.weights import compress_stored, is_streamable, open_weights, streaming
from opq_jax.weights import orbax as orbax_files

TARGETS = [{'compression_rate': 12.8}, {'sparsity': 0.6, 'bits': 3.0}]


@functools.cache
def tree():
  rng = np.random.default_rng(0)
  laplace = lambda *shape: rng.laplace(size=shape).astype(np.float32)
  return {
    'z.weight': laplace(1100, 1000),  # more than one piece
    'conv.weight': laplace(32, 8, 3, 3).astype(np.float16),
    'conv.bias': laplace(32),
    'table': laplace(96, 24).astype(ml_dtypes.bfloat16),
    'denormal': laplace(16, 16) * np.float32(1e-40),
    'empty': np.zeros((0, 5), np.float32),
    'step': np.array(3, np.int64),
    'flag': np.array([True]),
    'large': rng.integers(0, 9, 400_000).astype(np.int32),  # two blocks
  }


@pytest.fixture
def stored(tmp_path):
  safetensors.numpy.save_file(tree(), tmp_path / 'net.safetensors')
  return open_weights(tmp_path / 'net.safetensors')


@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.parametrize('targets', TARGETS, ids=['rate', 'sparsity'])
def test_the_file_is_that_of_the_tree_in_memory(stored, tmp_path, targets):
  axis = lambda path, _: 0 if path == 'conv.weight' else -1
  done = compress_stored(
    stored, tmp_path / 'net.opq', channel_axis=axis, metadata={'a': 'b'}, **targets
  )
  state = opq_jax.init_state(tree(), opq_jax.allocate(tree(), channel_axis=axis, **targets))
  opq_jax.save(tmp_path / 'expected.opq', tree(), state, {'a': 'b'})
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  metadata = {'a': 'b'}
  assert done.report == opq_jax.size_report(tree(), state, channel_axis=axis, metadata=metadata)


@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.parametrize('axis', [0, 1])
def test_escaped_weights_are_those_of_the_tree_in_memory(tmp_path, monkeypatch, axis):
  params = {'w': tree()['z.weight'].copy(), 'half': tree()['conv.weight'].reshape(32, -1).copy()}
  params['w'][[3, 700, 1099], [9, 0, 999]] = 3000, -5000, 4000
  params['half'][[0, 31], [5, 71]] = 900, -900
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  stored = open_weights(tmp_path / 'net.safetensors')
  # an allocation whose grids end below the outliers
  clipped = {name: np.clip(leaf, -6, 6) for name, leaf in params.items()}
  allocation = opq_jax.allocate(clipped, compression_rate=8.0, channel_axis=axis)
  monkeypatch.setattr(streaming.allocations, 'allocate', lambda *_, **__: allocation)
  done = compress_stored(stored, tmp_path / 'net.opq', compression_rate=8.0, channel_axis=axis)
  state = opq_jax.init_state(params, allocation)
  opq_jax.save(tmp_path / 'expected.opq', params, state)
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert done.report == opq_jax.size_report(params, state, channel_axis=axis)
  assert done.report.escaped >= 5
  loaded, _ = opq_jax.load(tmp_path / 'net.opq')
  assert loaded['w'][[3, 700, 1099], [9, 0, 999]].tolist() == [3000, -5000, 4000]


@functools.cache
def nested():
  """What Orbax may hold: no leaf without elements."""
  rest = {name: leaf for name, leaf in tree().items() if '.' not in name and leaf.size}
  conv = {'bias': tree()['conv.bias'], 'kernel': tree()['conv.weight']}
  return {'params': {'conv': conv, 'dense': [tree()['z.weight'], rest.pop('large')]}, **rest}


@pytest.fixture(params=['a checkpoint', 'a manager'])
def folder(request, tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint')
  if request.param == 'a checkpoint':
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'net', nested())
  else:
    with ocp.CheckpointManager(tmp_path / 'net') as manager:
      for step in (2, 10):
        changed = {**nested(), 'step': np.array(step)}
        manager.save(step, args=ocp.args.StandardSave(changed if step < 10 else nested()))
      manager.wait_until_finished()
  return tmp_path / 'net'


@pytest.mark.filterwarnings('ignore:the Laplace density')
def test_a_folder_of_orbax_is_read_leaf_by_leaf(folder, tmp_path, monkeypatch):
  targets, axis = TARGETS[0], lambda path, _: 0 if 'conv' in path else -1
  whole = opq_jax.weights.read_weights(folder)
  monkeypatch.delattr(orbax_files.OrbaxFolder, 'read')
  leaves = open_weights(folder)
  compress_stored(leaves, tmp_path / 'net.opq', channel_axis=axis, **targets)
  allocation = opq_jax.allocate(whole, channel_axis=axis, **targets)
  opq_jax.save(tmp_path / 'expected.opq', whole, opq_jax.init_state(whole, allocation))
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert opq_jax.load(tmp_path / 'net.opq')[0]['step'] == nested()['step']


def test_what_is_no_checkpoint_is_named(folder, tmp_path):
  leaf = open_weights(folder)['params']['conv']['bias']
  np.testing.assert_array_equal(leaf.read(), tree()['conv.bias'])
  shutil.rmtree(folder)
  folder.mkdir()
  for call in (open_weights, lambda _: leaf.read()):
    with pytest.raises((ValueError, OSError), match=f'{folder}'):
      call(folder)


def test_text_among_the_weights_is_named(tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint')
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'net', {'w': np.ones((2, 2)), 'name': 'resnet'})
  for read in (open_weights, opq_jax.weights.read_weights):
    with pytest.raises(ValueError, match=r'net: name: found .* expected an array of numbers'):
      read(tmp_path / 'net')


def test_metadata_that_are_no_strings_are_refused_before_anything_is_read(stored, tmp_path):
  with pytest.raises(ValueError, match=r"metadata: found \{'a': 1\}, expected strings only"):
    compress_stored(stored, tmp_path / 'net.opq', metadata={'a': 1})
  assert os.listdir(tmp_path) == ['net.safetensors']


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
  weights = np.ones((8, 8), np.float32)
  weights[3, 3] = np.nan
  safetensors.numpy.save_file({'w': weights}, tmp_path / 'net.safetensors')
  (tmp_path / 'net.opq').write_bytes(b'old')
  leaves = open_weights(tmp_path / 'net.safetensors')
  with pytest.raises(ValueError, match='w: found NaN'):
    compress_stored(leaves, tmp_path / 'net.opq')
  assert (tmp_path / 'net.opq').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['net.opq', 'net.safetensors']


@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'changed'])
def test_a_damaged_file_is_named(tmp_path, damage):
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


def test_an_opq_file_is_not_taken_for_weights(tmp_path):
  params = {'w': np.ones((8, 8), np.float32)}
  state = opq_jax.CompressionState({'w': None})
  opq_jax.save(tmp_path / 'net.safetensors', params, state)
  assert not is_streamable(tmp_path / 'net.safetensors')
  assert not is_streamable(tmp_path / 'net.npz')


@pytest.mark.parametrize('source', ['.safetensors', 'Orbax'])
def test_peak_memory_is_that_of_a_leaf(source):
  # what else runs only adds to a peak, one run in a few fails for it: the least of three counts
  for _ in range(3):
    found = large_trees.run(80_000_000, 8_000_000, None, source)
    if found['peak'] - found['one'] <= 3 * found['largest']:
      break
  assert found['original'] >= 10 * found['largest']
  # three times the largest leaf, and a constant: libraries, what is compiled, and the pieces
  assert found['peak'] - found['constant'] <= 3 * found['largest'] + 140e6
  assert found['peak'] - found['one'] <= 3 * found['largest']
