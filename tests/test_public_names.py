"""The public surface: names, rooms, the cost of importing them, and names of the last release."""

import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import deprecated

NAMES = {
  'Allocation',
  'CompressionState',
  'OpqFile',
  'allocate',
  'apply_compression',
  'coded',
  'compress',
  'compressed',
  'decode',
  'decoded',
  'encode',
  'init_state',
  'keep_compressed',
  'load',
  'save',
  'size_report',
  'summary',
  'usage',
}
ROOMS = {
  'allocation',
  'cli',
  'coding',
  'compression',
  'core',
  'correction',
  'data',
  'encoders',
  'export',
  'file',
  'finetuning',
  'importers',
  'language',
  'models',
  'network',
  'report',
  'weights',
}
# all names of the last release that are not names of this one
OLD_NAMES = (
  *('LeafAllocation', 'LeafState', 'LeafStatistics', 'SizeReport', 'allocate_with_feedback'),
  *('allocate_with_trellis', 'correct_batch_norm', 'correct_on_images', 'encode_layer_by_layer'),
  *('encode_with_feedback', 'encode_with_trellis', 'file_report', 'fold_batch_norm'),
  *('is_compressible', 'leaf_statistics', 'mean_moments', 'merge_statistics', 'natural_noise'),
  *('read_weights', 'round_uncompressed', 'second_moments', 'synthetic_inputs'),
  'write_safetensors',
)
OLD_MODULES = (
  *('accuracy', 'allocation_solver', 'ans', 'artifact', 'artifact_index', 'augmentation'),
  *('batch_norm', 'batch_statistics', 'checkpoints', 'context_coding', 'demo', 'entropy_coding'),
  *('escapes', 'feedback', 'file_rate', 'files', 'fixed_width', 'histograms', 'inference'),
  *('joined_statistics', 'keras_files', 'laplace', 'lattices', 'layer_by_layer', 'losses'),
  *('moments', 'native', 'networks', 'noise', 'optimization', 'orbax_files', 'paper', 'plots'),
  *('rate_search', 'sequential_ans', 'sizes', 'statistics', 'stored_leaves', 'streaming'),
  *('streams', 'synthetic', 'tables', 'training', 'transforms', 'trees', 'trellis'),
  *('trellis_encoding', 'trellis_grids', 'verification', 'weight_files'),
)
HEAVY = 'PIL', 'flax', 'grain', 'jax', 'numba', 'orbax', 'scipy', 'tensorflow_datasets', 'torch'


def test_all_is_the_public_surface():
  assert set(opq_jax.__all__) == NAMES | ROOMS
  assert set(opq_jax.__all__) <= set(dir(opq_jax))
  for name in opq_jax.__all__:
    assert getattr(opq_jax, name) is not None
  assert sorted(opq_jax.__all__) == opq_jax.__all__


@pytest.mark.parametrize('room', sorted(ROOMS))
def test_doors_name_what_exists(room):
  door = importlib.import_module(f'opq_jax.{room}')
  for name in door.__all__:
    assert getattr(door, name) is not None
    assert name in dir(door)
  assert sorted(door.__all__) == sorted(set(door.__all__))


def test_unknown_names_are_errors():
  with pytest.raises(AttributeError, match="module 'opq_jax' has no attribute 'quantise'"):
    _ = opq_jax.quantise  # type: ignore[attr-defined]
  assert not hasattr(opq_jax, '_Private')


@pytest.mark.parametrize('name', [*OLD_NAMES, *OLD_MODULES])
def test_old_names_warn_and_work(name):
  with pytest.warns(
    DeprecationWarning, match=rf'opq_jax\.{name} is deprecated: use opq_jax\.'
  ) as told:
    value = getattr(opq_jax, name)
  assert value is not None
  assert told[0].filename == __file__
  place = str(told[0].message).partition(': use ')[2]
  if name in OLD_MODULES:
    assert importlib.import_module(place) is value
  elif '(' not in place:
    room, _, moved = place.rpartition('.')
    assert getattr(importlib.import_module(room), moved) is value and moved == name


def test_old_modules_can_be_imported():
  with pytest.warns(DeprecationWarning, match=r'opq_jax\.sizes is deprecated: use opq_jax\.report'):
    from opq_jax import sizes
  assert sizes.size_report is opq_jax.size_report


def small_problem():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(256, 32)) @ rng.normal(size=(32, 32))).astype(np.float32)
  kernel = rng.laplace(size=(32, 48)).astype(np.float32)
  return kernel, (x.T @ x / 256)[None]


@pytest.mark.parametrize('with_moments', [True, False])
def test_old_functions_call_encoders(with_moments):
  kernel, moments = small_problem()
  name, encoder = 'trellis', opq_jax.encoders.Trellis(damping=0.1)
  arguments = {'damping': 0.1}
  if with_moments:
    name, encoder = 'feedback', opq_jax.encoders.Feedback(moments)
    arguments = {'moments': moments}
  network = opq_jax.compress(kernel, bits_per_weight=2.5, encoder=encoder)
  allocate_with = getattr(deprecated, f'allocate_with_{name}')
  encode_with = getattr(deprecated, f'encode_with_{name}')
  allocation, params, state = allocate_with(kernel, bits_per_weight=2.5, **arguments)
  jax.tree.map(
    np.testing.assert_array_equal,
    (params, state, allocation),
    (network.params, network.state, network.allocation),
  )
  grids = opq_jax.init_state(kernel, allocation)
  jax.tree.map(np.testing.assert_array_equal, encode_with(kernel, grids, **arguments), network[:2])


def test_old_layer_by_layer_calls_encoder():
  import flax.linen as nn

  kernel, moments = small_problem()
  x = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
  variables = {'params': {'kernel': kernel, 'bias': np.zeros(48, np.float32)}}
  grids = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=12.0))
  fn = nn.Dense(48).apply
  for is_trellis, first in (
    (True, opq_jax.encoders.Trellis()),
    (False, opq_jax.encoders.Feedback({'params': {'kernel': moments, 'bias': None}})),
  ):
    found = deprecated.encode_layer_by_layer(fn, variables, grids, x, trellis=is_trellis, share=0.3)
    encoder = opq_jax.encoders.LayerByLayer(fn, x, first, share=0.3)
    expected = tuple(encoder.choose_codes(variables, grids))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_importing_loads_no_heavy_package():
  code = f"""
import json, sys
import opq_jax
loaded = [name for name in {HEAVY!r} if name in sys.modules]
from opq_jax import correction, encoders, file, network, weights
print(json.dumps([loaded, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert json.loads(run.stdout) == [[], []]


def test_allocating_loads_no_data_package():
  code = """
import json, sys
import numpy as np
import opq_jax
kernel = np.random.default_rng(0).laplace(size=(64, 64)).astype(np.float32)
network = opq_jax.compress({'kernel': kernel})
opq_jax.file.serialize(network.params, network.state)
heavy = 'PIL', 'grain', 'orbax', 'tensorflow_datasets', 'torch', 'matplotlib', 'h5py'
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert json.loads(run.stdout) == []


def test_old_modules_are_imported():
  """By a statement too; names that never were are still errors."""
  with pytest.warns(DeprecationWarning, match=r'use opq_jax\.weights'):
    module = importlib.import_module('opq_jax.weight_files')
  assert module is opq_jax.weights
  assert module.__name__ == module.__spec__.name == 'opq_jax.weights'
  with pytest.raises(ModuleNotFoundError, match=r"No module named 'opq_jax\.quantise'"):
    importlib.import_module('opq_jax.quantise')
