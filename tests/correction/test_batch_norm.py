"""The correction against numpy, on networks small enough to write down twice."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opq_jax import data
from opq_jax.core.trees import named_leaves
from opq_jax.correction.batch_norm import correct_batch_norm, correct_on_images
from opq_jax.importers import tf_slim
from opq_jax.models import MobileNetV1
from tests.helpers import assets

KEY = jax.random.key(0)
SHAPE = (32, 6)


class Network(nn.Module):
  """Two hidden layers of 5 with BatchNorm, and a head."""

  head: tuple
  momentum: float = 0.9
  dtype: type = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = False):
    for number in (1, 2):
      x = nn.Dense(5, dtype=self.dtype, name=f'hidden_{number}')(x).astype(jnp.float32)
      norm = nn.BatchNorm(not train, momentum=self.momentum, name=f'norm_{number}')
      x = nn.relu(norm(x)).astype(self.dtype)
    for layer in self.head:
      x = layer(x)
    return x


PLAIN = Network((nn.Dense(3),))  # one for all tests: compiled once


def network(head=None, **options):
  """A network, its variables, and these with rounded kernels; three outputs if not said."""
  model = Network(head or (nn.Dense(3),), **options) if head or options else PLAIN
  shapes = jax.eval_shape(model.init, KEY, jnp.zeros(SHAPE))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    positive = path[-1].key in ('scale', 'var')
    values = rng.uniform(0.5, 2, leaf.shape) if positive else rng.normal(size=leaf.shape)
    return values.astype(leaf.dtype)

  variables = jax.tree.map_with_path(draw, shapes)
  round_off = lambda leaf: np.round(leaf * 1.5) / np.float32(1.5) if leaf.ndim > 1 else leaf
  return model, variables, {**variables, 'params': jax.tree.map(round_off, variables['params'])}


def on(batch, apply_fn):
  """`apply_fn` with this batch in the place of the noise."""
  return lambda variables, _, **options: apply_fn(variables, batch, **options)


def moments(variables, batch):
  """Mean and variance before every BatchNorm, and the mean output; numpy, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
  dense = lambda x, layer: x @ layer['kernel'] + layer.get('bias', 0)
  found, x = {}, np.asarray(batch, np.float64)
  for number in (1, 2):
    x = dense(x, params[f'hidden_{number}'])
    mean, var = x.mean(0), x.var(0)
    found[f'norm_{number}'] = mean, var
    norm = params[f'norm_{number}']
    x = (x - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
    x = np.maximum(x, 0)
  return found, dense(x, params['head_0']).mean(0)


def bias_changes(corrected, compressed):
  """The parameters that the correction changed, by how much."""
  before, after = named_leaves(compressed['params']), named_leaves(corrected['params'])
  changes = {name: np.asarray(after[name]) - np.asarray(before[name]) for name in before}
  return {name: change for name, change in changes.items() if change.any()}


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize('momentum', [0.9, 0.9997])
def test_means_variances_and_last_bias_follow_the_moments_that_numpy_finds(momentum):
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


def test_variances_change_by_a_bounded_factor_and_not_at_all_where_there_was_none():
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


def test_the_noise_is_a_standard_normal_batch_of_the_given_shape_determined_by_the_key():
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


def test_noise_of_the_shape_of_images_has_neighbours_alike():
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
def test_noise_is_float32_where_float64_is_enabled(shape):
  with jax.enable_x64(True):
    model, variables, compressed = network()
    seen = []

    def watching(variables, x, **options):
      seen.append(x.dtype)
      return model.apply(variables, x.reshape(-1, 6), **options)

    correct_batch_norm(watching, variables, compressed, KEY, shape)
  assert set(seen) == {np.dtype('float32')}


def test_nothing_changes_where_nothing_was_compressed():
  model, variables, _ = network()
  assert_same(correct_batch_norm(model.apply, variables, variables, KEY, SHAPE), variables)


def test_correcting_twice_is_correcting_once():
  model, variables, compressed = network()
  once = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  twice = correct_batch_norm(model.apply, variables, once, KEY, SHAPE)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), twice, once)


