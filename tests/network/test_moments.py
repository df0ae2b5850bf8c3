"""Second moments against windows that NumPy cuts out one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax.network import moments


def windows(images, size, strides, pads, dilation=1):
  """[places, rows, columns, channels] of padded images, in loops."""
  padded = np.pad(images, ((0, 0), pads, pads, (0, 0)))
  reach = (size - 1) * dilation + 1
  found = []
  for image in padded:
    for i in range(0, image.shape[0] - reach + 1, strides):
      for j in range(0, image.shape[1] - reach + 1, strides):
        found.append(image[i : i + reach : dilation, j : j + reach : dilation])
  return np.stack(found)


class Convolution(nn.Module):
  options: dict

  @nn.compact
  def __call__(self, x):
    return nn.Conv(4, name='conv', **self.options)(x)


@pytest.mark.parametrize(
  ('options', 'size', 'strides', 'pads', 'dilation', 'groups'),
  [
    ({'kernel_size': (3, 3)}, 3, 1, (1, 1), 1, 1),
    ({'kernel_size': (3, 3), 'padding': 1, 'strides': 2}, 3, 2, (1, 1), 1, 1),
    # TensorFlow's padding of an even side
    ({'kernel_size': (3, 3), 'padding': 'SAME', 'strides': 2}, 3, 2, (0, 1), 1, 1),
    ({'kernel_size': (3, 3), 'padding': 'VALID', 'kernel_dilation': 2}, 3, 1, (0, 0), 2, 1),
    ({'kernel_size': (3, 3), 'feature_group_count': 2}, 3, 1, (1, 1), 1, 2),
    ({'kernel_size': (3, 3), 'feature_group_count': 4, 'strides': 2}, 3, 2, (0, 1), 1, 4),
    ({'kernel_size': (5, 5), 'feature_group_count': 4}, 5, 1, (2, 2), 1, 4),
    ({'kernel_size': (1, 1), 'padding': [(0, 1), (0, 1)]}, 1, 1, (0, 1), 1, 1),
  ],
)
def test_moments_of_convolutions(options, size, strides, pads, dilation, groups):
  x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
  model = Convolution(options)
  variables = model.init(jax.random.key(0), x)
  found = opq_jax.network.second_moments(model.apply, variables, x)['params']['conv']
  assert found['bias'] is None
  seen = windows(x, size, strides, pads, dilation)
  # what is found fits the layer: its own output is the same weighted sum
  output = np.asarray(model.apply(variables, x)).reshape(-1, 4)
  assert len(seen) == len(output)
  kernel = np.asarray(variables['params']['conv']['kernel'])
  for group in range(groups):
    channels = slice(group * 4 // groups, (group + 1) * 4 // groups)
    rows = seen[..., channels].reshape(len(seen), -1)
    np.testing.assert_allclose(
      rows @ kernel[..., channels].reshape(rows.shape[1], -1), output[:, channels], atol=1e-5
    )
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(found['kernel'][group], expected, atol=1e-5)


@pytest.mark.parametrize('size', [3, 5])
def test_moments_of_depthwise_pairs(size):
  # E[x^T y] is no symmetric matrix
  first, second = np.random.default_rng(1).normal(size=(2, 2, 6, 6, 4)).astype(np.float32)
  layer = nn.Conv(4, (size, size), feature_group_count=4)
  found = moments.layer_moments(layer, jnp.asarray(first), jnp.asarray(second))
  x, y = (windows(image, size, 1, (size // 2,) * 2, 1) for image in (first, second))
  expected = np.einsum('nkg,nlg->gkl', *(s.reshape(len(s), -1, 4) for s in (x, y))) / len(x)
  np.testing.assert_allclose(found, expected, atol=1e-5)


class Separable(nn.Module):
  """The first two layers of MobileNets."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = lambda x, name: nn.BatchNorm(use_running_average=not train, name=name)(x)
    x = norm(nn.Conv(8, (3, 3), strides=2, use_bias=False, name='stem')(x), 'stem_bn')
    x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name='depthwise')(nn.relu6(x))
    return norm(x, 'depthwise_bn')


def test_moments_use_batch_statistics():
  x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  variables = Separable().init(jax.random.key(1), x)
  shifted = jax.tree.map(lambda leaf: leaf + 3, variables['batch_stats'])
  found = opq_jax.network.second_moments(
    Separable().apply, {**variables, 'batch_stats': shifted}, x
  )
  assert found['batch_stats']['stem_bn']['mean'] is None
  depthwise = found['params']['depthwise']['kernel']
  assert depthwise.shape == (8, 9, 9)
  # BatchNorm's output before the first ReLU6 has variance 1 and mean 0, whatever was stored
  energy = np.diagonal(depthwise, axis1=1, axis2=2)[:, 4]
  np.testing.assert_allclose(energy, 0.5, atol=0.1)


def test_moments_none_or_error():
  x = np.ones((2, 6, 6, 4), np.float32)
  for options in (
    {'kernel_size': (3, 3), 'padding': 'CIRCULAR'},
    {'kernel_size': (3, 3), 'input_dilation': 2, 'padding': 1},
  ):
    model = Convolution(options)
    variables = model.init(jax.random.key(0), x)
    assert (
      opq_jax.network.second_moments(model.apply, variables, x)['params']['conv']['kernel'] is None
    )

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(4, name='layer')
      return layer(layer(x))

  model = Twice()
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='params/layer/kernel: found a layer that is called twice'):
    opq_jax.network.second_moments(model.apply, variables, x)
