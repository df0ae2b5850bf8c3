"""The network itself; `test_tf_slim.py` compares its logits with PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from opq_jax.core import trees
from opq_jax.models import MobileNetV1

SMALL = MobileNetV1(num_classes=7, width=0.25)


@pytest.fixture(scope='module')
def variables():
  """Random variables of SMALL, without the compilation of its own initialisation."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if leaf.ndim > 1:
      fan_in = np.prod(leaf.shape[:-1])
      return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_in), leaf.shape), leaf.dtype)
    return jnp.full(leaf.shape, path[-1].key in ('scale', 'var'), leaf.dtype)

  return jax.tree.map_with_path(draw, initial(SMALL))


@pytest.fixture(scope='module')
def logits(variables):
  return jax.jit(SMALL.apply)(variables, images(4, 45, 64))


@functools.cache
def initial(model):
  """Shapes and dtypes of the variables of a model."""
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def images(*shape):
  """Patterns of many sizes, in [-1, 1]."""
  noise = jax.random.uniform(jax.random.key(1), (*shape, 3), minval=-0.5, maxval=0.5)
  colour = jax.random.uniform(jax.random.key(2), (shape[0], 1, 1, 3), minval=-0.5, maxval=0.5)
  return noise + colour


def test_mobilenet_v1_parameter_count():
  variables = initial(MobileNetV1())
  count = lambda collection: sum(leaf.size for leaf in jax.tree.leaves(variables[collection]))
  assert count('params') == 4_231_976
  assert count('batch_stats') == 21_888


def test_mobilenet_v1_channels_are_last():
  leaves = trees.named_leaves(initial(SMALL)['params'])
  assert leaves['head/kernel'].shape == (256, 7)
  assert leaves['block_13/depthwise/kernel'].shape == (3, 3, 1, 256)
  for name, kernel in leaves.items():
    if name.endswith('/kernel') and not name.startswith('head'):
      assert kernel.shape[-1:] == leaves[name.replace('/kernel', '_bn/scale')].shape, name


def test_mobilenet_v1_width():
  params = initial(MobileNetV1(width=0.1))['params']
  assert params['stem']['kernel'].shape == (3, 3, 3, 8)
  assert params['head']['kernel'].shape == (102, 1000)


def test_mobilenet_v1_ignores_the_batch(variables, logits):
  assert logits.shape == (4, 7)
  reversed_batch = jax.jit(SMALL.apply)(variables, images(4, 45, 64)[::-1])
  np.testing.assert_allclose(reversed_batch[::-1], logits, rtol=1e-4, atol=1e-5)
  assert jnp.ptp(logits, axis=0).max() > 0.1 * jnp.abs(logits).max()


def test_mobilenet_v1_updates_statistics(variables):
  batch = images(4, 32, 32)
  train = jax.jit(functools.partial(SMALL.apply, train=True, mutable=['batch_stats']))
  _, updates = train(variables, batch)
  seen = lax.conv_general_dilated(
    batch,
    variables['params']['stem']['kernel'],
    (2, 2),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  seen = np.asarray(seen, np.float64)
  new = updates['batch_stats']['stem_bn']
  np.testing.assert_allclose(new['mean'], 0.0003 * seen.mean((0, 1, 2)), rtol=1e-3, atol=1e-8)
  expected = 0.9997 + 0.0003 * seen.var((0, 1, 2))
  np.testing.assert_allclose(new['var'], expected, rtol=1e-6)


def test_mobilenet_v1_in_bfloat16(variables, logits):
  rough = MobileNetV1(num_classes=7, width=0.25, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(initial(rough))} == {jnp.dtype('float32')}
  found = jax.jit(rough.apply)(variables, images(4, 45, 64))
  assert found.dtype == jnp.float32
  error = jnp.abs(found - logits).max()
  assert 0 < error < 0.05 * jnp.abs(logits).max()


def test_mobilenet_v1_refuses_one_image(variables):
  with pytest.raises(ValueError, match=r'x: found shape \(32, 32, 3\), expected \[batch'):
    SMALL.apply(variables, jnp.zeros((32, 32, 3)))


@pytest.mark.parametrize(('platform', 'grouped'), [('cuda', True), ('tpu', True), ('cpu', False)])
def test_mobilenet_v1_program_by_platform(platform, grouped):
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  traced = jax.jit(SMALL.apply).trace(initial(SMALL), image)
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ('feature_group_count = 64' in program) == grouped
