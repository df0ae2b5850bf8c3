import os
import pickle
import sys

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.compression.codes import CompressionState
from opq_jax.core import trees
from opq_jax.weights import channel_axis, read_weights, write_safetensors


def flat_tree():
  draw = np.random.default_rng(0).normal
  return {
    'conv1.weight': draw(size=(4, 3, 2)).astype(np.float32),
    'dense/kernel': draw(size=(3, 2)).astype(ml_dtypes.bfloat16),
    'half': draw(size=5).astype(np.float16),
    'steps': np.array(7, np.int32),
    'empty': np.zeros((0, 2), np.float32),
    'nan': np.array([np.nan, -0.0, np.inf], np.float64),
    'flag': np.array([True, False]),
  }


def nested_tree():
  flat = flat_tree()
  return {
    'params': {'conv': {'kernel': flat['conv1.weight'], 'bias': flat['dense/kernel']}},
    'batch_stats': {'mean': flat['half'], 'count': flat['steps']},
  }


def assert_same(found, expected):
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  assert list(found) == list(expected)
  for name, leaf in expected.items():
    assert isinstance(found[name], np.ndarray), name
    assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
    assert found[name].tobytes() == leaf.tobytes(), name


def test_safetensors_round_trip(tmp_path):
  write_safetensors(tmp_path / 'net.safetensors', flat_tree())
  assert_same(read_weights(tmp_path / 'net.safetensors'), flat_tree())
  assert [path.name for path in tmp_path.iterdir()] == ['net.safetensors']


def test_safetensors_joins_the_names_of_a_tree(tmp_path):
  write_safetensors(tmp_path / 'net.safetensors', nested_tree())
  found = read_weights(str(tmp_path / 'net.safetensors'))
  assert_same(found, trees.named_leaves(nested_tree()))
  assert 'params/conv/kernel' in safetensors.numpy.load_file(tmp_path / 'net.safetensors')


def test_strides_do_not_reach_the_file(tmp_path):
  kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T
  write_safetensors(tmp_path / 'net.safetensors', {'kernel': kernel})
  np.testing.assert_array_equal(read_weights(tmp_path / 'net.safetensors')['kernel'], kernel)


def test_a_dtype_that_safetensors_lacks_is_named_and_nothing_is_written(tmp_path):
  with pytest.raises(ValueError, match=r'net\.safetensors: b: found dtype int4'):
    write_safetensors(tmp_path / 'net.safetensors', {'b': np.zeros(2, ml_dtypes.int4)})
  assert not list(tmp_path.iterdir())


def test_npz(tmp_path):
  tree = {name: leaf for name, leaf in flat_tree().items() if leaf.dtype != ml_dtypes.bfloat16}
  np.savez_compressed(tmp_path / 'net.npz', **tree)
  assert_same(read_weights(tmp_path / 'net.npz'), tree)


def test_flax_msgpack(tmp_path):
  (tmp_path / 'net.msgpack').write_bytes(flax.serialization.to_bytes(nested_tree()))
  assert_same(read_weights(tmp_path / 'net.msgpack'), nested_tree())


def test_opq(tmp_path):
  params = nested_tree()
  state = CompressionState(jax.tree.map(lambda _: None, params))
  opq_jax.save(tmp_path / 'net.opq', params, state)
  assert_same(read_weights(tmp_path / 'net.opq'), params)
  # an .opq file is a safetensors file, too, but not of weights
  (tmp_path / 'net.opq').rename(tmp_path / 'net.safetensors')
  assert_same(read_weights(tmp_path / 'net.safetensors'), params)


def test_orbax(tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'net', nested_tree())
  assert_same(read_weights(tmp_path / 'net'), nested_tree())
  assert_same(read_weights(tmp_path / 'net' / '..' / 'net'), nested_tree())


def test_orbax_manager_gives_the_latest_step(tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint')
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    for step in (2, 10):
      tree = {'kernel': np.full((2, 3), step, np.float32)}
      manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
  assert read_weights(tmp_path / 'run')['kernel'][0, 0] == 10
  assert read_weights(tmp_path / 'run' / '2')['kernel'][0, 0] == 2


def test_torch(tmp_path):
  torch = pytest.importorskip('torch')
  weights = {
    'conv1.weight': torch.randn(4, 3, 3, 3),
    'fc.weight': torch.randn(5, 4).to(torch.bfloat16).T,
    'bn.num_batches_tracked': torch.tensor(3),
  }
  expected = {
    'conv1.weight': weights['conv1.weight'].numpy(),
    'fc.weight': weights['fc.weight'].float().numpy().astype(ml_dtypes.bfloat16, order='C'),
    'bn.num_batches_tracked': np.array(3),
  }
  for name, saved in {
    'plain.pt': weights,
    'checkpoint.pth': {'epoch': 3, 'state_dict': weights, 'optimizer': {'lr': 0.1}},
    'deeper.pth': {'model': {'state_dict': weights}},
  }.items():
    torch.save(saved, tmp_path / name)
    assert_same(read_weights(tmp_path / name), expected)


def test_torch_pickles_are_not_executed(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(torch.nn.Linear(2, 2), tmp_path / 'module.pt')
  with pytest.raises(ValueError, match=r'module\.pt: expected a PyTorch state dict') as caught:
    read_weights(tmp_path / 'module.pt')
  assert 'False' not in str(caught.value)


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'net.pt').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match=r'net\.pt: .*pip install opq_jax\[torch\]'):
    read_weights(tmp_path / 'net.pt')


