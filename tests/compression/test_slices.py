"""A slice of a leaf has the codes and values that it has as a leaf of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opq_jax
from opq_jax.compression import LeafState, clip_to_grid, slice_of, stacked
from opq_jax.compression.cells import value_table
from tests.helpers import stacks

pytestmark = pytest.mark.filterwarnings('ignore:the Laplace density')


def both(dtype, rate=8.0):
  """The trees and the states of the layers apart and of their stack."""
  apart, stack = stacks.apart(dtype), stacks.stacked(dtype)
  one = opq_jax.allocate(apart, compression_rate=rate)
  other = opq_jax.allocate(stack, compression_rate=rate, slices=stacks.axes_of_stack())
  return apart, opq_jax.init_state(apart, one), stack, opq_jax.init_state(stack, other)


@pytest.mark.parametrize('dtype', stacks.DTYPES)
def test_codes_of_slices_are_those_of_leaves(dtype):
  apart, state, stack, whole = both(dtype)
  record = whole.tree['layer']
  assert record.slices == 1 and record.slice_shape == (4,) and record.codebook.shape == (4, 255)
  for name, function in (
    ('codes', opq_jax.encode),
    ('values', opq_jax.apply_compression),
    (
      'values of moved weights',
      lambda p, s: opq_jax.apply_compression(jax.tree.map(lambda w: w * w.dtype.type(1.5), p), s),
    ),
  ):
    found, expected = function(stack, whole), function(apart, state)
    for i in range(4):
      np.testing.assert_array_equal(found['layer'][i], expected[f'layer{i}'], name)
  for i in range(4):
    one = slice_of(record, (i,))
    assert one.slices == 0
    jax.tree.map(np.testing.assert_array_equal, one, state.tree[f'layer{i}'])
  values = opq_jax.apply_compression(stack, whole)
  codes = opq_jax.encode(stack, whole)
  np.testing.assert_array_equal(opq_jax.decode(codes, whole, stack)['layer'], values['layer'])
  # compressed weights are compressed to themselves
  np.testing.assert_array_equal(opq_jax.apply_compression(values, whole)['layer'], values['layer'])


def test_weights_at_edges_of_slices():
  # a quotient in the place of a product with the reciprocal would move weights at edges of cells
  rng = np.random.default_rng(0)
  thresholds, steps = rng.uniform(0.1, 1, 64), rng.uniform(0.01, 0.2, 64)
  cells = np.arange(100)
  stack = (thresholds[:, None] + steps[:, None] * cells).astype(np.float32)
  records = [
    LeafState(
      kinds=jnp.ones(100, jnp.uint8),
      codebook=jnp.zeros(255),
      threshold=jnp.float32(t),
      step=jnp.float32(s),
      levels=jnp.int32(127),
      dtype=np.dtype(np.float32),
    )
    for t, s in zip(thresholds, steps, strict=True)
  ]
  whole = opq_jax.CompressionState(stacked(records, (64,)))
  codes = np.asarray(opq_jax.encode(stack, whole))
  for row, weights, record in zip(codes, stack, records, strict=True):
    expected = opq_jax.encode(weights, opq_jax.CompressionState(record))
    np.testing.assert_array_equal(row, expected)


def test_slices_round_trip_through_stacked():
  rng = np.random.default_rng(0)
  params = {'w': rng.laplace(size=(2, 3, 20, 8)).astype(np.float32)}
  allocation = opq_jax.allocate(params, slices=lambda path, leaf: 2)
  record = opq_jax.init_state(params, allocation).tree['w']
  states = [slice_of(record, index) for index in np.ndindex(record.slice_shape)]
  again = stacked(states, (2, 3))
  assert again.slices == 2 and jax.tree.structure(again) == jax.tree.structure(record)
  jax.tree.map(np.testing.assert_array_equal, again, record)
  assert slice_of(states[0], ()) is states[0] and stacked(states[:1], ()) is states[0]


def test_slices_of_a_state_inside_of_transforms():
  _, _, stack, whole = both(np.float32)
  record = whole.tree['layer']
  # vmap, and a map over the arrays, take the axis of slices as slice_of does
  tables = jax.vmap(value_table)(record)
  np.testing.assert_array_equal(tables, value_table(record))
  one = jax.tree.map(lambda array: array[2], record)
  assert jax.tree.structure(one) == jax.tree.structure(slice_of(record, (2,))) and one.slices == 0
  found = opq_jax.decoded(opq_jax.coded(stack['layer'][2], opq_jax.CompressionState(one)))
  np.testing.assert_array_equal(found, opq_jax.apply_compression(stack, whole)['layer'][2])
  data = opq_jax.file.serialize(stack['layer'][2], opq_jax.CompressionState(one))
  np.testing.assert_array_equal(opq_jax.load(data)[0], found)


def test_derivative_of_slices_is_straight_through():
  _, _, stack, whole = both(np.float32)
  weights = {name: jnp.asarray(leaf) for name, leaf in stack.items()}
  gradient = jax.grad(
    lambda p: sum(jnp.sum(leaf) for leaf in opq_jax.apply_compression(p, whole).values())
  )(weights)
  np.testing.assert_array_equal(gradient['layer'], whole.tree['layer'].mask)


def test_transforms_of_slices():
  apart, state, stack, whole = both(np.float32)
  rng = np.random.default_rng(1)
  far = jax.tree.map(lambda w: w * np.float32(5), (apart, stack))
  noise = rng.normal(size=stack['layer'].shape).astype(np.float32)
  changes = jax.tree.map(np.zeros_like, (apart, stack))
  changes[1]['layer'][:] = noise
  for i in range(4):
    changes[0][f'layer{i}'][:] = noise[i]
  for transform in (clip_to_grid, opq_jax.keep_compressed):
    found, expected = (
      transform(s).update(change, optax.EmptyState(), params)[0]
      for s, change, params in zip((whole, state), changes[::-1], far[::-1], strict=True)
    )
    for i in range(4):
      np.testing.assert_array_equal(found['layer'][i], expected[f'layer{i}'])


def test_finetuning_keeps_slices_compressed():
  _, _, stack, whole = both(np.float32)
  params = {name: jnp.asarray(leaf) for name, leaf in stack.items()}
  optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), opq_jax.keep_compressed(whole))
  memory = optimizer.init(params)
  x = jax.random.normal(jax.random.key(0), (16, 48))

  @jax.jit
  def step(params, memory):
    def loss(params):
      values = opq_jax.apply_compression(params, whole)
      return jnp.mean(jnp.square(jnp.einsum('bi,lio->blo', x, values['layer']) - 1))

    updates, memory = optimizer.update(jax.grad(loss)(params), memory, params)
    return optax.apply_updates(params, updates), memory

  for _ in range(3):
    params, memory = step(params, memory)
  moved = np.asarray(params['layer'])
  assert not np.array_equal(moved, stack['layer'])
  np.testing.assert_array_equal(moved != 0, whole.tree['layer'].mask)


def test_encoders_of_slices():
  _, _, stack, whole = both(np.float32)
  coded = opq_jax.encoders.Rounding().choose_codes(stack, whole)
  values = opq_jax.apply_compression(stack, whole)
  np.testing.assert_array_equal(coded.params['layer'], values['layer'])
  network = opq_jax.compress(stack, compression_rate=8.0, slices=stacks.axes_of_stack())
  jax.tree.map(np.testing.assert_array_equal, network.state, whole)
  grid = dataclasses.replace(whole.tree['layer'], kinds=jnp.zeros_like(whole.tree['layer'].kinds))
  _, again = opq_jax.encoders.Rounding().choose_leaf(stack['layer'], grid, None, 0.0)
  np.testing.assert_array_equal(again.kinds, whole.tree['layer'].kinds)


def test_state_of_slices_in_a_trace():
  _, _, stack, whole = both(np.float32)
  allocation = opq_jax.allocate(stack, compression_rate=8.0, slices=stacks.axes_of_stack())
  traced = jax.jit(opq_jax.init_state)(stack, allocation)
  jax.tree.map(np.testing.assert_array_equal, traced, whole)
