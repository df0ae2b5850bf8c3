"""The building blocks by themselves; `test_torch.py` compares whole networks with PyTorch's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from opq_jax.models.attention import Rotation
from opq_jax.models.layers import (
  adaptive_average_pool,
  conv_bn,
  depthwise_conv,
  dropout,
  max_pool_by_two,
  relu,
)


@pytest.mark.parametrize(
  ('size', 'strides', 'padding'),
  [
    ((6, 7), (2, 2), 'SAME'),
    ((7, 10), (1, 1), 'VALID'),
    ((5, 8), (1, 2), [(2, 0), (0, 1)]),
  ],
)
def test_depthwise_conv_equals_xlas(size, strides, padding):
  rng = np.random.default_rng(0)
  x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in [(2, *size, 5), (3, 3, 1, 5)])

  def value_and_gradient(convolution):
    def loss(x, kernel):
      options = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': 5}
      y = convolution(x, kernel, strides, padding, **options)
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)

  found, expected = map(value_and_gradient, (depthwise_conv, lax.conv_general_dilated))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_depthwise_conv_refuses_dilation():
  x, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 1, 2))
  with pytest.raises(ValueError, match=r'rhs_dilation: found \(2, 2\), expected no dilation'):
    depthwise_conv(x, kernel, (1, 1), 'SAME', rhs_dilation=(2, 2))


def test_conv_bn_without_activation():
  """As the bottlenecks of MobileNet-V2 and ResNet end."""

  class Project(nn.Module):
    @nn.compact
    def __call__(self, x):
      options = {'activation': None, 'epsilon': 1e-5, 'momentum': 0.9, 'padding': 'HALF'}
      options |= {'train': False, 'dtype': jnp.float32}
      return conv_bn(x, 'project', 4, kernel_size=1, **options)

  x = np.random.default_rng(0).normal(size=(1, 3, 3, 2)).astype(np.float32)
  found, variables = jax.jit(Project().init_with_output)(jax.random.key(0), x)
  kernel = np.asarray(variables['params']['project']['kernel'])[0, 0]
  np.testing.assert_allclose(found, x @ kernel / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)
  assert float(found.min()) < 0


def test_relu_is_flaxs_and_a_barrier_on_the_cpu_in_training_alone():
  x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

  def gradient(activation):
    return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(activation(activation(x) - 1.0) + x))))

  expected = gradient(nn.relu)(x)
  for train, barriers in ((True, 4), (False, 0)):
    found = gradient(functools.partial(relu, train=train))
    np.testing.assert_allclose(found(x), expected, rtol=1e-6)
    assert found.lower(x).as_text().count('stablehlo.optimization_barrier') == barriers
  on_gpu = jax.export.export(gradient(lambda x: relu(x, train=True)), platforms=['cuda'])(x)
  assert 'optimization_barrier' not in on_gpu.mlir_module()


@pytest.mark.parametrize(
  ('size', 'windows'), [((13, 7), (6, 7)), ((12, 3), (6, 6)), ((1, 1), (7, 7))]
)
def test_adaptive_average_pool_is_pytorchs(size, windows):
  torch = pytest.importorskip('torch')
  x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  channels_first = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  expected = torch.nn.functional.adaptive_avg_pool2d(channels_first, windows)
  found = adaptive_average_pool(x, *windows)
  np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_dropout_needs_train_and_a_key():
  class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return dropout(self, x, 0.5, train)

  x = jnp.ones((4, 100))
  rngs = {'dropout': jax.random.key(0)}
  np.testing.assert_array_equal(Dropped().apply({}, x, train=False, rngs=rngs), x)
  np.testing.assert_array_equal(Dropped().apply({}, x, train=True), x)
  dropped = Dropped().apply({}, x, train=True, rngs=rngs)
  assert 0.4 < float((dropped == 0).mean()) < 0.6


@pytest.mark.parametrize('size', [(8, 8), (7, 10), (2, 3)])
def test_max_pool_by_two_is_flaxs(size):
  x = jax.random.normal(jax.random.key(0), (2, *size, 5))
  expected = nn.max_pool(x, (2, 2), (2, 2))
  np.testing.assert_array_equal(jax.jit(max_pool_by_two)(x), expected)
  gradient = lambda pool: jax.grad(lambda x: jnp.sum(pool(x) ** 2))(x)
  np.testing.assert_array_equal(
    gradient(max_pool_by_two), gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
  )


def test_rotation_of_llama3_with_equal_factors_has_a_step():
  """Without turns between the two factors, each frequency stays or is divided."""
  plain = Rotation(theta=100.0, original=32).frequencies(16)
  turns = 32 * plain.astype(np.float64) / (2 * np.pi)
  found = Rotation(100.0, 'llama3', 8.0, low=1.0, high=1.0, original=32).frequencies(16)
  np.testing.assert_allclose(found, np.where(turns > 1, plain, plain / 8), rtol=1e-6)
  assert 0 < np.count_nonzero(turns > 1) < 8
