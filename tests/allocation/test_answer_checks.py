"""Warnings and errors of an answer name the leaf, the channel and the bound."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import allocate, init_state
from tests.helpers.allocations import tree

RNG = np.random.default_rng


A = np.ones((8, 8), np.float32) * np.linspace(-1, 1, 8, dtype=np.float32)


@pytest.mark.slow
def test_answer_names_misfits():
  params = dict(tree())
  odd = RNG(1).uniform(0.005, 0.015, (64, 64)).astype(np.float32)
  odd[::16, ::16] = 1.0  # a few weights hold nearly all of the energy
  params['odd'] = jnp.asarray(odd)
  with pytest.warns(
    UserWarning, match=r'the Laplace density.*odd \(\d+\.\d+\): found E\[w\^2\]'
  ) as found:
    allocation = allocate(params, sparsity=0.4, bits=3.0)
  assert found[0].filename == __file__
  assert float(allocation.tree['odd'].laplace_fit) > 3
  assert float(allocation.tree['a'].laplace_fit) == pytest.approx(1, abs=0.1)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    warnings.filterwarnings('ignore', 'all weights are pruned of')
    # a rate is met from the weights themselves
    allocate(params, compression_rate=15.0)
    params.pop('odd')
    allocate(params, sparsity=0.3, bits=3.0)


def test_answer_too_few_bits():
  with pytest.raises(ValueError, match=r'found at least 0\.\d+ bits per weight.* expected 0.0032'):
    allocate({'w': A}, compression_rate=10_000.0)
  # and just above the bound they are not
  with pytest.raises(ValueError, match='found at least') as refused:
    allocate({'w': A}, bits_per_weight=1e-4)
  bound = float(str(refused.value).split()[3])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # so small a tree has nothing but that
    allocate({'w': A}, bits_per_weight=bound * 1.01)


def test_answer_names_dead_leaves():
  rng = RNG(0)
  scale = np.ones((50, 1)) * 0.1
  scale[:10] = 1e-4
  params = {
    'embedding': (rng.laplace(size=(50, 64)) * scale).astype('f4'),
    'layers': np.stack([rng.laplace(size=(16, 16)) * s for s in (1, 1e-5, 1)]).astype('f4'),
    'adapter': np.zeros((16, 4), 'f4'),
    'tiny': np.full((8, 8), 1e-6, 'f4') * rng.uniform(0.5, 1, (8, 8)).astype('f4'),
  }
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    allocation = allocate(params, compression_rate=10.0)
  text = ' '.join(str(warning.message) for warning in said)
  assert 'embedding (10 of 50 along its first axis)' in text
  assert 'layers (1 of 3 along its first axis)' in text
  assert 'adapter: all weights are zero' in text and allocation.tree['adapter'] is None
  assert 'tiny (all of it)' in text
  assert int(allocation.tree['embedding'].dead_rows) == 10
  values = opq_jax.apply_compression(params, init_state(params, allocation))
  dead = lambda name: [i for i, row in enumerate(np.asarray(values[name])) if not row.any()]
  assert dead('embedding') == list(range(10)) and dead('layers') == [1]


@pytest.mark.parametrize('at', ['a', 'c'])
def test_answer_names_nan_channel(at):
  params = {name: np.array(tree()[name]) for name in 'ac'}
  params[at][5, 3] = np.nan
  with pytest.raises(ValueError, match=rf'^{at}: found NaN .*\(channel 3 of axis -1\)'):
    allocate(params)


@pytest.mark.parametrize(('ratio', 'is_starved'), [(1.5, False), (4, True)])
def test_answer_names_starved_stacks(ratio, is_starved):
  rng = np.random.default_rng(0)
  stack = rng.laplace(size=(4, 64, 64)).astype(np.float32)
  stack *= np.float32(ratio) ** np.arange(4, dtype=np.float32)[:, None, None]
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    opq_jax.allocate({'layers': stack}, compression_rate=10.0)
    opq_jax.allocate({'layers': stack}, compression_rate=10.0, slices=lambda path, leaf: 1)
  text = ' '.join(str(warning.message) for warning in caught)
  assert ('layers (1 of 4); if the axis counts layers' in text) == is_starved
  assert len(caught) == is_starved
