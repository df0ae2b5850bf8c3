"""Benchmarks of time and memory, on networks of some thousand weights."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from experiments.benchmarks.language_models import random_folder, sizes
from experiments.benchmarks.resources import accelerator, coded_in_memory
from opq_jax import models, weights
from opq_jax.importers import language_models


@pytest.fixture(scope='module')
def small():
  """A config of one layer of few features."""
  shape = {'hidden_size': 24, 'intermediate_size': 40, 'num_attention_heads': 3}
  return random_folder.config('135M', layers=2, vocabulary=50) | shape


def test_random_folder_is_a_network_of_shards(small, tmp_path):
  count = random_folder.write(tmp_path, small, shard_weights=3000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  folder = weights.open_folder(tmp_path)
  model = models.from_config(folder.config)
  variables = language_models.from_tensors(model, folder.leaves).variables
  leaves = jax.tree.leaves(variables)
  assert sum(leaf.size for leaf in leaves) == count
  assert {leaf.dtype.name for leaf in leaves} == {'bfloat16'}
  variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)
  logits = model.apply(variables, np.arange(6)[None])
  assert logits.shape == (1, 6, 50) and np.isfinite(logits).all() and np.std(logits) > 0.01


@pytest.mark.parametrize('size', random_folder.SIZES)
def test_sizes_have_their_names(size):
  model = models.from_config(random_folder.config(size))
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models.variable_shapes(model)))
  named = {'135M': 135e6, '1B': 1.24e9, '3B': 3.21e9}[size]
  assert count == pytest.approx(named, rel=0.01)


def test_sizes_of_a_small_network(small, tmp_path, capsys):
  count = random_folder.write(tmp_path / 'network', small)
  options = sizes.WAYS['plain']
  found = sizes.measure(str(tmp_path / 'network'), str(tmp_path / 'network.opq'), options)
  row = sizes.row_of('small', count, 'plain', 512, found)
  with opq_jax.OpqFile(tmp_path / 'network.opq') as file:
    assert file.metadata['objective'] == 'divergence'
    assert file.metadata['bits_per_weight'] == '4'
  assert found['file'] == (tmp_path / 'network.opq').stat().st_size
  assert 2**26 < found['peak'] < 2**35 and found['seconds'] > 0
  assert row['tokens'] == '' and row['weights, M'] == round(count / 1e6)


def test_coded_layers_take_a_byte_and_half_a_byte(small, monkeypatch):
  monkeypatch.setattr(random_folder, 'config', lambda size: small)
  rows = coded_in_memory.planned('135M')
  assert [row['weights'] for row in rows] == list(coded_in_memory.FORMS)
  model = models.from_config(small).clone(dtype=jnp.float32)
  leaves = jax.tree.leaves(models.variable_shapes(model)['params']['layers'])
  kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 2)

  def size(form):
    layers = coded_in_memory.layers_of(model, form, lambda shape, dtype, _: np.zeros(shape, dtype))
    return sum(array.nbytes for array in jax.tree.leaves(layers))

  assert size('float32') - size('bfloat16') == 2 * sum(leaf.size for leaf in leaves)
  assert size('codes of 8 bits') - size('codes of 4 bits') == kernels / 2


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(5, dtype=jnp.bfloat16)(x.reshape(len(x), -1).astype(jnp.bfloat16)).astype(
      x.dtype
    )


def test_accelerator_measures_every_part(monkeypatch, capsys):
  monkeypatch.setattr(accelerator, 'TOKENS', 256)
  monkeypatch.setattr(
    accelerator.harness, 'resnet50_shapes', lambda: [(3, 3, 8, 16), (1, 1, 16, 32)]
  )
  config = random_folder.config
  monkeypatch.setattr(
    random_folder,
    'config',
    lambda *arguments: config(*arguments) | {'hidden_size': 18, 'intermediate_size': 24},
  )
  parts = [
    (accelerator.whole_tree, 1),
    (lambda: accelerator.steps(Network(), 2, 8), 1),
    (lambda: accelerator.calibrated(1, '135M', 40), 0),
  ]
  rows = accelerator.rows_of(parts, 1e9)
  assert [row['part'] for row in rows] == [
    *('allocate', 'apply', 'finetuning step', 'finetuning step, float'),
    'calibrated run, 1 layers',
  ]
  assert all(row['first, s'] > 0 for row in rows)
  assert all(row['again, s'] > 0 for row in rows[:4])
  assert rows[4]['again, s'] == ''
  capsys.readouterr()
  assert accelerator.rows_of(parts, -1.0) == []
  assert capsys.readouterr().out.count('left out') == 3
