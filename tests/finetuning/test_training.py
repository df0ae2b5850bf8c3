"""The training step on any number of devices, and the compression state that it cannot change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import opq_jax
from opq_jax.finetuning import losses, parallel, training
from opq_jax.finetuning.batches import pad_batch
from opq_jax.finetuning.checkpoints import Checkpoints
from tests.helpers import small_networks
from tests.helpers.small_networks import Network, assert_compressed, assert_same_bits, batches

SYNCHRONISED = Network(axis_name=parallel.AXIS)
SGD = optax.chain(
  optax.add_decayed_weights(1e-3, mask=training.kernels), optax.sgd(0.05, momentum=0.9)
)
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


def test_accumulation_equals_whole_batch():
  weights = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(24, 5)), jnp.float32)}
  apply_fn = lambda variables, x, train, **_: (x @ variables['params']['w'], {})
  [batch] = batches(1)
  results = [
    training.train_step(
      training.init_train_state({'params': weights}, SGD, jax.random.key(0)),
      None,
      batch,
      apply_fn=apply_fn,
      optimizer=SGD,
      accumulation=parts,
    )
    for parts in (1, 4)
  ]
  (one, metrics), (many, others) = results
  np.testing.assert_allclose(one.params['w'], many.params['w'], rtol=1e-5)
  assert float(metrics['loss']) == pytest.approx(float(others['loss']), rel=1e-5)
  assert one.batch_stats == {}


def test_accumulation_updates_statistics():
  _, state = small_networks.compressed_network()
  [batch] = batches(1)
  step = functools.partial(training.train_step, apply_fn=Network().apply, optimizer=optax.sgd(0.0))
  found, _ = step(small_networks.start(optax.sgd(0.0)), state, batch, accumulation=2)
  expected = small_networks.start(optax.sgd(0.0))
  for half in (slice(16), slice(16, None)):
    expected, _ = step(expected, state, {name: leaf[half] for name, leaf in batch.items()})
  # a mean near 0 is the sum of numbers of .1, whose own rounding is 1e-8
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8),
    found.batch_stats,
    expected.batch_stats,
  )


def linear(weights, images, **_):
  return images @ weights['params']['w'], {}


def test_accumulation_keeps_one_gradient():
  """A part must take less memory than the batch, and another part no more."""
  weights = {'params': {'w': jnp.zeros((512, 256), jnp.bfloat16)}}
  batch = {'image': np.ones((32, 512), np.float32), 'label': np.zeros(32, np.int32)}

  def temporaries(parts):
    step = functools.partial(
      training.train_step,
      apply_fn=lambda v, x, **_: linear(v, x.astype(jnp.bfloat16)),
      optimizer=SGD,
      accumulation=parts,
    )
    start = training.init_train_state(weights, SGD, jax.random.key(0))
    return jax.jit(step).lower(start, None, batch).compile().memory_analysis().temp_size_in_bytes

  size = weights['params']['w'].nbytes
  assert abs(temporaries(16) - temporaries(2)) < size


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


def test_average_of_bfloat16_weights():
  [batch] = batches(1)
  optimizer = optax.sgd(1.0)
  weights = {'params': {'w': jnp.ones((24, 5), jnp.bfloat16)}}
  state = training.init_train_state(weights, optimizer, jax.random.key(0), with_average=True)
  step = jax.jit(
    functools.partial(
      training.train_step,
      apply_fn=lambda v, x, **_: linear(v, x.astype(jnp.bfloat16)),
      optimizer=optimizer,
      ema_decay=0.999,
    )
  )
  expected = np.ones((24, 5))
  for _ in range(50):
    state, _ = step(state, None, batch)
    expected += 0.001 * (np.asarray(state.params['w'], float) - expected)
  # a thousandth of a change is less than bfloat16 can tell
  assert np.abs(expected - 1).max() > 0.004
  # XLA may average the weights before they are rounded to bfloat16
  average = np.asarray(state.average['params']['w'])
  np.testing.assert_allclose(average, expected, atol=3e-4)
  values, _ = training.network(state, opq_jax.CompressionState({'w': None}), averaged=True)
  np.testing.assert_array_equal(values['params']['w'], average.astype(jnp.bfloat16))


def test_options_that_nothing_would_read():
  _, state = small_networks.compressed_network()
  [batch] = batches(1)
  step = functools.partial(
    training.train_step,
    small_networks.start(SGD, with_average=True),
    apply_fn=Network().apply,
    optimizer=SGD,
  )
  for arguments, options, message in (
    ((None, batch), {'price_of_bits': 1.0}, 'price_of_bits: found it without a compression state'),
    ((None, batch), {'clip_to_grid': True}, 'clip_to_grid: found it without a compression state'),
    ((state, batch), {'bits_limit': 1.0}, 'bits_limit: found 1.0 without a price of bits'),
    ((state, batch, {'params': {}}), {}, 'loss_fn: found None and a teacher'),
    ((state, batch), {'ema_decay': 1.5}, 'ema_decay: found 1.5, expected 0 <= ema_decay < 1'),
    ((state, batch), {'accumulation': 0}, 'accumulation: found 0, expected a positive number'),
    ((state, pad_batch(batch, 40)), {}, 'batch: found is_example of a padded batch'),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      step(*arguments, **options)


def test_average_is_exponential(tmp_path):
  _, state = small_networks.compressed_network()
  optimizer = optax.sgd(0.1)
  train_state = small_networks.start(optimizer, with_average=True)
  average = {'params': train_state.params, 'batch_stats': train_state.batch_stats}
  for batch in batches(3):
    train_state, _ = training.train_step(
      train_state, state, batch, apply_fn=Network().apply, optimizer=optimizer, ema_decay=0.75
    )
    new = {'params': train_state.params, 'batch_stats': train_state.batch_stats}
    average = jax.tree.map(lambda a, n: 0.75 * a + 0.25 * n, average, new)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    train_state.average,
    average,
  )
  variables, whole = training.network(train_state, state, averaged=True)
  assert_compressed(variables['params'], state)
  np.testing.assert_allclose(
    variables['batch_stats']['norm']['mean'], average['batch_stats']['norm']['mean'], rtol=1e-4
  )
  opq_jax.save(tmp_path / 'net.opq', variables, whole)
  assert opq_jax.size_report(variables, whole).file == (tmp_path / 'net.opq').stat().st_size


def test_missing_average_is_an_error():
  _, state = small_networks.compressed_network()
  [batch] = batches(1)
  with pytest.raises(ValueError, match='average: found None'):
    training.train_step(
      small_networks.start(SGD),
      state,
      batch,
      apply_fn=Network().apply,
      optimizer=SGD,
      ema_decay=0.9,
    )
  with pytest.raises(ValueError, match='average: found None'):
    training.network(small_networks.start(SGD), state, averaged=True)


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


def test_teacher_is_read_and_kept():
  variables, state = small_networks.compressed_network()
  loss_fn = losses.classification_loss(distillation=1.0, temperature=2.0)
  step = step_of('pmap', 2, Network(), SGD, loss_fn=loss_fn)
  [batch] = batches(1)
  other = jax.tree.map(lambda leaf: -leaf, variables['params'])
  found = []
  for labels, params in (
    (batch['label'], variables['params']),
    (np.zeros_like(batch['label']), variables['params']),
    (batch['label'], other),
  ):
    teacher = {**variables, 'params': params}
    before = jax.tree.map(np.array, teacher)
    new, metrics = step(small_networks.start(SGD), state, {**batch, 'label': labels}, teacher)
    found.append((float(metrics['loss']), np.asarray(new.params['head']['kernel'])))
    assert_same_bits(teacher, before)
  (loss, kernel), (same_loss, same_kernel), (other_loss, other_kernel) = found
  assert loss == same_loss and (kernel == same_kernel).all()
  assert loss != other_loss and (kernel != other_kernel).any()
  with pytest.raises(ValueError, match='expected teacher_logits too'):
    step(small_networks.start(SGD), state, batch)


def test_teacher_of_another_network():
  [batch] = batches(1)
  rng = np.random.default_rng(0)
  images = batch['image'].reshape(len(batch['image']), -1)
  matrices = [rng.normal(size=size).astype(np.float32) for size in ((images.shape[1], 5), (5, 10))]

  def apply_fn(variables, images, train, **_):
    return images @ variables['params']['kernel'], {}

  def teacher_apply(matrices, images, train):
    assert not train
    return images @ matrices[0] @ matrices[1]

  start = training.init_train_state(
    {'params': {'kernel': jnp.ones((images.shape[1], 10))}}, SGD, jax.random.key(0)
  )
  step = functools.partial(
    training.train_step,
    apply_fn=apply_fn,
    optimizer=SGD,
    loss_fn=losses.classification_loss(distillation=1.0),
  )
  batch = {**batch, 'image': images}
  found, _ = step(start, None, batch, matrices, teacher_apply=teacher_apply)
  logits = (images.astype(float) @ matrices[0] @ matrices[1]).astype(np.float32)
  with_logits = {**batch, 'teacher_logits': logits}
  expected, _ = step(start, None, with_logits)
  np.testing.assert_allclose(found.params['kernel'], expected.params['kernel'], rtol=1e-4)
  assert (found.params['kernel'] != start.params['kernel']).any()
  with pytest.raises(ValueError, match='teacher: found None, expected the variables'):
    step(start, None, with_logits, teacher_apply=teacher_apply)


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
