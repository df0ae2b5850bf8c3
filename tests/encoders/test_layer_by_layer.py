"""Codes chosen layer after layer, against least squares by NumPy and against feedback alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import encoders
from opq_jax.encoders import fitted_weights, trellis_leaves
from opq_jax.models import layers


class Dense(nn.Module):
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    for number, width in enumerate(self.widths):
      x = nn.Dense(width, name=f'layer_{number}', use_bias=False)(x)
    return x


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  # inputs that know of each other, as those of networks do
  return jnp.asarray(rng.normal(size=(1024, 48)) @ rng.normal(size=(48, 48)), jnp.float32)


def compressed(model, inputs, rate=16.0):
  variables = model.init(jax.random.key(0), inputs)
  moments = opq_jax.network.second_moments(model.apply, variables, inputs)
  encoder = encoders.Feedback(moments)
  coded, state, _ = opq_jax.compress(variables, compression_rate=rate, encoder=encoder)
  return variables, coded, state


def choose_codes(fn, variables, state, inputs, **options):
  first = encoders.Feedback({})  # of which only the way to choose codes is asked here
  return encoders.LayerByLayer(fn, inputs, first, **options).choose_codes(variables, state)


def test_layer_by_layer_first_is_feedback(inputs):
  model = Dense((64,))
  variables, coded, state = compressed(model, inputs)
  found, found_state = choose_codes(model.apply, variables, state, inputs)
  jax.tree.map(np.testing.assert_array_equal, found, coded)
  jax.tree.map(np.testing.assert_array_equal, found_state, state)


def test_layer_by_layer_mends_first_layer(inputs):
  model = Dense((64, 64))
  variables, _, state = compressed(model, inputs, rate=12.0)
  code = lambda share: choose_codes(model.apply, variables, state, inputs, share=share)[0]
  first, second = (np.asarray(variables['params'][f'layer_{i}']['kernel']) for i in (0, 1))
  wanted = np.asarray(inputs, np.float64) @ first @ second
  plain, found = code(0.0), code(1.0)
  np.testing.assert_array_equal(*(t['params']['layer_0']['kernel'] for t in (plain, found)))
  read = np.asarray(inputs @ found['params']['layer_0']['kernel'], np.float64)
  error = lambda tree: np.square(read @ tree['params']['layer_1']['kernel'] - wanted).mean()
  assert error(found) < 0.95 * error(plain)


@pytest.mark.parametrize('share', [0.5, 1.0])
def test_fitted_is_least_squares(inputs, share):
  rng = np.random.default_rng(1)
  others = np.asarray(inputs) + rng.normal(size=inputs.shape).astype(np.float32)
  kernel = rng.normal(size=(48, 8)).astype(np.float32)
  moments, cross = ((others.T @ x / len(x))[None] for x in (others, np.asarray(inputs)))
  best = np.linalg.lstsq(others, np.asarray(inputs) @ kernel)[0]
  found = fitted_weights.fitted_rows(kernel, moments, cross, share, 0.0)
  np.testing.assert_allclose(found, (1 - share) * kernel + share * best, atol=2e-4)
  # a sum in which the other term has an error too
  errors = rng.normal(size=(len(others), 8)).astype(np.float32)
  best = np.linalg.lstsq(others, np.asarray(inputs) @ kernel + errors)[0]
  residual = others.T @ errors / len(others)
  found = fitted_weights.fitted_rows(kernel, moments, cross, share, 0.0, residual)
  np.testing.assert_allclose(found, (1 - share) * kernel + share * best, atol=2e-4)


class Convolutions(nn.Module):
  """A depthwise convolution, a dense one with strides, BatchNorm, a sum of two branches."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = lambda y: nn.relu(nn.BatchNorm(use_running_average=not train)(y))
    x = norm(nn.Conv(32, (3, 3), use_bias=False)(x))
    x = x + norm(nn.Conv(32, (3, 3), feature_group_count=32, use_bias=False)(x))
    x = norm(nn.Conv(64, (3, 3), strides=2, use_bias=False)(x))
    return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.mark.slow
