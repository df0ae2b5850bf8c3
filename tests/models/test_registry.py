"""The networks by name: parameters, dtypes, and what all of them have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax import models
from opq_jax.core import trees
from tests.helpers.variables import random_variables

# as published: torchvision's documentation, timm's, Keras' trainable ones; counted by hand for
# CIFAR's, whose paper rounds (0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M)
PARAMETERS = {
  'alexnet': 61_100_840,
  'vgg16': 138_357_544,
  'vgg16_bn': 138_365_992,
  'mobilenet_v1': 4_231_976,
  'mobilenet_v1_075': 2_585_560,
  'mobilenet_v1_050': 1_331_592,
  'mobilenet_v2': 3_504_872,
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet50': 25_557_032,
  'resnet101': 44_549_160,
  'resnet20': 269_722,
  'resnet32': 464_154,
  'resnet44': 658_586,
  'resnet56': 853_018,
  'resnet110': 1_727_962,
}


@functools.cache
def shapes(name):
  return models.variable_shapes(models.create(name))


def test_names_are_all_in_the_table():
  assert list(PARAMETERS) == list(models.names())


@pytest.mark.parametrize('name', models.names())
def test_create_parameter_count(name):
  leaves = jax.tree.leaves(shapes(name)['params'])
  assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', models.names())
def test_create_channels_are_last(name):
  leaves = trees.named_leaves(shapes(name)['params'])
  for path, kernel in leaves.items():
    if path.endswith('/kernel'):
      layer = path.removesuffix('/kernel')
      vectors = [leaves.get(f'{layer}/bias'), leaves.get(f'{layer}_bn/scale')]
      assert any(vector is not None for vector in vectors), path
      assert all(vector is None or vector.shape == kernel.shape[-1:] for vector in vectors), path


# one of every kind of network; others differ in depth or width
KINDS = [
  *('alexnet', 'vgg16', 'vgg16_bn', 'mobilenet_v1', 'mobilenet_v2'),
  *('resnet18', 'resnet50', 'resnet20'),
]


@pytest.mark.parametrize('name', KINDS)
def test_create_keeps_dtypes_in_training(name):
  """Traced alone: strict promotion finds what would mix dtypes."""
  model = models.create(name, num_classes=5, dtype=jnp.bfloat16)
  variables = models.variable_shapes(model)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  images = jax.ShapeDtypeStruct((2, 75, 96, 3), jnp.float32)
  rngs = {'dropout': jax.random.key(0)}
  train = functools.partial(model.apply, train=True, mutable=['batch_stats'], rngs=rngs)
  logits, updates = jax.eval_shape(train, variables, images)
  assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
  assert updates.get('batch_stats') == variables.get('batch_stats')
  assert jax.eval_shape(model.apply, variables, images) == logits


def test_create_in_bfloat16():
  variables = random_variables(models.create('resnet20'))
  images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  # jaxlib 0.12.0 with its YNN fusions gives NaN for convolutions in bfloat16
  options = {'compiler_options': {'xla_cpu_experimental_ynn_fusion_type': ''}}
  exact, rough = (
    jax.jit(models.create('resnet20', dtype=dtype).apply, **options)(variables, images)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  error = jnp.abs(exact - rough).max()
  assert 0 < error < 0.05 * jnp.abs(exact).max()


def test_create_alexnet_dropout():
  model = models.create('alexnet', num_classes=3, hidden=16)
  variables = random_variables(model)
  images = jax.random.normal(jax.random.key(0), (2, 63, 63, 3))
  apply = jax.jit(model.apply, static_argnames='train')
  rngs = {'dropout': jax.random.key(1)}
  evaluated = apply(variables, images)
  np.testing.assert_array_equal(apply(variables, images, rngs=rngs), evaluated)
  np.testing.assert_array_equal(apply(variables, images, train=True), evaluated)
  assert (apply(variables, images, train=True, rngs=rngs) != evaluated).any()


def test_create_lists_the_known_names():
  with pytest.raises(ValueError) as caught:
    models.create('resnet51')
  assert str(caught.value) == f"name: found 'resnet51', expected one of {', '.join(models.names())}"


def test_variable_shapes_of_equal_networks():
  """What is kept of one network is that of its equals alone, and no caller can change it."""
  small = models.create('resnet20', blocks=(1, 1, 1))
  first = models.variable_shapes(small)
  expected = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert first == expected
  first['params'].clear()
  assert models.variable_shapes(models.create('resnet20', blocks=(1, 1, 1))) == expected
  assert models.variable_shapes(models.create('resnet20', blocks=[1, 1, 1])) == expected
  assert models.variable_shapes(models.create('resnet20', blocks=(1, 1, 2))) != expected


@pytest.mark.parametrize('name', ['alexnet', 'vgg16', 'mobilenet_v2', 'resnet18'])
def test_create_refuses_one_image(name):
  with pytest.raises(ValueError, match=r'x: found shape \(64, 64, 3\), expected \[batch'):
    jax.eval_shape(models.create(name).apply, shapes(name), jnp.zeros((64, 64, 3)))
