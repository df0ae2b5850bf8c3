"""A slice of a leaf is allocated as a leaf of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax.allocation import leaf_statistics, merge_statistics
from tests.helpers import stacks

TARGETS = [
  {'compression_rate': 10.0},
  {'sparsity': 0.6, 'bits': 3.5},
  {'bits_per_weight': 2.0, 'corrected': False},
  {'bits_per_weight': 2.5, 'objective': 'retained_signal'},
]

pytestmark = [
  pytest.mark.filterwarnings('ignore:the Laplace density'),
  pytest.mark.filterwarnings('ignore:sparsity. found .* equal weights are pruned together'),
]


def assert_equal_trees(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_slices_are_leaves(whole, leaves):
  """Every field of a sliced leaf is that of the leaves apart, bit for bit."""
  assert len(leaves) == np.prod(whole.slice_shape)
  for index, leaf in zip(np.ndindex(whole.slice_shape), leaves, strict=True):
    for field in stacks.FIELDS:
      np.testing.assert_array_equal(getattr(whole, field)[index], getattr(leaf, field), field)


@pytest.mark.parametrize('targets', TARGETS, ids=lambda targets: '-'.join(targets))
@pytest.mark.parametrize('shape', [(4,), (2, 2)])
def test_allocate_slices_are_leaves_apart(targets, shape):
  apart = opq_jax.allocate(stacks.apart(), **targets).tree
  slices = stacks.axes_of_stack(shape)
  whole = opq_jax.allocate(stacks.stacked(shape=shape), slices=slices, **targets).tree
  assert whole['layer'].slices == len(shape) and whole['layer'].slice_shape == shape
  assert whole['layer'].shape == (*shape, 48, 40)
  assert whole['layer'].bits.shape == (*shape, 40) and whole['layer'].threshold.shape == shape
  assert_slices_are_leaves(whole['layer'], [apart[f'layer{i}'] for i in range(4)])
  assert_equal_trees(whole['a'], apart['a'])


@pytest.mark.parametrize('dtype', stacks.DTYPES[1:])
def test_allocate_slices_of_narrow_dtypes(dtype):
  apart = opq_jax.allocate(stacks.apart(dtype), compression_rate=8.0).tree
  whole = opq_jax.allocate(
    stacks.stacked(dtype), compression_rate=8.0, slices=stacks.axes_of_stack()
  )
  assert_slices_are_leaves(whole.tree['layer'], [apart[f'layer{i}'] for i in range(4)])


def test_allocate_experts_do_not_starve_attention():
  # 64 experts of the scale of attention: as many leaves or one, attention has the same bits
  rng = np.random.default_rng(0)
  experts = rng.laplace(size=(64, 24, 32)).astype(np.float32)
  attention = rng.laplace(size=(4, 64, 64)).astype(np.float32)
  one = {'attention': list(attention), 'experts': experts}
  many = {'attention': list(attention), 'experts': list(experts)}
  slices = lambda path, leaf: int(path == 'experts')
  found = opq_jax.allocate(one, bits_per_weight=2.5, slices=slices).tree
  expected = opq_jax.allocate(many, bits_per_weight=2.5).tree
  assert_equal_trees(found['attention'], expected['attention'])
  assert_slices_are_leaves(found['experts'], expected['experts'])
  # cut as one matrix, the experts would be cheap to spoil and attention would have other bits
  blind = opq_jax.allocate(one, bits_per_weight=2.5).tree
  assert abs(float(blind['attention'][0].payload - expected['attention'][0].payload)) > 0.1


def test_allocate_order_of_slices_hardly_matters():
  # scanned layers come kernel by kernel, layers apart come layer by layer
  kernels = {name: np.stack(stacks.layers(seed=seed)) for seed, name in enumerate('qkv')}
  whole = opq_jax.allocate(kernels, compression_rate=12.0, slices=lambda path, leaf: 1).tree
  layers = [{name: kernel[i] for name, kernel in kernels.items()} for i in range(4)]
  apart = opq_jax.allocate(layers, compression_rate=12.0).tree
  for i, layer in enumerate(apart):
    for name, leaf in layer.items():
      np.testing.assert_allclose(whole[name].threshold[i], leaf.threshold, rtol=1e-4)
      np.testing.assert_allclose(whole[name].step[i], leaf.step, rtol=1e-4)
      assert whole[name].levels[i] == leaf.levels


def test_allocate_slices_of_vectors():
  # a slice of one axis is one channel, as a vector is
  vectors = np.random.default_rng(0).laplace(size=(3, 500)).astype(np.float32)
  every = {'compressible': lambda path, leaf: True, 'compression_rate': 9.0}
  whole = opq_jax.allocate({'v': vectors}, slices=lambda path, leaf: 1, **every).tree['v']
  apart = opq_jax.allocate({'v': list(vectors)}, **every).tree['v']
  assert whole.scale.shape == (3, 1)
  assert_slices_are_leaves(whole, apart)


@pytest.mark.parametrize('axis', [-1, 2, 1])
def test_allocate_slices_channel_axis(axis):
  layers = stacks.layers()
  of_slice = axis - 1 if axis > 0 else axis
  whole = opq_jax.allocate(
    {'w': np.stack(layers)}, channel_axis=axis, slices=lambda path, leaf: 1
  ).tree['w']
  apart = opq_jax.allocate({'w': layers}, channel_axis=of_slice).tree['w']
  assert whole.channel_axis == axis
  assert_slices_are_leaves(whole, apart)


def test_allocate_slices_of_zeros():
  layers = stacks.layers()
  layers[2] = np.zeros_like(layers[2])
  slices = lambda path, leaf: 1
  with pytest.warns(UserWarning, match='^slice 2 of w: all weights are zero'):
    whole = opq_jax.allocate({'w': np.stack(layers)}, slices=slices).tree['w']
  with pytest.warns(UserWarning, match='^w/2: all weights are zero'):
    apart = opq_jax.allocate({'w': layers}).tree['w']
  for index in (0, 1, 3):
    assert whole.threshold[index] == apart[index].threshold
  assert (whole.levels[2], whole.sparsity[2], whole.payload[2], whole.step[2]) == (0, 1, 0, 1)
  with pytest.warns(UserWarning, match='^w: all weights are zero'):
    found = opq_jax.allocate(
      {'a': layers[0], 'w': np.zeros((2, 4, 3), np.float32)},
      slices=lambda path, _: int(path == 'w'),
    )
  assert found.tree['w'] is None


def test_allocate_warns_of_dead_slices():
  layers = stacks.layers()
  layers[0] *= 1e-6
  with pytest.warns(UserWarning, match=r'all weights are pruned of slice 0 of w \(all of it\)'):
    opq_jax.allocate(
      {'w': np.stack(layers)},
      slices=lambda path, leaf: 1,
      objective='squared_error',
      compression_rate=12.0,
    )


def test_allocate_objective_of_slices():
  layers = stacks.layers()
  prices = np.array([1.0, 4.0, 2.0, 0.5], np.float32)
  whole = opq_jax.allocate(
    {'w': np.stack(layers)}, slices=lambda path, leaf: 1, objective={'w': prices}
  ).tree['w']
  apart = opq_jax.allocate({'w': layers}, objective={'w': list(prices)}).tree['w']
  assert_slices_are_leaves(whole, apart)
  with pytest.raises(
    ValueError, match=r'^w: found an objective of shape \(3,\), expected one number, or \(4,\)'
  ):
    opq_jax.allocate(
      {'w': np.stack(layers)}, slices=lambda path, leaf: 1, objective={'w': prices[:3]}
    )


@pytest.mark.parametrize(
  ('slices', 'axis', 'message'),
  [
    (3, -1, r'^w: found 3 axes of slices, expected 0 or more, and fewer than the axes'),
    (-1, -1, r'^w: found -1 axes of slices'),
    (1, 0, r'^w: found channel_axis 0, expected an axis of the slices: the first 1'),
    (2, -2, r'^w: found channel_axis -2, expected an axis of the slices'),
  ],
)
def test_allocate_refuses_slices(slices, axis, message):
  with pytest.raises(ValueError, match=message):
    opq_jax.allocate(
      {'w': np.full((3, 4, 5), 0.5, np.float32)}, slices=lambda *_: slices, channel_axis=axis
    )


def test_allocate_names_slices_of_nan():
  stack = np.stack(stacks.layers())
  stack[3, 5, 7] = np.nan
  with pytest.raises(ValueError, match=r'^slice 3 of w: found NaN or infinite weights'):
    opq_jax.allocate({'w': stack}, slices=lambda path, leaf: 1)


@pytest.mark.parametrize('shape', [(4,), (2, 2)])
def test_leaf_statistics_of_slices(shape):
  layers = stacks.layers()
  stack = np.stack(layers).reshape(*shape, *layers[0].shape)
  for weights in (stack, jnp.asarray(stack)):
    whole = leaf_statistics(weights, slices=len(shape))
    traced = jax.jit(lambda w: leaf_statistics(w, slices=len(shape)))(weights)
    for index, layer in zip(np.ndindex(shape), layers, strict=True):
      one = leaf_statistics(layer)
      assert whole.of_slice(index).shape == one.shape
      assert whole.of_slice(index).per_channel == one.per_channel == 48
      assert_equal_trees(whole.of_slice(index), one)
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), traced.of_slice(index), one
      )


@pytest.mark.parametrize('axis', range(4))
def test_merge_statistics_of_slices(axis):
  weights = np.random.default_rng(0).laplace(size=(3, 2, 20, 30)).astype(np.float32)
  for slices in (1, 2):
    whole = leaf_statistics(weights, slices=slices)
    parts = [leaf_statistics(part, slices=slices) for part in np.split(weights, [1], axis)]
    merged = merge_statistics(parts, axis)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, whole)


@pytest.mark.parametrize('targets', TARGETS[:2], ids=lambda targets: '-'.join(targets))
def test_allocate_statistics_of_slices(targets):
  params = stacks.stacked()
  expected = opq_jax.allocate(params, slices=stacks.axes_of_stack(), **targets)
  given = {
    'a': leaf_statistics(params['a']),
    'layer': leaf_statistics(params['layer'], slices=1),
    'norm': params['norm'],
  }
  assert_equal_trees(opq_jax.allocate(given, read=params.get, **targets), expected)


def test_allocate_slices_in_a_trace():
  layers = stacks.layers()
  params = {'w': jnp.asarray(np.stack([layers[0], layers[1], layers[3]]))}
  call = lambda p: opq_jax.allocate(p, compression_rate=9.0, slices=lambda path, leaf: 1)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6),
    jax.jit(call)(params),
    call(params),
  )
