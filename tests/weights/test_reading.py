import pickle
import shutil
import sys

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax.compression import CompressionState
from opq_jax.core import trees
from opq_jax.weights import npz, open_folder, open_weights, read_weights
from tests.helpers.weight_trees import assert_same, flat_tree, nested_tree


def test_read_weights_npz(tmp_path):
  tree = {name: leaf for name, leaf in flat_tree().items() if leaf.dtype != ml_dtypes.bfloat16}
  np.savez_compressed(tmp_path / 'net.npz', **tree)
  assert_same(read_weights(tmp_path / 'net.npz'), tree)


def test_read_weights_msgpack_lists(tmp_path):
  """An `nnx.List` has integers for names: read, compressed and loaded again."""
  draw = np.random.default_rng(0).laplace
  layers = {i: {'kernel': draw(size=(16, 16)).astype(np.float32)} for i in (0, 1, 10, 2)}
  tree = {'layers': layers, 'step': np.array(3, np.int32)}
  path = tmp_path / 'net.msgpack'
  path.write_bytes(flax.serialization.msgpack_serialize(tree))
  assert_same(read_weights(path), tree)
  network = opq_jax.compress(read_weights(path), compression_rate=8.0)
  opq_jax.save(tmp_path / 'net.opq', network.params, network.state)
  loaded, _ = opq_jax.load(tmp_path / 'net.opq')
  assert list(loaded['layers']) == [0, 1, 2, 10]


def test_read_weights_msgpack(tmp_path):
  (tmp_path / 'net.msgpack').write_bytes(flax.serialization.to_bytes(nested_tree()))
  assert_same(read_weights(tmp_path / 'net.msgpack'), nested_tree())


def test_read_weights_opq(tmp_path):
  params = nested_tree()
  state = CompressionState(jax.tree.map(lambda _: None, params))
  opq_jax.save(tmp_path / 'net.opq', params, state)
  assert_same(read_weights(tmp_path / 'net.opq'), params)
  # an .opq file is a safetensors file, too, but not of weights
  (tmp_path / 'net.opq').rename(tmp_path / 'net.safetensors')
  assert_same(read_weights(tmp_path / 'net.safetensors'), params)


def test_read_weights_orbax(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'net', nested_tree())
  assert_same(read_weights(tmp_path / 'net'), nested_tree())
  assert_same(read_weights(tmp_path / 'net' / '..' / 'net'), nested_tree())


def test_read_weights_orbax_names_trees_beside(tmp_path):
  import orbax.checkpoint as ocp

  for item in ('default', 'ema'):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'run' / item, {'kernel': np.full((2, 3), len(item))})
  for read in (read_weights, lambda path: open_weights(path)['kernel'].read()):
    with pytest.warns(UserWarning, match='run: ema: found trees beside default, left out'):
      read(tmp_path / 'run')


def test_read_weights_orbax_manager(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    for step in (2, 10):
      tree = {'kernel': np.full((2, 3), step, np.float32)}
      manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
  assert read_weights(tmp_path / 'run')['kernel'][0, 0] == 10
  assert read_weights(tmp_path / 'run' / '2')['kernel'][0, 0] == 2


def test_read_weights_orbax_unfinished(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'run' / '5' / 'net', {'kernel': np.ones(3, np.float32)})
    checkpointer.save(tmp_path / 'other', {'kernel': np.zeros(3, np.float32)})
  # as killed processes leave a step and an item
  for name in ('6.orbax-checkpoint-tmp-1760000000', '7.orbax-checkpoint-tmp'):
    shutil.copytree(tmp_path / 'other', tmp_path / 'run' / name)
  shutil.copytree(tmp_path / 'other', tmp_path / 'run' / '5' / 'opt.orbax-checkpoint-tmp-17')
  assert read_weights(tmp_path / 'run')['kernel'].tolist() == [1, 1, 1]
  shutil.rmtree(tmp_path / 'run' / '5')
  with pytest.raises(ValueError, match=r"found folders \['6\.orbax-checkpoint-tmp-17.*expected an"):
    read_weights(tmp_path / 'run')


def test_read_weights_orbax_damaged(tmp_path):
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'net', nested_tree())
  (tmp_path / 'net' / '_METADATA').write_bytes(b'{')
  with pytest.raises(ValueError, match='net: found metadata that Orbax cannot read, expected a'):
    read_weights(tmp_path / 'net')


def test_read_weights_torch(tmp_path):
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


def test_read_weights_refuses_pickled_code(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(torch.nn.Linear(2, 2), tmp_path / 'module.pt')
  with pytest.raises(ValueError, match=r'module\.pt: expected a PyTorch state dict') as caught:
    read_weights(tmp_path / 'module.pt')
  assert 'False' not in str(caught.value)


def test_read_weights_without_torch(tmp_path, monkeypatch):
  (tmp_path / 'net.pt').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match=r'net\.pt: .*pip install opq_jax\[torch\]'):
    read_weights(tmp_path / 'net.pt')


