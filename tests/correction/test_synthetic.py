"""Synthetic inputs against the training data of a network, which their making never sees."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import models
from opq_jax.correction.synthetic import synthetic_inputs
from opq_jax.importers import networks, sources

KEY = jax.random.key(0)
WIDTH, OUTPUTS = 12, 200


class Network(nn.Module):
  """As many outputs as it takes to say how all pairs of inputs go together, and one layer more."""

  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = functools.partial(nn.BatchNorm, not train, momentum=0.9)
    dense = lambda size, name, x: nn.Dense(size, dtype=self.dtype, name=name)(x).astype(jnp.float32)
    x = nn.relu(norm(name='norm')(dense(OUTPUTS, 'first', x))).astype(self.dtype)
    return norm(name='last')(dense(5, 'second', x))


def trained(model=None):
  """Inputs whose axes go together, and a network whose BatchNorms have seen them."""
  model = model or Network()
  rng = np.random.default_rng(0)
  mixed = rng.normal(size=(4096, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
  x = jnp.asarray(mixed + rng.normal(size=WIDTH) / 2, jnp.float32)
  variables = model.init(KEY, x[:2])
  nothing = {**variables, 'batch_stats': jax.tree.map(jnp.zeros_like, variables['batch_stats'])}
  _, updates = model.apply(nothing, x, train=True, mutable=['batch_stats'])
  return (
    model,
    x,
    {**variables, 'batch_stats': jax.tree.map(lambda s: s / 0.1, updates)['batch_stats']},
  )


def off_diagonal(x):
  covariance = np.cov(np.asarray(x, np.float64).T)
  return covariance[np.triu_indices(len(covariance), 1)]


def test_synthetic_inputs_are_correlated():
  model, x, variables = trained()
  found = synthetic_inputs(model.apply, variables, KEY, (512, WIDTH), steps=100)
  start = synthetic_inputs(model.apply, variables, KEY, (512, WIDTH), steps=0)
  alike = lambda inputs: np.corrcoef(off_diagonal(inputs), off_diagonal(x))[0, 1]
  assert alike(found) > 0.95 and abs(alike(start)) < 0.4
  np.testing.assert_allclose(np.mean(found, axis=0), np.mean(x, axis=0), atol=0.1)


def test_synthetic_inputs_improve_codes():
  model, x, variables = trained()
  kernel = variables['params']['first']['kernel']

  def error(inputs):
    moments = opq_jax.network.second_moments(model.apply, variables, inputs)
    encoder = opq_jax.encoders.Feedback(moments)
    coded, *_ = opq_jax.compress(variables, compression_rate=16.0, encoder=encoder)
    return float(np.square(x @ (coded['params']['first']['kernel'] - kernel)).sum())

  noise, synthetic, real = (
    error(inputs)
    for inputs in (
      jax.random.normal(KEY, (512, WIDTH)),
      synthetic_inputs(model.apply, variables, KEY, (512, WIDTH), steps=100),
      x,
    )
  )
  assert synthetic < 0.8 * noise and synthetic < 1.1 * real


def test_synthetic_inputs_are_deterministic():
  model, _, variables = trained()
  shape = (16, WIDTH)
  found = synthetic_inputs(model.apply, variables, KEY, shape, steps=0)
  np.testing.assert_array_equal(found, jax.random.normal(KEY, shape, jnp.float32))
  first, again = (synthetic_inputs(model.apply, variables, KEY, shape, steps=3) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, found)
  traced = jax.jit(lambda variables: synthetic_inputs(model.apply, variables, KEY, shape, steps=3))(
    variables
  )
  np.testing.assert_allclose(traced, first, rtol=1e-3, atol=1e-4)


class Images(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.BatchNorm(not train, name='norm')(nn.Conv(8, (3, 3), name='conv')(x)))
    return nn.Dense(3, name='head')(x.mean(axis=(1, 2)))


def test_synthetic_images_start_from_noise():
  model = Images()
  variables = model.init(KEY, jnp.zeros((1, 8, 8, 3)))
  found = synthetic_inputs(model.apply, variables, KEY, (4, 8, 8, 3), steps=0)
  np.testing.assert_array_equal(found, opq_jax.correction.natural_noise(KEY, (4, 8, 8, 3)))


def test_synthetic_inputs_with_dead_channel():
  """Its variance is 0, and whatever the inputs are it is 0 again."""
  model, _, variables = trained()
  dead = lambda leaf: leaf.at[..., 0].set(0)
  params = dict(variables['params'], first=jax.tree.map(dead, variables['params']['first']))
  stats = dict(variables['batch_stats'], norm=jax.tree.map(dead, variables['batch_stats']['norm']))
  changed = {'params': params, 'batch_stats': stats}
  found = synthetic_inputs(model.apply, changed, KEY, (64, WIDTH))
  assert np.isfinite(found).all()


def test_synthetic_inputs_are_float32():
  model, _, variables = trained(Network(jnp.bfloat16))
  with jax.enable_x64(True):
    found = synthetic_inputs(model.apply, variables, KEY, (16, WIDTH), steps=2)
  assert found.dtype == jnp.float32 and np.isfinite(found).all()


def test_synthetic_inputs_refuse_bad_input():
  model, _, variables = trained()
  for arguments, options, message in (
    ((model.apply, {'params': {}}, KEY, (4, WIDTH)), {}, 'expected batch_stats too'),
    ((model.apply, {**variables, 'batch_stats': {}}, KEY, (4, WIDTH)), {}, 'of some BatchNorm'),
    ((model.apply, variables, KEY, (1, WIDTH)), {}, 'at least 2 examples'),
    ((model.apply, variables, KEY, (4, WIDTH)), {'steps': -1}, 'steps: found -1'),
    ((still(model), variables, KEY, (4, WIDTH)), {}, 'found no update of'),
  ):
    with pytest.raises(ValueError, match=message):
      synthetic_inputs(*arguments, **options)


def still(model):
  """A network whose BatchNorms do not learn."""

  def apply_fn(variables, x, **options):
    output, _ = model.apply(variables, x, **options)
    return output, {'batch_stats': variables['batch_stats']}

  return apply_fn


@pytest.fixture(scope='module')
def network():
  model = models.create('mobilenet_v1_050', num_classes=3)
  source = sources('mobilenet_v1_050')[0]
  return networks.Network('mobilenet_v1_050', model, {'params': {}, 'batch_stats': {}}, source)


def test_synthetic_batches_without_batch_norm(network):
  [noise] = map(np.asarray, networks.synthetic_batches(network))
  assert noise.shape == (16, 224, 224, 3) and noise.std() == pytest.approx(1, rel=1e-3)
  raw = dataclasses.replace(network.source.preprocessing, std=(1 / 255,) * 3)
  source = dataclasses.replace(network.source, preprocessing=raw)
  [in_bytes] = map(np.asarray, networks.synthetic_batches(network._replace(source=source)))
  np.testing.assert_allclose(in_bytes[:, :32, :32], noise[:, :32, :32] * 0.226 * 255, rtol=1e-5)
