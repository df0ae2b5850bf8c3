"""JAX functions as ONNX graphs, and with the weights of `.opq` files in them."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli, importers, models
from opq_jax.compression import CompressionState
from opq_jax.core import trees
from opq_jax.export import onnx_program, write_onnx
from opq_jax.importers import networks
from tests.helpers import language_models, onnx_graphs, opq_files

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('jax2onnx', reason='found no jax2onnx, expected it to convert functions')

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def images(count=2):
  return np.random.default_rng(0).uniform(-1, 1, (count, 32, 32, 3)).astype(np.float32)


def drawn(model, seed=0):
  """Random variables of a network: kernels that keep the variance of what they read."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    if kind in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    width = np.sqrt(np.prod(leaf.shape[:-1])) if kind == 'kernel' else 10
    return (rng.laplace(size=leaf.shape) / width).astype(np.float32)

  return jax.tree.map_with_path(draw, models.variable_shapes(model))


def saved(path, params, metadata=None):
  """Writes a tree into a file, large kernels on grids of 25 values; returns what it decodes to."""
  grid = {'threshold': 1 / 64, 'step': 1 / 64, 'levels': 12}
  record = lambda leaf: opq_files.leaf_state(leaf, **grid) if np.size(leaf) > 4000 else None
  opq_jax.save(path, params, CompressionState(jax.tree.map(record, params)), metadata=metadata)
  with opq_jax.OpqFile(path) as file:
    return file.params()


@pytest.mark.parametrize('name', ['mobilenet_v2', 'resnet18'])
def test_networks_in_onnxruntime(tmp_path, name):
  """The weights of a file, in the program of its network: the logits of JAX."""
  options = {'width': 0.25} if name.startswith('mobilenet') else {}
  model = models.create(name, num_classes=10, **options)
  variables = saved(tmp_path / 'net.opq', drawn(model))
  program = onnx_program(model.apply, variables, IMAGE)
  assert program.ByteSize() < 200_000
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    written = write_onnx(tmp_path / 'net.onnx', file, program)
  assert not (written.changed or written.without_place or written.left)
  assert {leaf.form for leaf in written.leaves} == {'UINT8'}
  (logits,) = onnx_graphs.run(tmp_path / 'net.onnx', input=images()).values()
  expected = np.asarray(jax.jit(model.apply)(variables, images()))
  # of logits of 10 that is 4e-5
  np.testing.assert_allclose(logits, expected, atol=4e-6 * np.abs(expected).max())
  assert logits.std() > 0.1


def test_depthwise_convolutions_stay_whole():
  """Not the sum of shifted products that is faster in XLA on a CPU."""
  model = models.create('mobilenet_v1', num_classes=10, width=0.25)
  nodes = onnx_program(model.apply, models.variable_shapes(model), IMAGE).graph.node
  groups = [
    attribute.i
    for node in nodes
    if node.op_type == 'Conv'
    for attribute in node.attribute
    if attribute.name == 'group'
  ]
  assert len([node for node in nodes if node.op_type == 'Conv']) == 27
  assert sum(group > 1 for group in groups) == 13


def test_functions_with_loops(tmp_path):
  """A scan over stacked layers, a branch and a loop whose bodies call compiled functions."""
  rng = np.random.default_rng(0)
  params = {
    'layers': {'kernel': rng.laplace(size=(3, 48, 48)).astype(np.float32) / 5},
    'unused': np.zeros((24, 24), np.float32),
  }

  def fn(params, batch):
    step = jax.jit(lambda x, kernel: (nn.gelu(x @ kernel) + x, None))
    x, _ = jax.lax.scan(step, batch['x'], params['layers']['kernel'])
    x = jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: nn.relu6(x) * 0.5, x)
    return {'mean': x.mean(-1), 'last': x}

  x = rng.normal(size=(5, 48)).astype(np.float32)
  decoded = saved(tmp_path / 'net.opq', params)
  program = onnx_program(fn, decoded, {'x': x})
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    written = write_onnx(tmp_path / 'net.onnx', file, program)
  assert written.without_place == ('unused',)
  found = onnx_graphs.run(tmp_path / 'net.onnx', **{'batch/x': x})
  expected = fn(decoded, {'x': x})
  assert found.keys() == expected.keys()
  for name, array in found.items():
    np.testing.assert_allclose(array, expected[name], atol=2e-6)


def test_any_number_of_rows(tmp_path):
  fn = lambda params, x: nn.relu(x @ params['kernel'])
  kernel = onnx_graphs.laplace(16, 800)
  decoded = saved(tmp_path / 'net.opq', {'kernel': kernel})
  rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape('rows, 16'), jnp.float32)
  onnx.save(onnx_program(fn, decoded, rows), tmp_path / 'program.onnx')
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    # from a file, beside which there is no data
    write_onnx(tmp_path / 'net.onnx', file, tmp_path / 'program.onnx')
  for count in (1, 7):
    x = onnx_graphs.laplace(count, 16)
    (y,) = onnx_graphs.run(tmp_path / 'net.onnx', x=x).values()
    np.testing.assert_allclose(y, np.maximum(x @ decoded['kernel'], 0), rtol=1e-5, atol=1e-5)