def test_kernels_and_other_collections_pass_through_unchanged():
  model, variables, compressed = network()
  extra = {'cache': {'index': jnp.arange(3)}}
  corrected = correct_batch_norm(model.apply, variables | extra, compressed | extra, KEY, SHAPE)
  assert jax.tree.structure(corrected) == jax.tree.structure(compressed | extra)
  np.testing.assert_array_equal(corrected['cache']['index'], [0, 1, 2])
  assert bias_changes(corrected, compressed).keys() == {'head_0/bias'}


def test_containers_stay_what_they_are():
  model, variables, compressed = network()
  frozen = correct_batch_norm(
    model.apply, flax.core.freeze(variables), flax.core.freeze(compressed), KEY, SHAPE
  )
  assert isinstance(frozen, flax.core.FrozenDict)
  plain = correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)
  assert_same(flax.core.unfreeze(frozen), plain)


def test_it_may_be_traced():
  model, variables, compressed = network()
  correct = lambda *trees: correct_batch_norm(model.apply, *trees, KEY, SHAPE)
  found, expected = jax.jit(correct)(variables, compressed), correct(variables, compressed)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_bfloat16_networks_are_corrected_in_float32():
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
def test_only_a_bias_of_the_output_itself_is_corrected_and_only_one(head, changed):
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


def test_a_networks_dropout_gets_its_randomness_from_the_caller():
  head = (nn.Dropout(0.5, deterministic=False), nn.Dense(3))
  model, variables, compressed = network(head=head)
  apply_fn = functools.partial(model.apply, rngs={'dropout': jax.random.key(3)})
  corrected = correct_batch_norm(apply_fn, variables, compressed, KEY, SHAPE)
  assert bias_changes(corrected, compressed).keys() == {'head_1/bias'}


@pytest.mark.parametrize('lacking', ['params', 'batch_stats'])
def test_a_missing_collection_is_an_error(lacking):
  model, variables, compressed = network()
  del compressed[lacking]
  with pytest.raises(
    ValueError, match=r'compressed: found \[.*expected the collections params and'
  ):
    correct_batch_norm(model.apply, variables, compressed, KEY, SHAPE)


def test_parameters_alone_are_an_error():
  model, variables, compressed = network()
  with pytest.raises(ValueError, match=r'variables: found .*hidden_1.*expected the collections'):
    correct_batch_norm(model.apply, variables['params'], compressed, KEY, SHAPE)


def test_statistics_without_a_batch_norm_are_an_error():
  model, variables, _ = network()
  variables['batch_stats'] = {'spectral': {'sigma': jnp.ones(())}}
  with pytest.raises(ValueError, match=r"batch_stats: found \['spectral/sigma'\], expected a mean"):
    correct_batch_norm(model.apply, variables, variables, KEY, SHAPE)


def test_one_error_lists_every_leaf_in_which_the_trees_differ():
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
def test_an_input_shape_that_is_no_batch_is_an_error(shape):
  model, variables, compressed = network()
  with pytest.raises(ValueError, match=r'input_shape: found \(.*at least 2 examples'):
    correct_batch_norm(model.apply, variables, compressed, KEY, shape)


def test_a_batch_norm_that_does_not_take_part_is_an_error():
  model, variables, compressed = network()
  frozen = lambda variables, x, train, mutable: model.apply(variables, x, mutable=mutable)
  with pytest.raises(ValueError, match=r'found no update of .*norm_1/mean.* with train=True'):
    correct_batch_norm(frozen, variables, compressed, KEY, SHAPE)


def test_a_pretrained_network_recognises_photographs_again():
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


