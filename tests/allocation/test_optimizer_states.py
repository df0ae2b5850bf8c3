"""Moments of optimizers are told from parameters of the same names and shapes."""

import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import opq_jax
from opq_jax.allocation.optimizer_states import is_in_optimizer, optimizer_leaves
from opq_jax.core import trees


def params():
  """A network with modules that are called like moments."""
  draw = np.random.default_rng(0).laplace
  kernel = lambda: {'kernel': jnp.asarray(draw(size=(16, 8)), jnp.float32)}
  attention = {name: kernel() for name in 'qkv'}
  return {'vae': {'mu': kernel(), 'logvar': kernel()}, 'attention': attention, 'trace': kernel()}


OPTIMIZERS = {
  'adam': optax.adam(1e-3),
  'momentum': optax.sgd(0.1, momentum=0.9),
  'chain': optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
  'steps': optax.MultiSteps(optax.lion(1e-3), 2).gradient_transformation(),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_train_state_moments_pass_through(name):
  state = train_state.TrainState.create(apply_fn=None, params=params(), tx=OPTIMIZERS[name])
  allocation = opq_jax.allocate(state, compression_rate=8.0)
  allocated = {
    path.removesuffix('/scale')
    for path in trees.named_leaves(allocation.tree)
    if path.endswith('kernel/scale')
  }
  assert allocated == {f'params/{path}' for path in trees.named_leaves(params())}
  leaves = trees.named_leaves(state)
  assert optimizer_leaves(leaves) == [path for path in leaves if path.startswith('opt_state')]


@pytest.mark.parametrize('name', ['adam', 'momentum', 'chain'])
def test_optimizer_leaves_by_structure(name):
  """A state under a name that says nothing is told by its moments, with the parameters or not."""
  state = OPTIMIZERS[name].init(params())
  for tree in ({'net': params(), 'o': state}, {'o': state}):
    moments = [path for path in trees.named_leaves(tree) if path.startswith('o/')]
    moments = [path for path in moments if not path.endswith('count')]
    if name == 'momentum' and 'net' not in tree:  # `trace` alone may be a module
      moments = []
    assert optimizer_leaves(trees.named_leaves(tree)) == moments


def test_optimizer_leaves_of_torch():
  names = ['fc.weight', 'optimizer.state.0.exp_avg', 'fc.weight.exp_avg_sq', 'opt.fc.weight']
  leaves = {name: np.zeros((4, 4), np.float32) for name in names}
  assert optimizer_leaves(leaves) == names[1:3]


def test_modules_are_no_moments():
  assert optimizer_leaves(trees.named_leaves(params())) == []
  beside = {'m/w': np.zeros((2, 2)), 'v/w': np.zeros((2, 2)), 'q/w': np.zeros((2, 3))}
  assert optimizer_leaves(beside) == []
  network = {'net/w': np.zeros((2, 2)), 'net/b': np.zeros(2)}
  moments = {f'{m}/{name}': leaf for m in 'mv' for name, leaf in network.items()}
  moments = {name.replace('/net', ''): leaf for name, leaf in moments.items()}
  assert optimizer_leaves(network | moments) == list(moments)


def test_own_choice_takes_moments():
  tree = {'w': params()['trace']['kernel'], 'opt_state': params()['trace']['kernel']}
  assert is_in_optimizer('opt_state')
  assert opq_jax.allocate(tree).tree['opt_state'] is None
  assert opq_jax.allocate(tree, compressible=lambda *_: True).tree['opt_state'] is not None


def test_optimizer_leaves_of_long_paths():
  paths = ['mu/' * 100_000 + 'w', 'nu/' * 100_000 + 'w', 'trace.' * 100_000 + 'w']
  began = time.process_time()
  assert optimizer_leaves(dict.fromkeys(paths, np.zeros((2, 2)))) == []
  assert time.process_time() - began < 1