@pytest.mark.parametrize('suffix', ['.safetensors', '.npz', '.msgpack', '.opq', '.pt', '.pth'])
@pytest.mark.parametrize('data', [b'', b'no weights', bytes(64), b'\x83abc', b'PK\x03\x04abc'])
def test_read_weights_names_damaged_files(tmp_path, suffix, data):
  if suffix in ('.pt', '.pth'):
    pytest.importorskip('torch')
  (tmp_path / f'bad{suffix}').write_bytes(data)
  with pytest.raises(ValueError, match=rf'bad\{suffix}: '):
    read_weights(tmp_path / f'bad{suffix}')


def test_read_weights_refuses_npz_objects(tmp_path):
  np.savez(tmp_path / 'net.npz', w=np.array([{'a': 1}], object))
  with pytest.raises(ValueError, match=r'net\.npz: .*Object arrays'):
    read_weights(tmp_path / 'net.npz')
  (tmp_path / 'net.npz').write_bytes(pickle.dumps({'w': 1}))
  with pytest.raises(ValueError, match=r'net\.npz: '):
    read_weights(tmp_path / 'net.npz')


def test_read_weights_needs_weights(tmp_path):
  np.savez(tmp_path / 'none.npz')
  with pytest.raises(ValueError, match=r'none\.npz: found no weights'):
    read_weights(tmp_path / 'none.npz')


@pytest.mark.parametrize('suffix', ['.ckpt', '.th'])
def test_read_weights_of_training_checkpoints(tmp_path, suffix):
  torch = pytest.importorskip('torch')
  path = tmp_path / f'last{suffix}'
  torch.save({'state_dict': {'fc.weight': torch.ones(2, 3)}, 'epoch': 3}, path)
  assert read_weights(path)['fc.weight'].tolist() == [[1.0] * 3] * 2


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor', 'ignore:TypedStorage is deprecated')
def test_read_weights_torch_names_tensors_that_no_array_holds(tmp_path):
  torch = pytest.importorskip('torch')
  tensors = {
    'torch.qint8': torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 3, torch.qint8),
    'torch.sparse_coo': torch.eye(3).to_sparse(),
    'torch.bits8': torch.empty(2, 3, dtype=torch.bits8),
    'meta': torch.empty(2, 3, device='meta'),
  }
  for kind, tensor in tensors.items():
    saved = {'model': {'a.weight': torch.ones(2, 3), 'block': {'b.weight': [tensor]}}}
    torch.save(saved, tmp_path / 'c.pt')
    expected = rf'c\.pt: .*block/b\.weight/0: found a tensor of .*{kind}'
    with pytest.raises(ValueError, match=expected):
      read_weights(tmp_path / 'c.pt')


def test_open_folder_names_tensors_that_no_array_holds(tmp_path):
  """When it is opened, not when the leaf is read."""
  torch = pytest.importorskip('torch')
  (tmp_path / 'config.json').write_text('{}')
  tensors = {'a.weight': torch.ones(2, 3), 'b.weight': torch.eye(3).to_sparse()}
  torch.save(tensors, tmp_path / 'pytorch_model.bin')
  with pytest.raises(ValueError, match=r'pytorch_model\.bin: b\.weight: found .*sparse_coo'):
    open_folder(tmp_path)


@pytest.mark.filterwarnings('ignore:ComplexHalf support is experimental')
def test_read_weights_torch_complex(tmp_path):
  torch = pytest.importorskip('torch')
  values = np.array([[1 + 2j, -0.5j], [3, 0.25 - 1j]], np.complex64)
  tensor = torch.from_numpy(values)
  torch.save({'whole': tensor, 'lazy': tensor.conj()}, tmp_path / 'c.pt')
  leaves = read_weights(tmp_path / 'c.pt')
  np.testing.assert_array_equal(leaves['whole'], values)
  np.testing.assert_array_equal(leaves['lazy'], values.conj())
  if hasattr(ml_dtypes, 'complex32'):
    torch.save({'half': tensor.to(torch.complex32)}, tmp_path / 'c.pt')
    half = read_weights(tmp_path / 'c.pt')['half']
    assert half.dtype == ml_dtypes.complex32
    np.testing.assert_array_equal(half.astype(np.complex64), values)


