"""The correction of BatchNorm against numpy, on networks small enough to write down twice."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opq_jax import data
from opq_jax.correction import correct_batch_norm
from opq_jax.importers import tf_slim
from opq_jax.models import MobileNetV1
from tests.helpers import assets
from tests.helpers.batch_norm_networks import (
  KEY,
  PLAIN,
  SHAPE,
  assert_same,
  bias_changes,
  moments,
  network,
  on,
)


@pytest.mark.parametrize('momentum', [0.9, 0.9997])
def test_correct_batch_norm_equals_numpy(momentum):
  model, variables, compressed = network(momentum=momentum)
  batch = jax.random.normal(jax.random.key(7), SHAPE)
  before, y0 = moments(variables, batch)
  after, y1 = moments(compressed, batch)
  corrected = correct_batch_norm(on(batch, model.apply), variables, compressed, KEY, SHAPE)
  for name, (m0, v0) in before.items():
    m1, v1 = after[name]
    old, new = variables['batch_stats'][name], corrected['batch_stats'][name]
    np.testing.assert_allclose(new['mean'] - old['mean'], m1 - m0, rtol=1e-3, atol=1e-5)
    ratio = np.clip(v1 / v0, 0.05, 4)
    np.testing.assert_allclose(new['var'] / old['var'], ratio, rtol=1e-4)
    assert np.abs(ratio - 1).max() > 0.05
  changes = bias_changes(corrected, compressed)
  assert changes.keys() == {'head_0/bias'}
  np.testing.assert_allclose(changes['head_0/bias'], y0 - y1, rtol=1e-3, atol=1e-5)


def test_correct_batch_norm_bounds_ratios():
  model, variables, _ = network()
  kernel = np.array(variables['params']['hidden_1']['kernel'])
  kernel[:, 0] = 0
  variables['params']['hidden_1']['kernel'] = kernel
  factors = np.array([1, 100, 0.01, 0, 1.5], np.float32)
  changed = jnp.asarray(np.where(np.arange(5) == 0, 1, kernel * factors))
  params = variables['params'] | {'hidden_1': variables['params']['hidden_1'] | {'kernel': changed}}
  compressed = {**variables, 'params': params}
  corrected = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  new, old = (tree['batch_stats']['norm_1']['var'] for tree in (corrected, variables))
  np.testing.assert_allclose(new / old, [1, 4, 0.05, 0.05, 2.25], rtol=1e-5)


def test_noise_is_standard_normal_by_key():
  model, variables, compressed = network()
  seen = []

  def watching(variables, x, **options):
    jax.debug.callback(seen.append, x)
    return model.apply(variables, x, **options)

  for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2)):
    correct_batch_norm(watching, variables, compressed, key, (512, 6))
    jax.effects_barrier()
  first, *_, last = (np.asarray(x) for x in seen)
  assert all(x.shape == (512, 6) and x.dtype == np.float32 for x in (first, last))
  assert abs(first.mean()) < 0.08 and abs(first.std() - 1) < 0.06
  # both networks of one call and the same key again: the same noise; another key: other noise
  half = len(seen) * 2 // 3
  assert all(np.array_equal(x, first) for x in seen[:half])
  assert not np.array_equal(first, last)


def test_noise_of_images_is_correlated():
  model, variables, compressed = network()
  seen = []

  def watching(variables, x, **options):
    jax.debug.callback(seen.append, x)
    return model.apply(variables, x.reshape(-1, 6), **options)

  correct_batch_norm(watching, variables, compressed, KEY, (32, 8, 8, 6))
  jax.effects_barrier()
  x = np.asarray(seen[0])
  assert x.shape == (32, 8, 8, 6) and x.dtype == np.float32
  assert abs(x.std() - 1) < 0.01
  assert (x[:, :, 1:] * x[:, :, :-1]).mean() > 0.5


@pytest.mark.parametrize('shape', [(32, 6), (32, 8, 8, 6)])
def test_noise_is_float32_under_x64(shape):
  with jax.enable_x64(True):
    model, variables, compressed = network()
    seen = []

    def watching(variables, x, **options):
      seen.append(x.dtype)
      return model.apply(variables, x.reshape(-1, 6), **options)

    correct_batch_norm(watching, variables, compressed, KEY, shape)
  assert set(seen) == {np.dtype('float32')}


def test_correct_batch_norm_keeps_original():
  model, variables, _ = network()
  assert_same(correct_batch_norm(model.apply, variables, variables, KEY, SHAPE), variables)


def test_correct_batch_norm_is_idempotent():
  model, variables, compressed = network()
  once = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  twice = correct_batch_norm(model.apply, variables, once, KEY, SHAPE)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), twice, once)


def test_correct_batch_norm_keeps_the_rest():
  model, variables, compressed = network()
  extra = {'cache': {'index': jnp.arange(3)}}
  corrected = correct_batch_norm(model.apply, variables | extra, compressed | extra, KEY, SHAPE)
  assert jax.tree.structure(corrected) == jax.tree.structure(compressed | extra)
  np.testing.assert_array_equal(corrected['cache']['index'], [0, 1, 2])
  assert bias_changes(corrected, compressed).keys() == {'head_0/bias'}


def test_correct_batch_norm_keeps_containers():
  model, variables, compressed = network()
  frozen = correct_batch_norm(
    model.apply, flax.core.freeze(variables), flax.core.freeze(compressed), KEY, SHAPE
  )
  assert isinstance(frozen, flax.core.FrozenDict)
  plain = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  assert_same(flax.core.unfreeze(frozen), plain)


def test_correct_batch_norm_under_jit():
  model, variables, compressed = network()
  correct = lambda *trees: correct_batch_norm(model.apply, *trees, KEY, SHAPE)
  found, expected = jax.jit(correct)(variables, compressed), correct(variables, compressed)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_correct_batch_norm_in_bfloat16():
  head = (nn.Dense(3, dtype=jnp.bfloat16),)
  model, variables, compressed = network(dtype=jnp.bfloat16, head=head)
  corrected = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  assert bias_changes(corrected, compressed).keys() == {'head_0/bias'}
  expected = correct_batch_norm(PLAIN.apply, variables, compressed, KEY, SHAPE)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0.05, atol=0.05), corrected, expected
  )


class Shift(nn.Module):
  """A vector added to the input."""

  @nn.compact
  def __call__(self, x):
    return x + self.param('shift', nn.initializers.normal(), x.shape[-1:]).reshape(1, -1)


@pytest.mark.parametrize(
  ('head', 'changed'),
  [
    ((nn.Dense(3, use_bias=False),), set()),
    ((nn.Dense(3), nn.softmax), set()),
    ((nn.Dense(3), lambda x: 2 * x), set()),
    ((nn.Dense(3), lambda x: {'logits': x}), set()),
    # as wide as the hidden layers, whose vectors are then candidates too
    ((nn.Dense(5),), {'head_0/bias'}),
    ((nn.Dense(3), Shift()), {'head_0/bias'}),
    ((nn.Dense(3), nn.tanh, Shift()), {'head_2/shift'}),
  ],
  ids=[
    'no bias',
    'softmax',
    'scaled',
    'no array',
    'as wide as hidden layers',
    'two biases',
    'outer bias',
  ],
)
def test_output_bias_alone_is_shifted(head, changed):
  model, variables, compressed = network(head=head)
  corrected = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  changes = bias_changes(corrected, compressed)
  assert changes.keys() == changed
  # with the right bias corrected, the mean outputs on the same noise agree
  noise = jax.random.normal(jax.random.split(KEY)[0], SHAPE)

  def mean(tree):
    output, _ = model.apply(tree, noise, train=True, mutable=['batch_stats'])
    return jax.tree.leaves(output)[0].mean(0)

  gap = np.abs(mean(corrected) - mean(variables)).max()
  assert (gap < 1e-5) == bool(changed)


def test_correct_batch_norm_with_dropout():
  head = (nn.Dropout(0.5, deterministic=False), nn.Dense(3))
  model, variables, compressed = network(head=head)
  apply_fn = functools.partial(model.apply, rngs={'dropout': jax.random.key(3)})
  corrected = correct_batch_norm(apply_fn, variables, compressed, KEY, SHAPE)
  assert bias_changes(corrected, compressed).keys() == {'head_1/bias'}


@pytest.mark.parametrize('lacking', ['params', 'batch_stats'])
def test_missing_collection_is_an_error(lacking):
  model, variables, compressed = network()
  del compressed[lacking]
  with pytest.raises(
    ValueError, match=r'compressed: found \[.*expected the collections params and'
  ):
    correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)


def test_params_alone_are_an_error():
  model, variables, compressed = network()
  with pytest.raises(ValueError, match=r'variables: found .*hidden_1.*expected the collections'):
    correct_batch_norm(model.apply, variables['params'], compressed, KEY, SHAPE)


def test_no_batch_norm_is_an_error():
  model, variables, _ = network()
  variables['batch_stats'] = {'spectral': {'sigma': jnp.ones(())}}
  with pytest.raises(ValueError, match=r"batch_stats: found \['spectral/sigma'\], expected a mean"):
    correct_batch_norm(model.apply, variables, variables, KEY, SHAPE)


def test_other_tree_lists_every_leaf():
  model, variables, compressed = network()
  params = {**compressed['params'], 'more': jnp.zeros(2), 'head_0': {'kernel': jnp.zeros((5, 4))}}
  with pytest.raises(ValueError) as caught:
    correct_batch_norm(model.apply, variables, {**compressed, 'params': params}, KEY, SHAPE)
  assert str(caught.value).splitlines()[1:] == [
    '  params/head_0/bias: found nothing, expected float32 of shape (3,)',
    '  params/head_0/kernel: found float32 of shape (5, 4), expected float32 of shape (5, 3)',
    '  params/more: found float32 of shape (2,), expected nothing',
  ]


@pytest.mark.parametrize('shape', [(), (32,), (1, 6), (0, 6), (32, 0)])
def test_input_shape_must_be_a_batch(shape):
  model, variables, compressed = network()
  with pytest.raises(ValueError, match=r'input_shape: found \(.*at least 2 examples'):
    correct_batch_norm(model.apply, variables, compressed, KEY, shape)


def test_idle_batch_norm_is_an_error():
  model, variables, compressed = network()
  frozen = lambda variables, x, train, mutable: model.apply(variables, x, mutable=mutable)
  with pytest.raises(ValueError, match=r'found no update of .*norm_1/mean.* with train=True'):
    correct_batch_norm(frozen, variables, compressed, KEY, SHAPE)


@pytest.mark.slow
def test_correct_batch_norm_restores_top_1():
  folder = assets.assets() / 'tfds'
  variables = tf_slim.mobilenet_v1(load_file(assets.real_weights('mobilenet_v1')))

  def round_off(leaf):
    leaf = np.asarray(leaf)
    step = np.abs(leaf).mean() / 2
    return np.round(leaf / step) * step if leaf.ndim > 1 else leaf

  compressed = {**variables, 'params': jax.tree.map(round_off, variables['params'])}
  model = MobileNetV1()
  corrected = correct_batch_norm(model.apply, variables, compressed, KEY, (16, 128, 128, 3))
  [batch] = data.batches(
    'imagenet2012', 'validation[:32]', data_dir=folder, batch_size=32, preprocessing=data.TF_SLIM
  )
  apply = jax.jit(model.apply)
  top1 = lambda tree: float((apply(tree, batch['image']).argmax(-1) == batch['label']).mean())
  assert top1(compressed) < 0.2
  assert top1(corrected) > 0.65
