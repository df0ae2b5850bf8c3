"""Variables for inference only: equal outputs, smaller files."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import models


def random_variables(model):
  rng = np.random.default_rng(0)

  def draw(leaf):
    if leaf.ndim == 1:
      values = rng.uniform(0.2, 2.0, leaf.shape)
    else:
      values = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
    return jnp.asarray(values, jnp.float32)

  return jax.tree.map(draw, models.variable_shapes(model))


def small_resnet():
  return models.ResNet((1, 1), cifar=True, width=16, num_classes=10)


def small_mobilenet():
  return models.MobileNetV1(width=0.25, num_classes=10)


@pytest.mark.parametrize('create', [small_resnet, small_mobilenet], ids=['resnet', 'mobilenet_v1'])
def test_fold_batch_norm_keeps_logits(create):
  model = create()
  image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
  variables = random_variables(model)
  folded = opq_jax.correction.fold_batch_norm(variables, epsilon=model.epsilon)
  apply = jax.jit(model.apply)
  before, after = (np.asarray(apply(tree, image)) for tree in (variables, folded))
  np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
  assert jax.tree.structure(folded) == jax.tree.structure(variables)
  for leaf in jax.tree.leaves(folded['batch_stats']):
    assert np.unique(leaf).size == 1
  kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
  assert all(one is other for one, other in zip(kernels(variables), kernels(folded), strict=True))


@pytest.mark.slow
def test_folded_and_rounded_file_is_smaller(tmp_path):
  model = models.create('resnet20', num_classes=10)
  variables = random_variables(model)
  state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=16.0))
  folded = opq_jax.correction.fold_batch_norm(variables, epsilon=model.epsilon)
  vectors = sum(leaf.nbytes for leaf in jax.tree.leaves(variables) if leaf.ndim == 1)
  sizes = {}
  for what, tree in (
    ('as it is', variables),
    ('folded', folded),
    ('both', opq_jax.correction.round_uncompressed(folded)),
  ):
    opq_jax.save(tmp_path / 'network.opq', tree, state)
    sizes[what] = (tmp_path / 'network.opq').stat().st_size
    loaded, _ = opq_jax.load(tmp_path / 'network.opq')
    expected = opq_jax.apply_compression(tree, state)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(expected))
  # half of the vectors are constants; and of the others half of the bytes are zeros
  assert sizes['as it is'] - sizes['folded'] > 0.35 * vectors
  assert sizes['folded'] - sizes['both'] > 0.2 * vectors


def test_fold_batch_norm_needs_scale_and_bias():
  for missing in ('scale', 'bias'):
    norm = nn.BatchNorm(use_running_average=True, **{f'use_{missing}': False})
    variables = norm.init(jax.random.key(0), jnp.ones((1, 3)))
    folded = opq_jax.correction.fold_batch_norm(variables, epsilon=1e-5)
    assert all(
      one is other
      for one, other in zip(jax.tree.leaves(folded), jax.tree.leaves(variables), strict=True)
    )


def test_round_uncompressed_keeps_dtypes():
  tree = {
    'kernel': jnp.full((2, 3), 0.1),
    'bias': jnp.full(3, 0.1),
    'half': jnp.full(3, 0.1, jnp.float16),
    'count': jnp.arange(3),
    'norm': {'scale': jnp.full(3, 1e30)},
  }
  rounded = opq_jax.correction.round_uncompressed(tree)
  dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  assert dtypes(rounded) == dtypes(tree)
  for name in ('kernel', 'half', 'count'):
    assert rounded[name] is tree[name]
  np.testing.assert_array_equal(rounded['bias'].view(jnp.uint32) & 0xFFFF, np.zeros(3, np.uint32))
  finer = opq_jax.correction.round_uncompressed({'bias': tree['bias']}, jnp.float16)
  assert 0 < abs(float(finer['bias'][0]) - 0.1) < abs(float(rounded['bias'][0]) - 0.1)
  assert jax.jit(opq_jax.correction.round_uncompressed)(tree)['bias'][0] == rounded['bias'][0]
  all_of_them = opq_jax.correction.round_uncompressed(tree, compressible=lambda path, leaf: False)
  assert all_of_them['kernel'][0, 0] == rounded['bias'][0]


def test_inference_errors_name_the_value():
  with pytest.raises(ValueError, match=r'norm/scale: found 1e\+30, expected at most 65504'):
    opq_jax.correction.round_uncompressed({'norm': {'scale': jnp.full(3, 1e30)}}, jnp.float16)
  with pytest.raises(ValueError, match='dtype: found int8, expected a floating one'):
    opq_jax.correction.round_uncompressed({}, jnp.int8)
  with pytest.raises(ValueError, match='expected batch_stats too'):
    opq_jax.correction.fold_batch_norm({'params': {}}, epsilon=1e-5)
  with pytest.raises(ValueError, match='epsilon: found -1'):
    opq_jax.correction.fold_batch_norm({'params': {}, 'batch_stats': {}}, epsilon=-1)