@pytest.mark.parametrize('suffix', ['.safetensors', '.npz', '.msgpack', '.opq', '.pt', '.pth'])
@pytest.mark.parametrize('data', [b'', b'no weights', bytes(64), b'\x83abc', b'PK\x03\x04abc'])
def test_malformed_files_are_named(tmp_path, suffix, data):
  if suffix in ('.pt', '.pth'):
    pytest.importorskip('torch')
  (tmp_path / f'bad{suffix}').write_bytes(data)
  with pytest.raises(ValueError, match=rf'bad\{suffix}: '):
    read_weights(tmp_path / f'bad{suffix}')


def test_objects_and_pickles_in_npz_are_refused(tmp_path):
  np.savez(tmp_path / 'net.npz', w=np.array([{'a': 1}], object))
  with pytest.raises(ValueError, match=r'net\.npz: .*Object arrays'):
    read_weights(tmp_path / 'net.npz')
  (tmp_path / 'net.npz').write_bytes(pickle.dumps({'w': 1}))
  with pytest.raises(ValueError, match=r'net\.npz: '):
    read_weights(tmp_path / 'net.npz')


def test_leaves_that_are_no_numbers_are_named(tmp_path):
  np.savez(tmp_path / 'net.npz', w=np.zeros(2), names=np.array(['a', 'b']))
  with pytest.raises(ValueError, match=r'net\.npz: names: found ndarray of dtype <U1'):
    read_weights(tmp_path / 'net.npz')
  np.savez(tmp_path / 'none.npz')
  with pytest.raises(ValueError, match=r'none\.npz: found no weights'):
    read_weights(tmp_path / 'none.npz')


def test_other_suffixes_and_folders_are_refused(tmp_path):
  (tmp_path / 'net.ckpt').write_bytes(b'')
  with pytest.raises(ValueError, match=r"net\.ckpt: found suffix '\.ckpt', expected \.safetensors"):
    read_weights(tmp_path / 'net.ckpt')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match=r'folder: found items .* expected an Orbax checkpoint'):
    read_weights(tmp_path / 'folder')


@pytest.mark.parametrize('name', ['no.safetensors', 'no.npz', 'no.msgpack', 'no.opq'])
def test_missing_files_are_missing(tmp_path, name):
  with pytest.raises(FileNotFoundError, match=name):
    read_weights(tmp_path / name)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'net.safetensors'
  path.write_bytes(b'old')

  def fail(*_):
    raise OSError('the disk is full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='the disk is full'):
    write_safetensors(path, flat_tree())
  assert path.read_bytes() == b'old'
  assert [file.name for file in tmp_path.iterdir()] == ['net.safetensors']


@pytest.mark.parametrize(
  ('path', 'shape', 'axis'),
  [
    ('layer1.0.conv1.weight', (16, 3, 3, 3), 0),
    ('encoder/layers/0/weight', (8, 4), 0),
    ('attn.in_proj_weight', (24, 8), 0),
    ('embeddings.word_embeddings.weight', (1000, 64), -1),
    ('transformer.wte.weight', (1000, 64), -1),
    ('time_embedding.linear_1.weight', (64, 32), 0),
    ('patch_embed.proj.weight', (64, 3, 16, 16), 0),
    ('patch_embed.weight', (64, 3, 16, 16), 0),
    ('params/conv/kernel', (3, 3, 8, 16), -1),
    ('params/embed/embedding', (1000, 64), -1),
    ('MobilenetV1/Conv2d_1_depthwise/depthwise_weights', (3, 3, 32, 1), -2),
    ('MobilenetV1/Conv2d_1_pointwise/weights', (1, 1, 32, 64), -1),
    ('weight', (8, 4), 0),
  ],
)
def test_channel_axis_goes_by_the_name(path, shape, axis):
  assert channel_axis(path, np.zeros(shape)) == axis
  assert channel_axis(path, np.zeros(shape), 'first') == 0
  assert channel_axis(path, np.zeros(shape), 'last') == -1


def test_channel_axis_of_an_unknown_mode():
  with pytest.raises(ValueError, match="w: found mode 'middle', expected auto, first or last"):
    channel_axis('w', np.zeros((2, 2)), 'middle')
