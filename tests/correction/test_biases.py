"""The correction on unlabelled inputs, with BatchNorm and without."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.correction import correct_batch_norm, correct_on_images
from tests.helpers.batch_norm_networks import KEY, SHAPE, bias_changes, moments, network, on


def test_correct_on_images_with_batch_norm():
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


def test_correct_on_images_restores_means():
  model = Biased()
  rng = np.random.default_rng(1)
  images = [rng.normal(1, 1, (64, 8, 8, 3)).astype(np.float32) for _ in range(2)]
  together = np.concatenate(images)
  variables = jax.jit(model.init)(KEY, images[0])
  rounded = jax.tree.map(
    lambda w: np.round(w * 8) / 8 if w.ndim > 1 else w, jax.device_get(variables)
  )

  @jax.jit
  def means(network, batch):
    return model.apply(network, batch, mutable=['intermediates'])[1]['intermediates']

  whole = correct_on_images(model.apply, variables, rounded, [together])
  expected, off, found = (means(network, together) for network in (variables, rounded, whole))
  for name in ('mean_conv_1', 'mean_conv_2', 'mean_head'):
    assert np.abs(off[name][0] - expected[name][0]).max() > 0.02
    np.testing.assert_allclose(found[name][0], expected[name][0], atol=1e-5)
  changed = bias_changes(whole, rounded)
  assert changed.keys() == {'conv_1/bias', 'conv_2/bias', 'head/bias'}
  # of many batches, the mean
  separate = [correct_on_images(model.apply, variables, rounded, [batch]) for batch in images]
  mean = correct_on_images(model.apply, variables, rounded, images)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose((a + b) / 2, c, atol=1e-6), *separate, mean
  )


def test_correct_on_images_refuses_nothing():
  model, variables, compressed = network()
  with pytest.raises(ValueError, match='batches: found none'):
    correct_on_images(model.apply, variables, compressed, [])
  params = {'params': {'head': {'kernel': jnp.ones((3, 2))}}}
  apply_fn = nn.Dense(2, use_bias=False).apply
  with pytest.raises(ValueError, match='found 1 batches and no bias of a layer'):
    flat = {'params': params['params']['head']}
    correct_on_images(apply_fn, flat, flat, [jnp.ones((4, 3))])
  with pytest.raises(ValueError, match='compressed is not the tree of variables'):
    correct_on_images(apply_fn, params, {}, [jnp.ones((4, 3))])


def test_correct_on_images_any_function():
  """Biases of a scan and of heads; not those that are added twice, or to no product of a leaf."""

  def network(params, x):
    def layer(x, leaves):
      z = x @ leaves['w'] + leaves['b']
      return jnp.tanh(z) * params['gate'] + params['position'], z.mean(0)

    x, of_layers = jax.lax.scan(layer, x, params['layers'])
    heads = jnp.einsum('bi,ihf->bhf', x, params['heads']) + params['of_heads']
    twice = heads.reshape(len(x), -1) @ params['last'] + params['twice']
    return of_layers, heads.mean(0), twice + params['twice']

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(0.2, 0.5, shape), jnp.float32)
  params = {
    'layers': {'w': draw(3, 6, 6), 'b': draw(3, 1, 6)},
    'heads': draw(6, 2, 4),
    'of_heads': draw(1, 2, 4),
    'last': draw(8, 3),
    'twice': draw(1, 3),
    'gate': draw(1, 6),
    'position': draw(1, 6),
  }
  x = draw(32, 6)
  rounded = {**params, 'layers': {**params['layers'], 'w': jnp.round(params['layers']['w'])}}
  rounded['heads'] = jnp.round(params['heads'])
  found = correct_on_images(network, params, rounded, [x])
  for expected, corrected, before in zip(
    *(network(tree, x)[:2] for tree in (params, found, rounded)), strict=True
  ):
    assert float(jnp.abs(before - expected).max()) > 0.05
    np.testing.assert_allclose(corrected, expected, atol=1e-5)
  changed = [
    jax.tree_util.keystr(path)
    for path, same in jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda one, other: bool((one == other).all()), found, rounded)
    )
    if not same
  ]
  assert changed == ["['layers']['b']", "['of_heads']"]