def test_conversion_leaves_jax_alone():
  """The converter's own functions in the place of JAX's do not stay."""
  modules = jnp, jax.lax, jax.nn, nn
  before = [dict(vars(module)) for module in modules]
  params = {'kernel': np.ones((3, 4), np.float32)}
  onnx_program(
    lambda params, x: jnp.cumsum(x @ params['kernel'], 1), params, np.ones((2, 3), np.float32)
  )
  for module, names in zip(modules, before, strict=True):
    assert {name for name, value in names.items() if vars(module)[name] is not value} == set()
  assert jnp.cumsum(jnp.ones((1, 3)), 1).tolist() == [[1, 2, 3]]


def test_program_refuses():
  x = np.ones((2, 3), np.float32)
  with pytest.raises(ValueError, match='found no leaf that it reads, expected one of kernel'):
    onnx_program(lambda params, x: x, {'kernel': x}, x)
  with pytest.raises(ValueError, match='found names twice, expected each once: x'):
    onnx_program(lambda params, x: params['x'] + x, {'x': x}, x)
  with pytest.raises(ValueError, match='an operation that jax2onnx does not convert'):
    hidden = lambda x: np.asarray(x)
    onnx_program(
      lambda params, x: (
        jax.pure_callback(hidden, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + params['kernel']
      ),
      {'kernel': x},
      x,
    )


def test_program_without_weights_is_refused(tmp_path):
  """A file that lacks a leaf of the program leaves nothing behind."""
  kernels = {name: onnx_graphs.laplace(80, 80) for name in ('one', 'two')}
  program = onnx_program(lambda p, x: x @ p['one'] @ p['two'], kernels, kernels['one'])
  saved(tmp_path / 'net.opq', {'one': kernels['one']})
  with (
    opq_jax.OpqFile(tmp_path / 'net.opq') as file,
    pytest.raises(ValueError, match='found no data of two, expected leaves of these names'),
  ):
    write_onnx(tmp_path / 'net.onnx', file, program)
  assert not (tmp_path / 'net.onnx').exists()


def test_command_converts_network(tmp_path, monkeypatch, capsys):
  """A file of `opq compress --model` alone; one that names no network is refused."""
  monkeypatch.chdir(tmp_path)
  model = models.create('resnet20')
  metadata = {'model': 'resnet20', 'source': 'akamaster', 'num_classes': '10'}
  variables = saved('net.opq', drawn(model), metadata)
  assert cli.main(['export', 'net.opq', 'net.onnx']) == 0
  told = capsys.readouterr()
  assert told.err == '' and 'net.onnx:' in told.out and 'as UINT8' in told.out
  for count in (1, 3):
    (logits,) = onnx_graphs.run('net.onnx', images=images(count)).values()
    expected = networks.load('net.opq').model.apply(variables, images(count))
    np.testing.assert_allclose(logits, expected, atol=4e-6 * np.abs(expected).max())
  saved('other.opq', {'kernel': onnx_graphs.laplace(80, 80)})
  assert cli.main(['export', 'other.opq', 'other.onnx']) == 2
  assert 'found no name of a network and no config.json in it' in capsys.readouterr().err
  assert not pathlib.Path('other.onnx').exists()


@pytest.mark.parametrize(('name', 'dtype'), [('llama', ml_dtypes.bfloat16), ('bert', np.float32)])
def test_command_converts_folder(tmp_path, monkeypatch, capsys, name, dtype):
  """Networks that read tokens, by their tensors in a folder; layers of a leaf are scanned."""
  monkeypatch.chdir(tmp_path)
  model, tensors = language_models.network(name)
  folder = pathlib.Path('folder')
  folder.mkdir()
  stored = {key: np.ascontiguousarray(value).astype(dtype) for key, value in tensors.items()}
  safetensors.numpy.save_file(stored, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(language_models.CONFIGS[name]))
  command = ['compress', 'folder', 'net.opq', '--sparsity', '0.2', '--bits', '5']
  assert cli.main([*command, '--objective', 'balanced_error']) == 0
  capsys.readouterr()
  # parameters of 16 bits in arithmetic of 32
  with jax.numpy_dtype_promotion('standard'):
    assert cli.main(['export', 'net.opq', 'net.onnx']) == 0
    assert 'as UINT8' in capsys.readouterr().out
    with opq_jax.OpqFile('net.opq') as file:
      variables = importers.language_models.from_tensors(model, dict(file)).variables
    for tokens in (language_models.TOKENS, language_models.TOKENS[:1, :7]):
      (found,) = onnx_graphs.run('net.onnx', tokens=tokens).values()
      np.testing.assert_allclose(found, jax.jit(model.apply)(variables, tokens), atol=4e-5)


def test_program_has_no_values():
  """Leaves are names, shapes and dtypes: arrays of any values make the same program."""
  model = models.create('resnet20')
  shapes = models.variable_shapes(model)
  programs = [onnx_program(model.apply, tree, IMAGE) for tree in (shapes, drawn(model))]
  assert programs[0] == programs[1]
  places = {one.name: list(one.dims) for one in programs[0].graph.initializer if one.external_data}
  assert places == {name: list(leaf.shape) for name, leaf in trees.named_leaves(shapes).items()}
