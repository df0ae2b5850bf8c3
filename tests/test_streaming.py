"""Files of trees that never were in memory: the bytes of the others, and what it takes."""

import functools
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from experiments.benchmarks import large_trees
from opq_jax import streaming

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
  return streaming.open_safetensors(tmp_path / 'net.safetensors')


@pytest.mark.filterwarnings('ignore:the Laplace density')
@pytest.mark.parametrize('targets', TARGETS, ids=['rate', 'sparsity'])
def test_the_file_is_that_of_the_tree_in_memory(stored, tmp_path, targets):
  axis = lambda path, _: 0 if path == 'conv.weight' else -1
  done = streaming.compress(
    stored, tmp_path / 'net.opq', channel_axis=axis, metadata={'a': 'b'}, **targets
  )
  state = opq_jax.init_state(tree(), opq_jax.allocate(tree(), channel_axis=axis, **targets))
  opq_jax.save(tmp_path / 'expected.opq', tree(), state, {'a': 'b'})
  assert (tmp_path / 'net.opq').read_bytes() == (tmp_path / 'expected.opq').read_bytes()
  metadata = {'a': 'b'}
  assert done.report == opq_jax.size_report(tree(), state, channel_axis=axis, metadata=metadata)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
  weights = np.ones((8, 8), np.float32)
  weights[3, 3] = np.nan
  safetensors.numpy.save_file({'w': weights}, tmp_path / 'net.safetensors')
  (tmp_path / 'net.opq').write_bytes(b'old')
  leaves = streaming.open_safetensors(tmp_path / 'net.safetensors')
  with pytest.raises(ValueError, match='w: found NaN'):
    streaming.compress(leaves, tmp_path / 'net.opq')
  assert (tmp_path / 'net.opq').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['net.opq', 'net.safetensors']


@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'changed'])
def test_a_damaged_file_is_named(tmp_path, damage):
  path = tmp_path / 'net.safetensors'
  safetensors.numpy.save_file({'w': np.ones((64, 64), np.float32)}, path)
  leaf = streaming.open_safetensors(path)['w']
  if damage == 'changed':
    safetensors.numpy.save_file({'w': np.ones((4, 64), np.float32)}, path)
    with pytest.raises(ValueError, match=r'net.safetensors: w: found \(4, 64\), expected'):
      leaf.read()
    return
  contents = {'cut': path.read_bytes()[:-1], 'text': b'no weights', 'empty': b''}
  path.write_bytes(contents[damage])
  for call in (streaming.open_safetensors, streaming.is_streamable, lambda _: leaf.read()):
    with pytest.raises(ValueError, match=r'net.safetensors: expected a safetensors file'):
      call(path)


def test_an_opq_file_is_not_taken_for_weights(tmp_path):
  params = {'w': np.ones((8, 8), np.float32)}
  state = opq_jax.CompressionState({'w': None})
  opq_jax.save(tmp_path / 'net.safetensors', params, state)
  assert not streaming.is_streamable(tmp_path / 'net.safetensors')
  assert not streaming.is_streamable(tmp_path)


def test_peak_memory_is_that_of_a_leaf():
  found = large_trees.run(weights=80_000_000, leaf=8_000_000, folder=None)
  assert found['original'] >= 10 * found['largest']
  # three times the largest leaf, and a constant: libraries, what is compiled, and the pieces
  assert found['peak'] - found['constant'] <= 3 * found['largest'] + 140e6
  assert found['peak'] - found['one'] <= 3 * found['largest']