def test_images_take_the_place_of_noise():
  model, variables, compressed = network()
  batches = [jax.random.normal(jax.random.key(k), SHAPE) for k in (7, 8)]
  found = correct_on_images(model.apply, variables, compressed, iter(batches))
  mean, y0, y1 = [], [], []
  for batch in batches:
    (before, a), (after, b) = moments(variables, batch), moments(compressed, batch)
    mean.append(after['norm_1'][0] - before['norm_1'][0])
    y0.append(a)
    y1.append(b)
  old, new = variables['batch_stats']['norm_1'], found['batch_stats']['norm_1']
  np.testing.assert_allclose(new['mean'] - old['mean'], np.mean(mean, 0), rtol=1e-3, atol=1e-5)
  changes = bias_changes(found, compressed)
  assert changes.keys() == {'head_0/bias'}
  expected = np.mean(y0, 0) - np.mean(y1, 0)
  np.testing.assert_allclose(changes['head_0/bias'], expected, rtol=1e-3, atol=1e-5)
  one = correct_on_images(model.apply, variables, compressed, batches[:1])
  alone = correct_batch_norm(on(batches[0], model.apply), variables, compressed, KEY, SHAPE)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, alone)


class Biased(nn.Module):
  """Convolutions and dense layers with biases, a layer without one, and no BatchNorm."""

  @nn.compact
  def __call__(self, x):
    for number, strides in ((1, 1), (2, 2)):
      x = nn.Conv(8, (3, 3), strides, name=f'conv_{number}')(x)
      self.sow('intermediates', f'mean_conv_{number}', x.mean((0, 1, 2)))
      x = nn.relu(x)
    x = nn.relu(nn.Dense(12, use_bias=False, name='free')(x.reshape(len(x), -1)))
    x = nn.Dense(5, name='head')(x)
    self.sow('intermediates', 'mean_head', x.mean(0))
    return x


def test_without_batch_norm_every_layer_with_a_bias_has_its_mean_again():
  model = Biased()
  images = [1 + jax.random.normal(jax.random.key(k), (64, 8, 8, 3)) for k in (1, 2)]
  variables = model.init(KEY, images[0])
  rounded = jax.tree.map(lambda w: jnp.round(w * 8) / 8 if w.ndim > 1 else w, variables)

  def means(network, batch):
    return model.apply(network, batch, mutable=['intermediates'])[1]['intermediates']

  whole = correct_on_images(model.apply, variables, rounded, [jnp.concatenate(images)])
  expected, off, found = (
    means(network, jnp.concatenate(images)) for network in (variables, rounded, whole)
  )
  for name in ('mean_conv_1', 'mean_conv_2', 'mean_head'):
    assert np.abs(off[name][0] - expected[name][0]).max() > 0.02
    np.testing.assert_allclose(found[name][0], expected[name][0], atol=1e-5)
  changed = bias_changes(whole, rounded)
  assert changed.keys() == {'conv_1/bias', 'conv_2/bias', 'head/bias'}
  # of many batches, the mean
  separate = [correct_on_images(model.apply, variables, rounded, [batch]) for batch in images]
  together = correct_on_images(model.apply, variables, rounded, images)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose((a + b) / 2, c, atol=1e-6), *separate, together
  )


def test_images_that_correct_nothing_are_refused():
  model, variables, compressed = network()
  with pytest.raises(ValueError, match='batches: found none'):
    correct_on_images(model.apply, variables, compressed, [])
  params = {'params': {'head': {'kernel': jnp.ones((3, 2))}}}
  apply_fn = nn.Dense(2, use_bias=False).apply
  with pytest.raises(ValueError, match=r'found 1 batches and biases \[\]'):
    flat = {'params': params['params']['head']}
    correct_on_images(apply_fn, flat, flat, [jnp.ones((4, 3))])
  with pytest.raises(ValueError, match=r'compressed: found .* expected the collections params$'):
    correct_on_images(apply_fn, params, {}, [jnp.ones((4, 3))])
