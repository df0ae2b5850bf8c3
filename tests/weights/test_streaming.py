"""Files of trees that were never in memory: their bytes, and the memory that they take."""

import os

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from experiments.benchmarks.resources import large_trees
from opq_jax.weights import compress_stored, open_weights, streaming
from opq_jax.weights import orbax as orbax_files
from tests.helpers import stacks
from tests.helpers.weight_trees import large_nested_tree, large_tree

TARGETS = [{'compression_rate': 12.8}, {'sparsity': 0.6, 'bits': 3.0}]


@pytest.fixture
def stored(tmp_path):
  safetensors.numpy.save_file(large_tree(), tmp_path / 'net.safetensors')
  return open_weights(tmp_path / 'net.safetensors')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.parametrize('targets', TARGETS, ids=['rate', 'sparsity'])
def test_compress_stored_equals_save(stored, tmp_path, targets):
  axis = lambda path, _: 0 if path == 'conv.weight' else -1
  params, options = large_tree(), {'channel_axis': axis, 'metadata': {'a': 'b'}}
  done = compress_stored(stored, tmp_path / 'net.opq', **options, **targets)
  state = opq_jax.init_state(params, opq_jax.allocate(params, channel_axis=axis, **targets))
  opq_jax.save(tmp_path / 'expected.opq', params, state, {'a': 'b'})
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert done.report == opq_jax.size_report(params, state, **options)


@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.filterwarnings('ignore:sparsity. found .* equal weights are pruned together')
@pytest.mark.parametrize('targets', [*TARGETS, {'file_rate': 9.0}], ids=lambda each: '-'.join(each))
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_compress_stored_slices(tmp_path, targets, dtype):
  params, slices = stacks.stacked(dtype, shape=(2, 2)), stacks.axes_of_stack((2, 2))
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  stored, options = open_weights(tmp_path / 'net.safetensors'), {'slices': slices}
  done = compress_stored(stored, tmp_path / 'net.opq', **options, **targets)
  allocation = opq_jax.allocate(params, **options, **targets)
  state = opq_jax.init_state(params, allocation)
  opq_jax.save(tmp_path / 'expected.opq', params, state)
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert done.report == opq_jax.size_report(params, state)
  assert [leaf.slices for leaf in done.report.compressed] == [0, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.parametrize('axis', [0, -1])
def test_compress_stored_escaped_weights(tmp_path, monkeypatch, axis):
  params = {
    'w': large_tree()['z.weight'].copy(),
    'half': large_tree()['conv.weight'].reshape(32, -1).copy(),
  }
  places = [0, 63, 99], [30, 70, 109], [9, 0, 99]  # in the first piece, and the last of all
  params['w'][places] = 3000, -5000, 4000
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
  assert loaded['w'][places].tolist() == [3000, -5000, 4000]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the Laplace density')
def test_compress_stored_orbax_folder(orbax_folder, tmp_path, monkeypatch):
  targets, axis = TARGETS[0], lambda path, _: 0 if 'conv' in path else -1
  whole = opq_jax.weights.read_weights(orbax_folder)
  monkeypatch.delattr(orbax_files.OrbaxFolder, 'read')
  leaves = open_weights(orbax_folder)
  compress_stored(leaves, tmp_path / 'net.opq', channel_axis=axis, **targets)
  allocation = opq_jax.allocate(whole, channel_axis=axis, **targets)
  opq_jax.save(tmp_path / 'expected.opq', whole, opq_jax.init_state(whole, allocation))
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  assert opq_jax.load(tmp_path / 'net.opq')[0]['step'] == large_nested_tree()['step']


def test_compress_stored_checks_metadata(stored, tmp_path):
  with pytest.raises(ValueError, match=r"metadata: found \{'a': 1\}, expected strings only"):
    compress_stored(stored, tmp_path / 'net.opq', metadata={'a': 1})
  assert os.listdir(tmp_path) == ['net.safetensors']


def test_compress_stored_keeps_the_old_file(tmp_path):
  weights = np.ones((8, 8), np.float32)
  weights[3, 3] = np.nan
  safetensors.numpy.save_file({'w': weights}, tmp_path / 'net.safetensors')
  (tmp_path / 'net.opq').write_bytes(b'old')
  leaves = open_weights(tmp_path / 'net.safetensors')
  with pytest.raises(ValueError, match='w: found NaN'):
    compress_stored(leaves, tmp_path / 'net.opq')
  assert (tmp_path / 'net.opq').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['net.opq', 'net.safetensors']


@pytest.mark.slow
@pytest.mark.parametrize('source', ['.safetensors', 'Orbax'])
def test_compress_stored_peak_memory(source, monkeypatch):
  # compiled in less time: the trees take as much memory
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  found = large_trees.run(48_000_000, 8_000_000, None, source)
  # the whole tree would break both bounds
  assert found['original'] >= 6 * found['largest']
  # three times the largest leaf, and a constant: what is compiled for it, and the pieces
  assert found['peak'] - found['constant'] <= 3 * found['largest'] + 80e6
  assert found['peak'] - found['one'] <= 3 * found['largest']
