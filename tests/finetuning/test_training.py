"""The training step on any number of devices, and the compression state that it cannot change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import opq_jax
from opq_jax.finetuning import parallel, training
from opq_jax.finetuning.checkpoints import Checkpoints
from tests.helpers import small_networks
from tests.helpers.small_networks import (
  SGD,
  Network,
  assert_compressed,
  assert_same_bits,
  batches,
  linear,
)

SYNCHRONISED = Network(axis_name=parallel.AXIS)
ADAMW = optax.adamw(1e-2, weight_decay=0.1, mask=training.kernels)


def step_of(kind, count, model, optimizer, **options):
  devices = jax.devices()[:count]
  if kind == 'pmap':
    return parallel.pmap_train_step(model.apply, optimizer, devices=devices, **options)
  mesh = Mesh(np.array(devices), (parallel.AXIS,))
  return parallel.shard_map_train_step(mesh, model.apply, optimizer, **options)


def train(step, train_state, state, steps, devices=None, seed=0):
  train_state = parallel.replicate(train_state, devices)
  state = parallel.replicate(state, devices)
  history = []
  for batch in batches(steps, seed=seed):
    train_state, metrics = step(train_state, state, batch)
    history.append(float(metrics['loss']))
  return train_state, history


@pytest.fixture(scope='module')
def alone():
  """Five steps without any mapping."""
  step = jax.jit(
    functools.partial(training.train_step, apply_fn=Network().apply, optimizer=SGD, ema_decay=0.9)
  )
  train_state = small_networks.start(SGD, with_average=True)
  state = small_networks.compressed_network()[1]
  history = []
  for batch in batches(5):
    train_state, metrics = step(train_state, state, batch)
    history.append(float(metrics['loss']))
  return train_state, history


@pytest.mark.parametrize('count', [1, 2, 4])
def test_parallel_steps_equal_one_device(alone, count):
  results = []
  for kind in ('pmap', 'shard_map'):
    step = step_of(kind, count, SYNCHRONISED, SGD, ema_decay=0.9)
    train_state = small_networks.start(SGD, with_average=True)
    state = small_networks.compressed_network()[1]
    results.append(train(step, train_state, state, 5, jax.devices()[:count]))
  for train_state, history in results:
    np.testing.assert_allclose(history, alone[1], rtol=1e-5)
    found, expected = (s.replace(rng=None) for s in (train_state, alone[0]))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), found, expected
    )
  assert_same_bits(results[0][0], results[1][0])


@pytest.mark.parametrize('count', [1, 4])
@pytest.mark.parametrize('name', ['sgd', 'adamw', 'adamw_restored'])
def test_train_step_keeps_compression(name, count, tmp_path):
  optimizer = SGD if name == 'sgd' else ADAMW
  devices = jax.devices()[:count]
  variables, state = small_networks.compressed_network()
  before = jax.tree.map(np.array, state)
  step = step_of('pmap', count, Network(), optimizer)
  train_state = small_networks.start(optimizer)
  if name == 'adamw_restored':
    train_state, first = train(step, train_state, state, 100, devices)
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save_compression(state)
      checkpoints.save(train_state, {'next_index': 100})
    with Checkpoints(tmp_path) as checkpoints:
      state = checkpoints.restore_compression(state, devices)
      train_state, _ = checkpoints.restore(train_state, devices)
    train_state, last = train(step, train_state, state, 100, devices, seed=1)
    history = first + last
  else:
    train_state, history = train(step, train_state, state, 200, devices)
  assert int(train_state.step) == 200
  assert_compressed(train_state.params, state)
  assert_same_bits(state, before)
  assert np.mean(history[-20:]) < 0.5 * np.mean(history[:5])
  # training moved what it may move
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), train_state.params, variables['params'])
  assert all(jax.tree.leaves(moved))


def test_train_step_without_compression():
  variables, _ = small_networks.compressed_network()
  [batch] = batches(1)

  def loss(params):
    logits, _ = Network().apply(
      {**variables, 'params': params}, batch['image'], train=True, mutable=['batch_stats']
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

  expected = jax.tree.map(
    lambda p, g: p - 0.1 * g, variables['params'], jax.grad(loss)(variables['params'])
  )
  found, metrics = training.train_step(
    small_networks.start(optax.sgd(0.1)),
    None,
    batch,
    apply_fn=Network().apply,
    optimizer=optax.sgd(0.1),
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found.params, expected
  )
  assert float(metrics['loss']) == pytest.approx(float(loss(variables['params'])), rel=1e-6)


def test_kernels_masks_weight_decay():
  optimizer = optax.chain(optax.add_decayed_weights(0.5, mask=training.kernels), optax.sgd(1.0))
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2), 'scale': jnp.ones(2)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  assert {name: float(leaf.sum()) for name, leaf in updates.items()} == {
    'kernel': -2.0,
    'bias': 0.0,
    'scale': 0.0,
  }


def test_statistics_that_a_network_does_not_update():
  statistics = {'norm': {'mean': np.ones(5, np.float32)}}
  start = training.init_train_state(
    {'params': {'w': jnp.zeros((24, 5))}, 'batch_stats': statistics}, SGD, jax.random.key(0)
  )
  [batch] = batches(1)
  step = functools.partial(training.train_step, optimizer=SGD)
  for parts in (1, 2):
    found, _ = step(start, None, batch, apply_fn=linear, accumulation=parts)
    assert_same_bits(found.batch_stats, statistics)

  def other(variables, images, **_):
    return linear(variables, images)[0], {'batch_stats': {'norm': {'var': jnp.ones(5)}}}

  with pytest.raises(
    ValueError, match='batch_stats: found norm/var of the network, expected norm/'
  ):
    step(start, None, batch, apply_fn=other)


def test_train_step_in_mixed_precision():
  variables, state = small_networks.compressed_network()
  model = Network(dtype=jnp.bfloat16)
  step = step_of('pmap', 2, model, SGD)
  devices = jax.devices()[:2]
  train_state, history = train(step, small_networks.start(SGD), state, 60, devices)
  assert {leaf.dtype for leaf in jax.tree.leaves(train_state.params)} == {jnp.dtype('float32')}
  assert np.mean(history[-5:]) < 0.6 * history[0]
  assert_compressed(train_state.params, state)
  text = str(
    jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, np.zeros((2, 24), np.float32))
  )
  assert 'bf16' in text


def test_dropout_is_deterministic():
  model = Network(dropout=0.5)
  _, state = small_networks.compressed_network()
  optimizer = optax.sgd(0.0)  # weights stay, so that only the mask differs
  [batch] = batches(1)
  step = step_of('pmap', 2, model, optimizer)
  both = []
  for _ in range(2):
    train_state, found = small_networks.start(optimizer), []
    for _ in range(2):
      train_state, metrics = step(train_state, state, batch)
      found.append(float(metrics['loss']))
    both.append(found)
  assert both[0] == both[1]
  assert both[0][0] != both[0][1]


def test_train_state_alone_is_donated():
  _, state = small_networks.compressed_network()
  step = step_of('pmap', 4, Network(), SGD)
  train_state = parallel.replicate(small_networks.start(SGD))
  state = parallel.replicate(state)
  [batch] = batches(1)
  step(train_state, state, batch)
  assert train_state.params['head']['kernel'].is_deleted()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  # the caller's variables are not its own
  assert not any(
    leaf.is_deleted() for leaf in jax.tree.leaves(small_networks.compressed_network()[0])
  )


@pytest.mark.parametrize('kind', ['pmap', 'shard_map'])
def test_batch_must_divide(kind):
  _, state = small_networks.compressed_network()
  step = step_of(kind, 4, Network(), SGD)
  [batch] = batches(1, size=30)
  with pytest.raises(ValueError, match='found 30 examples, expected a multiple of 4 devices'):
    step(small_networks.start(SGD), state, batch)


def test_train_step_refuses_other_tree():
  _, state = small_networks.compressed_network()
  [batch] = batches(1)
  other = opq_jax.CompressionState({'params': state.tree})
  with pytest.raises(ValueError, match='not found in the tree'):
    training.train_step(
      small_networks.start(SGD), other, batch, apply_fn=Network().apply, optimizer=SGD
    )
