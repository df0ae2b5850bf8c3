"""Compressed networks as programs of `jax.export`, run by processes that know nothing of them."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

import opq_jax
from opq_jax import cli, importers, models
from opq_jax.compression import CompressionState
from opq_jax.export import program_arguments, write_stablehlo
from opq_jax.importers import networks
from tests.helpers.opq_files import escaping, laplace, leaf_state

pytest.importorskip('flatbuffers')


def network():
  """Stacked layers, a packed leaf, a bfloat16 one, and one with escaped weights."""
  escaped, state = escaping(shape=(30, 20))
  params = {
    'layers': laplace(3, 20, 20),
    'head': laplace(20, 11, seed=1, dtype=ml_dtypes.bfloat16),
    'bias': laplace(11, seed=2),
  }
  made = opq_jax.compress(params, bits_per_weight=2.0, slices=lambda path, leaf: leaf.ndim > 2)
  tree = {**made.state.tree, 'first': state.tree}
  return {**made.params, 'first': escaped}, CompressionState(tree)


def apply_fn(params, x):
  x = x @ params['first']['w']
  x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, params['layers'])
  return {'y': x @ params['head'].astype(jnp.float32) + params['bias'][None]}


def test_program_runs_in_another_process(tmp_path):
  """Without opq_jax: arrays of an archive, batches of any size."""
  params, state = network()
  x = jax.ShapeDtypeStruct(export.symbolic_shape('batch, 30'), jnp.float32)
  path = tmp_path / 'net.stablehlo'
  written = write_stablehlo(path, apply_fn, params, state, x)
  arguments = program_arguments(params, state)
  assert arguments['layers/codes'].shape == (3, 20, 10)  # two codes to a byte
  assert written.size == path.stat().st_size
  assert written.arguments == sum(array.nbytes for array in arguments.values())
  # NumPy's archives have no bfloat16, and need none: codes are integers
  np.savez(tmp_path / 'net.npz', **arguments)
  inputs = laplace(7, 30, seed=4)
  np.save(tmp_path / 'x.npy', inputs)
  script = f"""
import sys
import numpy as np, jax
from jax import export
with open({str(path)!r}, 'rb') as file:
  program = export.deserialize(bytearray(file.read()))
arguments = dict(np.load({str(tmp_path / 'net.npz')!r}))
y = jax.jit(program.call)(arguments, np.load({str(tmp_path / 'x.npy')!r}))['y']
assert 'opq_jax' not in sys.modules
np.save({str(tmp_path / 'y.npy')!r}, y)
print(program.platforms)
"""
  run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "('cpu', 'cuda', 'tpu')"
  compressed = opq_jax.apply_compression(params, state)
  np.testing.assert_allclose(
    np.load(tmp_path / 'y.npy'), apply_fn(compressed, inputs)['y'], rtol=1e-5, atol=1e-5
  )
  assert not np.allclose(apply_fn(params, inputs)['y'], apply_fn(compressed, inputs)['y'], 1e-2)


def test_command_writes_known_networks(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  model = models.create('resnet20')
  shapes = models.variable_shapes(model)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape) - 0.2, shapes)
  variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)
  variables['batch_stats'] = jax.tree.map(lambda leaf: leaf + 1, variables['batch_stats'])
  kernels = lambda leaf: leaf.ndim > 1
  state = jax.tree.map(
    lambda leaf: leaf_state(leaf, 1 / 16, 1 / 16) if kernels(leaf) else None, variables
  )
  source = importers.sources('resnet20')[0].name
  about = {'model': 'resnet20', 'source': source, 'num_classes': '10'}
  opq_jax.save('net.opq', variables, CompressionState(state), about)
  assert cli.main(['export', 'net.opq', 'net.stablehlo']) == 0
  told = capsys.readouterr().out
  size = pathlib.Path('net.stablehlo').stat().st_size
  assert (
    f'net.stablehlo: {size:,} bytes, for float32 images (batch, 32, 32, 3) on cpu, cuda, tpu'
    in told
  )
  program = export.deserialize(bytearray(pathlib.Path('net.stablehlo').read_bytes()))
  images = laplace(2, 32, 32, 3)
  known = networks.load('net.opq')
  forward = jax.jit(lambda variables, x: known.model.apply(variables, x, train=False))
  expected = np.asarray(forward(known.variables, images))
  found = jax.jit(program.call)(program_arguments(*opq_jax.load('net.opq')), images)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_programs_that_cannot_be_written(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  params, state = network()
  x = jax.ShapeDtypeStruct((1, 30), jnp.float32)
  pathlib.Path('net.stablehlo').write_bytes(b'old')
  with pytest.raises(ValueError, match=r"platforms: found \['gpu'\], expected some of cpu, cuda"):
    write_stablehlo('net.stablehlo', apply_fn, params, state, x, platforms=['gpu'])
  opq_jax.save('net.opq', params, state)
  for arguments, message in (
    (['net.stablehlo'], 'net.opq: found no name of a network, expected a file made with --model'),
    (['net.stablehlo', '--into', 'x.onnx'], '--into: found x.onnx, expected none'),
    (['net.onnx'], 'expected one of them, or its ONNX file (--into NET)'),
    (['net.mlpackage'], 'net.mlpackage: needs --into NET'),
    (['net.tflite'], "found suffix '.tflite', expected .onnx, .mlpackage or .stablehlo"),
    (['net.mlpackage', '--into', 'net.onnx'], "found suffix '.onnx', expected .mlpackage"),
  ):
    assert cli.main(['export', 'net.opq', *arguments]) == 2
    assert message in ' '.join(capsys.readouterr().err.split())
  assert pathlib.Path('net.stablehlo').read_bytes() == b'old'