def test_read_weights_torch_names_tensors_beside(tmp_path):
  torch = pytest.importorskip('torch')
  path, weights = tmp_path / 'c.pt', {'a.weight': torch.ones(2, 3)}
  beside = {
    'head': {'w': torch.ones(3)},
    'model_ema': {'shadow': [torch.zeros(2, 3)]},
    'mean': torch.ones(1, 3, 1, 1),
    'optimizer': {'state': {}},
    'epoch': 3,
  }
  torch.save({'model': {'state_dict': weights, 'seen': torch.tensor(1)}, **beside}, path)
  with pytest.warns(UserWarning) as notes:
    found = read_weights(path)
  assert list(found) == ['a.weight'] and len(notes) == 1
  text = str(notes[0].message)
  assert 'c.pt: head, model_ema, mean, model/seen: found tensors beside the state dict' in text
  # which one of several holds the network is not guessed
  torch.save({'model': weights, 'lm_head.weight': torch.ones(3, 2)}, path)
  with pytest.raises(ValueError, match=r'c\.pt: lm_head\.weight: found weights beside .* model,'):
    read_weights(path)


def test_model_folder_names_tensors_beside(tmp_path):
  torch = pytest.importorskip('torch')
  (tmp_path / 'config.json').write_text('{}')
  weights = {'a.weight': torch.ones(2, 3)}
  torch.save({'model': weights, 'model_ema': weights}, tmp_path / 'pytorch_model.bin')
  with pytest.warns(UserWarning, match=r'model\.bin: model_ema: found tensors beside') as notes:
    assert open_folder(tmp_path)['a.weight'].tolist() == [[1.0] * 3] * 2
  assert len(notes) == 1


def test_what_is_no_array_is_left_out_by_name(tmp_path):
  torch = pytest.importorskip('torch')
  kernel = np.ones((2, 3), np.float32)
  torch.save(
    {'w': torch.ones(2, 3), 'name': 'abc', 'n': 3, 'more': [{'x': b'y'}]}, tmp_path / 'a.pt'
  )
  content = {'net': {'w': kernel, 'name': 'abc'}, 'step': 3}
  (tmp_path / 'b.msgpack').write_bytes(flax.serialization.msgpack_serialize(content))
  np.savez(tmp_path / 'c.npz', w=kernel, who=np.array(['me', 'you']))
  for name, left in (('a.pt', 'more/0/x, name'), ('b.msgpack', 'net/name'), ('c.npz', 'who')):
    with pytest.warns(UserWarning, match=rf'{name}: {left}: found .* expected arrays of numbers'):
      found = read_weights(tmp_path / name)
    leaves = {path.rpartition('/')[2]: leaf for path, leaf in trees.named_leaves(found).items()}
    assert set(leaves) - {'n', 'step'} == {'w'} and leaves['w'].tolist() == kernel.tolist()
  np.savez(tmp_path / 'd.npz', who=np.array(['me']))
  with pytest.raises(ValueError, match='found no weights'):
    read_weights(tmp_path / 'd.npz')


def test_read_weights_orbax_of_several_trees(tmp_path):
  import orbax.checkpoint as ocp

  save = ocp.args.StandardSave
  with ocp.CheckpointManager(tmp_path / 'run', item_names=('net', 'opt')) as manager:
    manager.save(
      0, args=ocp.args.Composite(net=save({'w': np.ones(3)}), opt=save({'m': np.zeros(3)}))
    )
    manager.wait_until_finished()
  with pytest.raises(ValueError, match=r'found the trees net, opt, expected .*run/0/net'):
    read_weights(tmp_path / 'run')
  assert read_weights(tmp_path / 'run' / '0' / 'net')['w'].tolist() == [1, 1, 1]


def test_npz_there_and_back(tmp_path):
  tree = {'layer': {'kernel': np.arange(6.0).reshape(2, 3)}, 'file': np.int8([1]), 'x/y': np.eye(2)}
  npz.write(tmp_path / 'net.npz', tree)
  found = read_weights(tmp_path / 'net.npz')
  assert list(found) == ['file', 'layer/kernel', 'x/y']
  np.testing.assert_array_equal(found['layer/kernel'], tree['layer']['kernel'])
  with pytest.raises(ValueError, match=r'w: found dtype bfloat16, which \.npz cannot hold'):
    npz.write(tmp_path / 'bad.npz', {'w': np.zeros(2, ml_dtypes.bfloat16)})
  assert not (tmp_path / 'bad.npz').exists()


def test_read_weights_refuses_other_suffixes(tmp_path):
  (tmp_path / 'net.tar').write_bytes(b'')
  with pytest.raises(ValueError, match=r"net\.tar: found suffix '\.tar', expected \.safetensors"):
    read_weights(tmp_path / 'net.tar')
  (tmp_path / 'model.safetensors.index.json').write_text('{}')
  with pytest.raises(ValueError, match='found the index of shards, expected their folder'):
    read_weights(tmp_path / 'model.safetensors.index.json')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match=r'folder: found folders .* expected an Orbax checkpoint'):
    read_weights(tmp_path / 'folder')


@pytest.mark.parametrize('name', ['no.safetensors', 'no.npz', 'no.msgpack', 'no.opq'])
def test_read_weights_of_a_missing_file(tmp_path, name):
  with pytest.raises(FileNotFoundError, match=name):
    read_weights(tmp_path / name)
