"""A command imports what it uses, and nothing else: most of a short run is imports."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import opq_jax

HEAVY = {
  *('jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'ml_collections', 'absl'),
  *('grain', 'PIL', 'torch', 'h5py', 'matplotlib', 'sklearn', 'scipy'),
}
UNUSED = HEAVY - {'jax', 'flax', 'scipy', 'absl'}
"""Packages that a file of weights has no use for; JAX and Flax import SciPy and absl."""

PROGRAM = """
import json, sys
from opq_jax import cli
code = cli.main(sys.argv[1:])
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


def packages(*argv):
  command = [sys.executable, '-c', PROGRAM, *map(str, argv)]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  code, names = json.loads(result.stdout.splitlines()[-1])
  assert code == 0, result.stderr
  return set(names)


def test_inspect_imports_no_jax(path):
  names = packages('inspect', path)
  assert 'numpy' in names and 'rich' in names
  assert names & HEAVY == set()


@pytest.mark.parametrize(
  'command', ['', 'compress', 'verify', 'inspect', 'decompress', 'evaluate', 'generate', 'demo']
)
def test_help_imports_no_jax(command):
  names = packages(*command.split(), '--help')
  assert names & (HEAVY | {'numpy', 'numba', 'rich'}) == set()


def test_verify_imports_what_it_uses(path, tmp_path):
  params, _ = opq_jax.load(path)
  opq_jax.weights.write_safetensors(tmp_path / 'net.safetensors', jax.device_get(params))
  names = packages('verify', path, '--against', tmp_path / 'net.safetensors')
  assert names & UNUSED == set()
