"""Compressed networks as ONNX files, run by onnxruntime."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import cli
from opq_jax.compression import CompressionState
from opq_jax.export import write_onnx
from opq_jax.file import serialize
from tests.helpers import opq_files

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from tests.helpers import onnx_graphs  # noqa: E402, needs onnx

GOLDEN = sorted((pathlib.Path(__file__).parents[1] / 'golden').glob('version_*.opq'))


def empty_model(file, opset):
  """A model whose initializers are zeros of the shapes and dtypes of a file's leaves."""
  zeros = {name: np.zeros(file.shape(name), file.dtype(name)) for name in file}
  return onnx_graphs.model([], {}, {}, zeros, opset)


def test_layers_run_as_decompressed(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  onnx.save(onnx_graphs.layers(), 'net.onnx')
  assert cli.main(['compress', 'net.onnx', 'net.opq', '--bits-per-weight', '4']) == 0
  assert cli.main(['export', 'net.opq', 'small.onnx', '--into', 'net.onnx']) == 0
  assert cli.main(['decompress', 'net.opq', 'back.onnx', '--into', 'net.onnx']) == 0
  assert 'bytes of floats' not in capsys.readouterr().err
  size = lambda name: pathlib.Path(name).stat().st_size
  assert size('small.onnx') < 0.5 * size('net.onnx')
  x = onnx_graphs.laplace(1, 8, 10, 10)
  small, back = (onnx_graphs.run(name, x=x) for name in ('small.onnx', 'back.onnx'))
  assert small.keys() == {'g', 'i', 'l'}
  with opq_jax.OpqFile('net.opq') as file:
    compressed = [name for name in file if file.grids(name)]
    found = onnx_graphs.constants('small.onnx', compressed)
    for name in compressed:
      assert found[name].tobytes() == file[name].tobytes(), name
  for name in small:
    np.testing.assert_array_equal(small[name], back[name])
    assert not np.array_equal(back[name], onnx_graphs.run('net.onnx', x=x)[name])


@pytest.mark.parametrize('opset', [13, 21])
@pytest.mark.parametrize('path', GOLDEN, ids=lambda path: path.stem)
def test_all_kinds_of_leaves_are_exact(tmp_path, path, opset):
  with opq_jax.OpqFile(path) as file:
    # onnxruntime hands out no numbers of a byte
    leaves = {name: file[name] for name in file if 'float8' not in file.dtype(name).name}
    onnx.save(empty_model(file, opset), tmp_path / 'net.onnx')
    written = write_onnx(tmp_path / 'small.onnx', file, tmp_path / 'net.onnx')
  brains = {name for name, array in leaves.items() if array.dtype == ml_dtypes.bfloat16}
  found = onnx_graphs.constants(tmp_path / 'small.onnx', list(leaves), brains)
  for name, array in leaves.items():
    array = array.astype(np.float32) if name in brains else array
    assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
  assert all(leaf.bytes < leaf.float_bytes for leaf in written.leaves if not leaf.reason)


@pytest.mark.parametrize(
  ('values', 'shape', 'opset', 'form', 'bits'),
  [
    (2, (500, 501), 13, 'UINT8 of 8 weights', 1),
    (3, (500, 501), 13, 'UINT8 of 5 weights', 1.6),
    (6, (500, 501), 13, 'UINT8 of 3 weights', 8 / 3),
    (15, (101, 101), 13, 'UINT8 of 2 weights', 4),
    (15, (101, 101), 9, 'UINT8', 8),
    (15, (101, 101), 21, 'UINT4', 4),
    (17, (64, 64), 21, 'UINT8', 8),
  ],
)
def test_few_values_share_a_byte(tmp_path, values, shape, opset, form, bits):
  grid = [0.75, -0.75, 0, *(sign * (1.25 + 0.5 * k) for k in range(20) for sign in (1, -1))]
  levels = np.float32(grid[:values])
  array = levels[np.random.default_rng(0).integers(0, values, shape)]
  state = CompressionState({'w': opq_files.leaf_state(array, levels=20)})
  with opq_jax.OpqFile(serialize({'w': array}, state)) as file:
    assert np.unique(file['w']).size == values
    onnx.save(empty_model(file, opset), tmp_path / 'net.onnx')
    (leaf,) = write_onnx(tmp_path / 'small.onnx', file, tmp_path / 'net.onnx').leaves
    (found,) = onnx_graphs.constants(tmp_path / 'small.onnx', ['w']).values()
    assert found.tobytes() == file['w'].tobytes()
  assert leaf.form == form
  # tables have 256 rows of 32 bytes at most
  assert array.size * bits / 8 < leaf.bytes < array.size * bits / 8 + 9000
  assert leaf.bytes < leaf.float_bytes / 2


def test_files_that_do_not_fit(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  kernel, out = onnx_graphs.laplace(16, 64), pathlib.Path('small.onnx')
  network = opq_jax.compress({'kernel': kernel, 'other': kernel[:8]}, compression_rate=8.0)
  opq_jax.save('net.opq', network.params, network.state)
  arguments = ['export', 'net.opq', 'small.onnx', '--into', 'net.onnx']
  out.write_bytes(b'old')
  for arrays, message in (
    ({'another': kernel}, 'found no tensor of the name of a compressed leaf, expected one of'),
    ({'kernel': kernel.T}, 'kernel: found (64, 16), expected (16, 64)'),
    ({'kernel': kernel.astype(np.float16)}, 'found a tensor of float16, expected float32'),
  ):
    onnx.save(onnx_graphs.model([], {}, {}, arrays), 'net.onnx')
    assert cli.main(arguments) == 2
    assert message in ' '.join(capsys.readouterr().err.split())
  pathlib.Path('net.onnx').write_bytes(b'no model')
  assert cli.main(arguments) == 2
  assert 'net.onnx: expected an ONNX file, found this' in capsys.readouterr().err
  assert cli.main(['export', 'net.opq', 'small.bin', '--into', 'net.onnx']) == 2
  assert cli.main(['decompress', 'net.opq', 'small.onnx']) == 2
  assert 'needs --into NET' in capsys.readouterr().err
  assert out.read_bytes() == b'old'


def test_export_names_what_differs(tmp_path, monkeypatch, capsys):
  """Leaves of one of the two files, and uncompressed ones that were corrected."""
  monkeypatch.chdir(tmp_path)
  kernel, bias = onnx_graphs.laplace(64, 64), np.ones(64, np.float32)
  network = opq_jax.compress({'kernel': kernel, 'bias': bias, 'gone': kernel}, bits_per_weight=4.0)
  opq_jax.save('net.opq', network.params, network.state)
  node = onnx.helper.make_node
  nodes = [
    node('Gemm', ['x', 'kernel', 'bias'], ['a']),
    node('Gemm', ['a', 'added'], ['y']),
  ]
  arrays = {'kernel': kernel, 'bias': 0 * bias, 'added': kernel}
  net = onnx_graphs.model(nodes, {'x': [1, 64]}, {'y': [1, 64]}, arrays)
  onnx.save(net, 'net.onnx')
  assert cli.main(['export', 'net.opq', 'small.onnx', '--into', 'net.onnx']) == 0
  told = capsys.readouterr().err
  assert '1 leaves that are not compressed differ from those of net.onnx' in told
  assert '1 leaves of net.opq are no tensors of net.onnx: gone' in told
  assert '1 weights of net.onnx are not in net.opq, and stay, 16,' in told
  (y,) = onnx_graphs.run('small.onnx', x=np.ones((1, 64), np.float32)).values()
  with opq_jax.OpqFile('net.opq') as file:
    values = file['kernel']
  np.testing.assert_allclose(y, (values.sum(0) + 1)[None] @ kernel, rtol=1e-4, atol=1e-3)
