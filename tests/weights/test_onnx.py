"""ONNX files as weights: their tensors by name, and what the graph says of them."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import cli
from opq_jax.weights import graph_uses, is_streamable, open_weights, read_weights

onnx = pytest.importorskip('onnx')

from tests.helpers import onnx_graphs  # noqa: E402, needs onnx


def test_graph_tells_weights_and_axes(tmp_path):
  onnx.save(onnx_graphs.layers(), tmp_path / 'net.onnx')
  uses = graph_uses(tmp_path / 'net.onnx')
  assert {name: use.channel_axis for name, use in uses.items()} == {
    'conv': 0,
    'grouped': 0,
    'transposed': 1,
    'gemm': 0,
    'matmul': 1,
    'first': 0,
    'table': 1,
    'lstm/W': 1,
    'lstm/R': 1,
  }
  # a slice of fewer than a thousand weights would not pay for a grid of its own
  assert {name: use.slices for name, use in uses.items() if use.slices} == {}
  assert graph_uses(tmp_path / 'net.safetensors') is None


def test_directions_and_heads_are_slices(tmp_path):
  node = onnx.helper.make_node
  nodes = [
    node('GRU', ['x', 'W', 'R'], ['y'], hidden_size=32, direction='bidirectional'),
    node('MatMul', ['x', 'heads'], ['z']),
    node('Transpose', ['kernel'], ['turned'], perm=[1, 0]),
    node('MatMul', ['x', 'turned'], ['v']),
    # PyTorch's gates of an LSTM, put in order
    node('Slice', ['gates', 'a', 'b'], ['first']),
    node('Slice', ['gates', 'b', 'c'], ['second']),
    node('Concat', ['second', 'first'], ['ordered'], axis=0),
    node('Unsqueeze', ['ordered', 'a'], ['one']),
    node('LSTM', ['x', 'one', 'R1'], ['u'], hidden_size=8),
  ]
  zeros = {
    'W': np.zeros((2, 96, 40)),
    'R': np.zeros((2, 96, 32)),
    'heads': np.zeros((4, 32, 64)),
    'kernel': np.zeros((32, 64)),
    'gates': np.zeros((32, 40)),
    'R1': np.zeros((1, 32, 8)),
    'unread': np.zeros((64, 64)),
  }
  ends = {'a': np.array([0]), 'b': np.array([16]), 'c': np.array([32])}
  onnx.save(onnx_graphs.model(nodes, {}, {}, zeros | ends), tmp_path / 'net.onnx')
  uses = graph_uses(tmp_path / 'net.onnx')
  assert {name: use[1:] for name, use in uses.items()} == {
    'W': (1, 1),
    'R': (1, 1),
    'heads': (2, 1),
    'kernel': (0, 0),
    'gates': (0, 0),
    'R1': (1, 0),
  }


def test_graph_is_followed_by_all_commands(tmp_path, monkeypatch, capsys):
  """Names that would tell other axes, or biases, are not asked."""
  monkeypatch.chdir(tmp_path)
  node = onnx.helper.make_node
  nodes = [
    node('GRU', ['x', 'W', 'R'], ['y'], hidden_size=32, direction='bidirectional'),
    node('Gemm', ['x', 'up.weight.bias'], ['z']),
  ]
  arrays = {
    'W': onnx_graphs.laplace(2, 96, 40),
    'R': onnx_graphs.laplace(2, 96, 32),
    'up.weight.bias': onnx_graphs.laplace(40, 16),
    'scores.weight': onnx_graphs.laplace(40, 40),
    'brain': onnx_graphs.laplace(8).astype(ml_dtypes.bfloat16),
    'count': np.array(3),
  }
  onnx.save(onnx_graphs.model(nodes, {}, {}, arrays), 'net.onnx')
  assert is_streamable('net.onnx')
  assert cli.main(['compress', 'net.onnx', 'net.opq', '--rate', '8']) == 0
  note = 'read by no product and no look-up of the graph (scores.weight)'
  assert note in ' '.join(capsys.readouterr().err.split())
  assert cli.main(['verify', 'net.opq', '--against', 'net.onnx']) == 0
  assert cli.main(['inspect', 'net.opq']) == 0
  with opq_jax.OpqFile('net.opq') as file:
    assert {name for name in file if file.grids(name)} == {'W', 'R', 'up.weight.bias'}
    assert {name: file.slices(name) for name in ('W', 'R', 'up.weight.bias')} == {
      'W': 1,
      'R': 1,
      'up.weight.bias': 0,
    }
    assert file.metadata['channel_axes'].split() == ['W=1', 'R=1', 'up.weight.bias=1']
    for name in ('scores.weight', 'brain', 'count'):
      assert file[name].dtype == arrays[name].dtype
      assert file[name].tobytes() == arrays[name].tobytes()


def branches():
  """A model whose weights stand in the branches of an If, under one name, and in a Constant."""
  node, proto = onnx.helper.make_node, onnx.numpy_helper.from_array
  value = onnx.helper.make_tensor_value_info
  graphs = []
  for seed in (0, 1):
    weight = proto(onnx_graphs.laplace(64, 32, seed=seed), 'w')
    nodes = [node('MatMul', ['x', 'w'], ['inner'])]
    output = value('inner', onnx.TensorProto.FLOAT, [1, 32])
    graphs.append(onnx.helper.make_graph(nodes, f'branch {seed}', [], [output], [weight]))
  held = proto(onnx_graphs.laplace(32, 16), 'held')
  nodes = [
    node('Constant', [], ['constant'], value=held),
    node('If', ['is_first'], ['a'], name='choice', then_branch=graphs[0], else_branch=graphs[1]),
    node('MatMul', ['a', 'constant'], ['y']),
  ]
  net = onnx_graphs.model(nodes, {'x': [1, 64]}, {'y': [1, 16]}, {})
  net.graph.input.append(value('is_first', onnx.TensorProto.BOOL, []))
  return net


def test_weights_of_branches_are_exported(tmp_path, monkeypatch):
  pytest.importorskip('onnxruntime')
  monkeypatch.chdir(tmp_path)
  onnx.save(branches(), 'net.onnx')
  assert set(graph_uses('net.onnx')) == {'constant', 'w', 'choice/then_branch/w'}
  assert cli.main(['compress', 'net.onnx', 'net.opq', '--bits-per-weight', '4']) == 0
  assert cli.main(['export', 'net.opq', 'small.onnx', '--into', 'net.onnx']) == 0
  size = lambda name: pathlib.Path(name).stat().st_size
  assert size('small.onnx') < 0.5 * size('net.onnx')
  x = onnx_graphs.laplace(1, 64)
  with opq_jax.OpqFile('net.opq') as file:
    for is_first, name in ((False, 'w'), (True, 'choice/then_branch/w')):
      (y,) = onnx_graphs.run('small.onnx', x=x, is_first=np.array(is_first)).values()
      np.testing.assert_allclose(y, x @ file[name] @ file['constant'], rtol=1e-4, atol=1e-4)


def test_data_in_other_files(tmp_path):
  kernel = onnx_graphs.laplace(64, 32)
  net = onnx_graphs.model(
    [onnx.helper.make_node('MatMul', ['x', 'w'], ['y'])], {'x': [1, 64]}, {}, {'w': kernel}
  )
  (tmp_path / 'inner').mkdir()
  path = tmp_path / 'inner/net.onnx'
  onnx.save(net, path, save_as_external_data=True, location='net.data', size_threshold=0)
  assert read_weights(path)['w'].tobytes() == kernel.tobytes()
  (tmp_path / 'inner/net.data').rename(tmp_path / 'net.data')
  leaf = open_weights(path)['w']
  with pytest.raises((ValueError, OSError), match=r'net\.(onnx|data)'):
    leaf.read()
  outside = onnx.load(path, load_external_data=False)
  outside.graph.initializer[0].external_data[0].value = '../net.data'
  path.write_bytes(outside.SerializeToString())
  with pytest.raises(ValueError, match=r'net.onnx: expected an ONNX file whose data are whole'):
    open_weights(path)['w'].read()


def test_onnx_damage(tmp_path):
  path = tmp_path / 'net.onnx'
  data = onnx_graphs.layers().SerializeToString()
  for size in (3, 20, 400, len(data) // 2, len(data) - 100):
    path.write_bytes(data[:size])
    for read in (read_weights, open_weights, graph_uses):
      with pytest.raises(ValueError, match=r'net.onnx: expected an ONNX file, found this'):
        read(path)
  short = onnx.load_from_string(data)
  short.graph.initializer[0].dims[0] = 1 << 40
  path.write_bytes(short.SerializeToString())
  with pytest.raises(ValueError, match=r'net.onnx: expected an ONNX file whose data are whole'):
    read_weights(path)
