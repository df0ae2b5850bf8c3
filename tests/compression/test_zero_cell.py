"""Grids with a zero cell: weights that become zero and come back while masks stay frozen."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import opq_jax
from opq_jax.compression import CompressionState, add_zero_cell, bits_per_weight
from opq_jax.compression.records import ESCAPED, ON_GRID, PRUNED, ZERO_OR_ON_GRID
from opq_jax.finetuning import training
from tests.helpers import small_networks
from tests.helpers.meshes import lies_alike
from tests.helpers.output_scales import scaled_state, scales_along, unlike


def draw(shape, dtype=np.float32, seed=0):
  return np.random.default_rng(seed).laplace(size=shape).astype(dtype)


def plain(dtype):
  weights = draw((64, 48), dtype)
  weights[3, 4] = 800
  return weights, opq_jax.init_state(weights, opq_jax.allocate(weights, bits_per_weight=1.0))


def stack(dtype):
  weights = draw((3, 40, 32), dtype) * np.array([1, 4, 9], dtype)[:, None, None]
  allocation = opq_jax.allocate(weights, bits_per_weight=1.0, slices=lambda _, leaf: 1)
  return weights, opq_jax.init_state(weights, allocation)


def scaled(dtype):
  scales = scales_along((40, 64), 1)
  weights = unlike((40, 64), scales, dtype=dtype)
  leaf = scaled_state(weights, scales, bits=1.0)
  return weights, CompressionState(leaf)


LEAVES = plain, stack, scaled
DTYPES = np.float32, ml_dtypes.bfloat16


def threshold_of(leaf):
  """The threshold of every weight, from its definition."""
  threshold = np.asarray(leaf.threshold)
  threshold = threshold.reshape(*threshold.shape, *[1] * (leaf.kinds.ndim - threshold.ndim))
  return threshold * (1 if leaf.output_scales is None else np.asarray(leaf.output_scales))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('leaf', LEAVES)
def test_start_is_the_same_network(leaf, dtype):
  weights, state = leaf(dtype)
  with_zero = add_zero_cell(weights, state)
  for function in (opq_jax.apply_compression, opq_jax.encode):
    np.testing.assert_array_equal(function(weights, with_zero), function(weights, state))
  size = opq_jax.size_report(weights, with_zero).file
  assert size == opq_jax.size_report(weights, state).file
  assert float(bits_per_weight(weights, with_zero)) == float(bits_per_weight(weights, state))


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('leaf', LEAVES)
def test_weights_of_the_zero_cell(leaf, share):
  weights, state = leaf(np.float32)
  before, after = (
    np.asarray(own.tree.kinds) for own in (state, add_zero_cell(weights, state, share))
  )
  # all on the grid, and of the pruned ones those of the cell
  np.testing.assert_array_equal(after[before == ON_GRID], ZERO_OR_ON_GRID)
  np.testing.assert_array_equal(after == ESCAPED, before == ESCAPED)
  is_in_cell = np.abs(weights) > np.float32(share) * threshold_of(state.tree)
  np.testing.assert_array_equal(
    after[before == PRUNED], np.where(is_in_cell, ZERO_OR_ON_GRID, PRUNED)[before == PRUNED]
  )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('leaf', LEAVES)
def test_moved_weights(leaf, dtype):
  weights, state = leaf(dtype)
  with_zero = add_zero_cell(weights, state)
  moved = (weights.astype(np.float32) * draw(weights.shape, seed=1)).astype(dtype)
  values = np.asarray(opq_jax.apply_compression(moved, with_zero))
  kinds = np.asarray(with_zero.tree.kinds)
  is_below = np.abs(moved.astype(np.float32)) < threshold_of(state.tree)
  is_zero = (kinds == PRUNED) | ((kinds == ZERO_OR_ON_GRID) & is_below)
  np.testing.assert_array_equal(values == 0, is_zero)
  was_zero = np.asarray(opq_jax.apply_compression(weights, state)) == 0
  assert (was_zero & ~is_zero).any() and (~was_zero & is_zero).any()
  # elsewhere a weight has the value that it has without a zero cell
  everywhere = state.tree.replace(kinds=jnp.maximum(state.tree.kinds, ON_GRID))
  others = np.asarray(opq_jax.apply_compression(moved, CompressionState(everywhere)))
  is_on_grid = ~is_zero & (kinds != ESCAPED)
  np.testing.assert_array_equal(values[is_on_grid], others[is_on_grid])
  np.testing.assert_array_equal(values[kinds == ESCAPED], moved[kinds == ESCAPED])

  # values stay where they are, and codes say the same
  np.testing.assert_array_equal(opq_jax.apply_compression(values, with_zero), values)
  codes = opq_jax.encode(moved, with_zero)
  np.testing.assert_array_equal(opq_jax.decode(codes, with_zero, moved), values)


def test_slices_that_are_mapped():
  """Each slice for itself has the values and derivatives that it has in the stack."""
  weights, state = stack(np.float32)
  state = add_zero_cell(weights, state)
  moved = weights * draw(weights.shape, seed=1)

  def squares(weights, state):
    return jnp.sum(opq_jax.apply_compression(weights, state) ** 2)

  expected = opq_jax.apply_compression(moved, state)
  np.testing.assert_array_equal(jax.vmap(opq_jax.apply_compression)(moved, state), expected)
  _, found = jax.lax.scan(lambda _, x: (None, opq_jax.apply_compression(*x)), None, (moved, state))
  np.testing.assert_array_equal(found, expected)
  gradient = jax.grad(squares)(moved, state)
  np.testing.assert_array_equal(jax.vmap(jax.grad(squares))(moved, state), gradient)
  assert (np.asarray(gradient)[np.asarray(expected) != 0] != 0).all()


def test_leaf_over_a_mesh():
  weights, state = plain(np.float32)
  moved = draw(weights.shape, seed=1)
  layout = NamedSharding(jax.make_mesh((2, 2), ('data', 'model')), P('model', 'data'))
  laid = jax.device_put(weights, layout)
  laid_state = opq_jax.init_state(laid, opq_jax.allocate(weights, bits_per_weight=1.0))
  found, expected = add_zero_cell(laid, laid_state), add_zero_cell(weights, state)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  lies_alike(found.tree.kinds, laid)
  values = opq_jax.apply_compression(jax.device_put(moved, layout), found)
  lies_alike(values, laid)
  np.testing.assert_array_equal(values, opq_jax.apply_compression(moved, expected))


def test_parameters_of_nnx():
  weights, moved = draw((64, 48)), draw((64, 48), seed=1)
  layer = nnx.Linear(64, 48, use_bias=False, rngs=nnx.Rngs(0))
  layer.kernel[...] = jnp.asarray(weights)
  states = []
  for params in (nnx.state(layer), {'kernel': weights}):
    state = opq_jax.init_state(params, opq_jax.allocate(params, bits_per_weight=1.0))
    states.append(add_zero_cell(params, state))
  jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, states))
  layer.kernel[...] = jnp.asarray(moved)
  nnx.update(layer, opq_jax.apply_compression(nnx.state(layer), states[0]))
  expected = opq_jax.apply_compression({'kernel': moved}, states[1])['kernel']
  np.testing.assert_array_equal(layer.kernel[...], expected)


def test_file_has_zeros_as_pruned_weights():
  weights, state = plain(np.float32)
  params, states = {'w': weights}, CompressionState({'w': state.tree})
  with_zero = add_zero_cell(params, states)
  values = opq_jax.apply_compression({'w': draw(weights.shape, seed=1)}, with_zero)
  loaded, loaded_state = opq_jax.load(opq_jax.file.serialize(values, with_zero))
  np.testing.assert_array_equal(loaded['w'], values['w'])
  np.testing.assert_array_equal(loaded_state.tree['w'].mask, np.asarray(values['w']) != 0)


def test_gradients_reach_all_but_pruned_weights():
  weights, state = plain(np.float32)
  with_zero = add_zero_cell(weights, state)
  gradient = jax.grad(lambda w: opq_jax.apply_compression(w, with_zero).sum())(weights)
  np.testing.assert_array_equal(gradient, with_zero.tree.mask)
  assert state.tree.mask.sum() < with_zero.tree.mask.sum() < weights.size


def test_leaf_that_is_pruned_whole_stays_pruned():
  params = {'small': 1e-3 * draw((64, 64)), 'large': draw((64, 64), seed=1)}
  allocation = opq_jax.allocate(params, bits_per_weight=0.3, objective='squared_error')
  assert int(allocation.tree['small'].levels) == 0
  state = opq_jax.init_state(params, allocation)
  with_zero = add_zero_cell(params, state)
  assert not with_zero.tree['small'].mask.any()
  assert with_zero.tree['large'].mask.sum() > state.tree['large'].mask.sum()


@pytest.mark.parametrize('leaf', LEAVES)
def test_bits_are_those_of_the_codes(leaf):
  weights, state = leaf(np.float32)
  with_zero = add_zero_cell(weights, state)
  moved = weights * draw(weights.shape, seed=1)
  codes = opq_jax.encode(moved, with_zero)
  # the bits of weights that have these codes without a zero cell
  kinds = jnp.where(codes == 0, PRUNED, jnp.where(codes == -128, ESCAPED, ON_GRID))
  fixed = CompressionState(state.tree.replace(kinds=kinds.astype(jnp.uint8)))
  np.testing.assert_allclose(
    float(bits_per_weight(moved, with_zero)), float(bits_per_weight(moved, fixed)), rtol=1e-6
  )


def test_derivative_of_leaving_the_zero_cell():
  weights, state = plain(np.float32)
  with_zero = add_zero_cell(weights, state)
  found = np.asarray(jax.grad(bits_per_weight)(weights, with_zero))
  codes, kinds = np.asarray(opq_jax.encode(weights, with_zero)), np.asarray(with_zero.tree.kinds)
  magnitude, threshold = np.abs(weights), float(state.tree.threshold)
  grid = (codes != 0) & (codes != -128)
  mean = (np.sum(np.abs(codes[grid].astype(int)) - 1) + 1) / (grid.sum() + 1)
  price = np.log2(np.mean(codes == 0) / np.mean(grid)) + 1 + np.log2(1 + mean)
  is_alone = (kinds == ZERO_OR_ON_GRID) & (magnitude < threshold) & (magnitude > threshold / 2)
  assert is_alone.any()
  expected = np.sign(weights) * price / threshold / weights.size
  # one more weight of the first cell is counted in the mean
  np.testing.assert_allclose(found[is_alone], expected[is_alone], rtol=1e-2)
  assert not found[(kinds == PRUNED) | (kinds == ESCAPED)].any()


def test_training_with_a_price_empties_the_grid():
  variables, state = small_networks.compressed_network(8.0)
  with_zero = add_zero_cell(variables['params'], state)
  limit = 0.7 * float(bits_per_weight(variables['params'], state))
  optimizer = optax.adam(3e-3)
  step = jax.jit(
    functools.partial(
      training.train_step,
      apply_fn=small_networks.Network().apply,
      optimizer=optimizer,
      price_of_bits=10.0,
      bits_limit=limit,
    )
  )
  train_state = training.init_train_state(variables, optimizer, jax.random.key(0))
  for batch in small_networks.batches(60):
    train_state, _ = step(train_state, with_zero, batch)
  values = opq_jax.apply_compression(train_state.params, with_zero)
  assert opq_jax.size_report(values, with_zero).entropy < opq_jax.size_report(values, state).entropy
  assert float(bits_per_weight(train_state.params, with_zero)) < 1.1 * limit
  for name, leaf in (('hidden', 'kernel'), ('head', 'kernel')):
    is_pruned = np.asarray(with_zero.tree[name][leaf].kinds) == PRUNED
    assert is_pruned.any() and not np.asarray(values[name][leaf])[is_pruned].any()


def test_errors():
  weights, state = plain(np.float32)
  with pytest.raises(ValueError, match=r'share: found 1\.5, expected 0 \.\.\. 1'):
    add_zero_cell(weights, state, 1.5)
  with pytest.raises(ValueError, match=r'found shape \(48, 64\), expected \(64, 48\)'):
    add_zero_cell(weights.T, state)
