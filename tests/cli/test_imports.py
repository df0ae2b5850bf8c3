"""A command imports what it uses, and nothing else: most of a short run is imports."""

import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import cli
from tests.helpers.opq_files import laplace

HEAVY = {
  *('jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'ml_collections', 'absl'),
  *('grain', 'PIL', 'torch', 'h5py', 'matplotlib', 'sklearn', 'scipy'),
}
UNUSED = HEAVY - {'jax', 'flax', 'scipy', 'absl'}
"""Packages that a file of weights has no use for; JAX and Flax import SciPy and absl."""

PROGRAM = """
import json, sys
from opq_jax.cli import command
code = command.main(sys.argv[1:], keep_programs=True)
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))
"""


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """A file whose codes are along a trellis or by contexts, as smooth weights have them."""
  weights = np.cumsum(np.random.default_rng(0).laplace(size=(64, 96)), axis=0)
  params = {'kernel': weights.astype(np.float32), 'bias': np.zeros(96, np.float32)}
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.0))
  path = tmp_path_factory.mktemp('imports') / 'net.opq'
  opq_jax.save(path, params, state)
  return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model folder, its file, and a file of nested leaves with their original weights."""
  folder = tmp_path_factory.mktemp('folder')
  weights = laplace(48, 64)
  (folder / 'model').mkdir()
  opq_jax.weights.write_safetensors(
    folder / 'model' / 'model.safetensors', {'fc.weight': weights, 'fc.bias': laplace(48)}
  )
  (folder / 'model' / 'config.json').write_text('{}')
  opq_jax.weights.write_safetensors(folder / 'net.safetensors', {'layer': {'kernel': weights}})
  for name in ('model', 'net.safetensors'):
    assert cli.main(['compress', str(folder / name), str(folder / f'{name}.opq')]) == 0
  return folder


def packages(*argv):
  command = [sys.executable, '-c', PROGRAM, *map(str, argv)]
  # other folders of kept programs than that of the tests
  environment = {**os.environ, 'OPQ_JAX_CACHE': tempfile.gettempdir() + '/opq_jax_test_imports'}
  result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  code, names = json.loads(result.stdout.splitlines()[-1])
  assert code == 0, result.stderr
  return set(names)


def test_inspect_imports_no_jax(path):
  names = packages('inspect', path)
  assert 'numpy' in names and 'rich' in names
  assert names & HEAVY == set()


@pytest.mark.parametrize('command', ['report', 'card'])
def test_report_imports_no_jax(command, folder, tmp_path):
  output = [tmp_path / 'net.html'] if command == 'report' else []
  names = packages(command, folder / 'net.safetensors.opq', *output)
  assert 'constriction' in names and names & (HEAVY | {'numba'}) == set()


def test_decompress_imports_no_jax(folder, tmp_path):
  for name, output in (('model', 'again'), ('net.safetensors', 'again.safetensors')):
    names = packages('decompress', folder / f'{name}.opq', tmp_path / output)
    assert 'constriction' in names and names & (HEAVY | {'numba'}) == set()
  found = (tmp_path / 'again' / 'config.json').read_text()
  assert found == '{}' and (tmp_path / 'again.safetensors').exists()


@pytest.mark.parametrize('name', ['model', 'net.safetensors'])
def test_verify_imports_no_jax(folder, name):
  """Of rounded weights, which no encoder has to choose again."""
  names = packages('verify', folder / f'{name}.opq', '--against', folder / name)
  assert names & (HEAVY | {'numba'}) == set()


def test_reading_needs_no_jax(folder, path):
  """Where JAX is not installed, files are opened and decoded all the same."""
  code = """
import sys
sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax', 'optax']))  # importing them fails
import opq_jax
from opq_jax.core import trees
for path in sys.argv[1:]:
  with opq_jax.OpqFile(path) as file:
    leaves = trees.named_leaves(file.params())
    assert list(leaves) == list(file)
    for name, array in file.items():
      assert leaves[name].tobytes() == array.tobytes() and leaves[name].dtype == array.dtype
    print(len(file))
"""
  paths = [path, folder / 'model.opq', folder / 'net.safetensors.opq']
  command = [sys.executable, '-c', code, *map(str, paths)]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  assert run.stdout.split() == ['2', '2', '1']


@pytest.mark.parametrize(
  'command',
  [
    *('', 'compress', 'verify', 'inspect', 'report', 'card', 'decompress', 'evaluate'),
    *('generate', 'demo'),
  ],
)
def test_help_imports_no_jax(command):
  names = packages(*command.split(), '--help')
  assert names & (HEAVY | {'numpy', 'numba', 'rich'}) == set()


def test_verify_imports_what_it_uses(path, tmp_path):
  params, _ = opq_jax.load(path)
  opq_jax.weights.write_safetensors(tmp_path / 'net.safetensors', jax.device_get(params))
  names = packages('verify', path, '--against', tmp_path / 'net.safetensors')
  assert names & UNUSED == set()