def test_layer_by_layer_generalises():
  model = Convolutions()
  images, others = jnp.split(
    opq_jax.correction.natural_noise(jax.random.key(1), (1024, 8, 8, 3)), 2
  )
  variables, coded, state = compressed(model, images, rate=20.0)
  found, found_state = choose_codes(model.apply, variables, state, images)
  # values and state belong together, and to the grids that were given
  again = opq_jax.apply_compression(found, found_state)
  jax.tree.map(np.testing.assert_array_equal, again, found)
  jax.tree.map(np.testing.assert_array_equal, found['batch_stats'], variables['batch_stats'])

  run = jax.jit(lambda tree: model.apply(tree, others, train=True, mutable=['batch_stats'])[0])
  error = lambda tree: float(np.square(run(tree) - run(variables)).mean())
  assert error(found) < 0.9 * error(coded)


def test_layer_by_layer_keeps_the_rest(inputs):
  model = Dense((64, 64))
  variables = model.init(jax.random.key(0), inputs)
  allocation = opq_jax.allocate(
    variables, compression_rate=12.0, compressible=lambda name, _: 'layer_1' in name
  )
  state = opq_jax.init_state(variables, allocation)
  found, _ = choose_codes(model.apply, variables, state, inputs)
  kernel = lambda tree: np.asarray(tree['params']['layer_0']['kernel'])
  np.testing.assert_array_equal(kernel(found), kernel(variables))


def test_layer_by_layer_names_other_leaves():
  """A leaf that is looked up, used twice or not at all has the codes of `first` alone."""

  def network(params, tokens):
    x = params['table'][tokens]
    x = jnp.tanh(x @ params['once'])
    return jnp.tanh(x @ params['twice']) @ params['twice']

  keys = jax.random.split(jax.random.key(0), 4)
  names = ('once', 'table', 'twice', 'unused')
  params = {name: jax.random.laplace(key, (64, 64)) for name, key in zip(names, keys, strict=True)}
  tokens = jax.random.randint(jax.random.key(1), (512,), 0, 64)
  first = encoders.Feedback(opq_jax.network.second_moments(network, params, tokens))
  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.0))
  named = (
    r'^table, twice, unused: found leaves that are looked up, used several times or not at all'
  )
  with pytest.warns(UserWarning, match=named):
    found, _ = encoders.LayerByLayer(network, tokens, first).choose_codes(params, state)
  alone, _ = first.choose_codes(params, state)
  changed = [name for name in names if (found[name] != alone[name]).any()]
  assert changed == ['once']


def test_layer_by_layer_of_depthwise_layers_of_models():
  """No leaf is named as used in another way, and each makes good the errors before it."""
  options = {'feature_group_count': 32, 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}

  def network(params, x):
    for kernel, mixed in params:
      x = layers.depthwise_conv(x, kernel, (1, 1), 'SAME', **options) @ mixed / 30
    return x

  keys = jax.random.split(jax.random.key(0), 5)
  draw = jax.random.laplace
  params = [(draw(keys[i], (3, 3, 1, 32)), draw(keys[i + 2], (32, 32))) for i in range(2)]
  x = jax.random.normal(keys[4], (8, 12, 12, 32))
  state = opq_jax.init_state(
    params, opq_jax.allocate(params, compression_rate=12.0, compressible=lambda *_: True)
  )
  error = lambda found: float(jnp.square(network(found, x) - network(params, x)).sum())
  rounded = opq_jax.apply_compression(params, state)
  found = choose_codes(network, params, state, x)[0]
  # kernels of the first layer, and of the second
  assert all(
    (own != plain).any() for own, plain in zip(*map(jax.tree.leaves, (found, rounded)), strict=True)
  )
  assert error(found) < 0.9 * error(rounded)


def test_layer_by_layer_names_leaves_with_plain_codes(inputs, monkeypatch):
  monkeypatch.setattr(
    trellis_leaves, '_has_too_many_beyond', lambda scaled, *_: scaled.shape == (64, 32)
  )
  model = Dense((64, 32))
  variables = model.init(jax.random.key(0), inputs)
  state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=12.0))
  encoder = encoders.LayerByLayer(model.apply, inputs, encoders.Trellis())
  with pytest.warns(UserWarning) as notes:
    encoder.choose_codes(variables, state)
  (text,) = [str(note.message) for note in notes]
  assert text.startswith('params/layer_1/kernel: found leaves that the trellis does not serve')
