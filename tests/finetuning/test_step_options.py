"""Options of the training step: accumulated gradients, averages, teachers, and what none reads."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opq_jax
from opq_jax.finetuning import losses, parallel, training
from opq_jax.finetuning.batches import pad_batch
from tests.helpers import small_networks
from tests.helpers.small_networks import (
  SGD,
  Network,
  assert_compressed,
  assert_same_bits,
  batches,
  linear,
)


def test_accumulation_equals_whole_batch():
  weights = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(24, 5)), jnp.float32)}
  [batch] = batches(1)
  results = [
    training.train_step(
      training.init_train_state({'params': weights}, SGD, jax.random.key(0)),
      None,
      batch,
      apply_fn=linear,
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


def test_accumulation_keeps_one_gradient():
  """However many parts a batch has, their gradients are not side by side."""
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


def test_options_that_follow_the_step():
  """A decay that warms up and a limit that falls are numbers of the trace."""
  variables, state = small_networks.compressed_network()
  [batch] = batches(1)

  @jax.jit
  def step(train_state, batch):
    done = train_state.step.astype(jnp.float32)
    return training.train_step(
      train_state,
      state,
      batch,
      apply_fn=Network().apply,
      optimizer=SGD,
      ema_decay=(1 + done) / (10 + done),
      price_of_bits=1.0,
      bits_limit=2 - 0.01 * done,
    )

  new, _ = step(small_networks.start(SGD, with_average=True), batch)
  old, moved = (tree['head']['kernel'] for tree in (variables['params'], new.params))
  np.testing.assert_allclose(
    new.average['params']['head']['kernel'], 0.1 * old + 0.9 * moved, rtol=1e-5, atol=1e-7
  )


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


def test_teacher_is_read_and_kept():
  variables, state = small_networks.compressed_network()
  loss_fn = losses.classification_loss(distillation=1.0, temperature=2.0)
  devices = jax.devices()[:2]
  step = parallel.pmap_train_step(Network().apply, SGD, devices=devices, loss_fn=loss_fn)
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
