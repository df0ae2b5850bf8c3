"""Bits per weight as a term of the loss: value, derivative, and smaller files."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import opq_jax
from opq_jax.compression import CompressionState, bits_per_weight, slice_of
from opq_jax.finetuning import training
from tests.helpers import small_networks
from tests.helpers.output_scales import scaled_state, scales_along, unlike


def h(p):
  return -sum(x * np.log2(x) for x in (p, 1 - p) if x > 0)


def expected_bits(codes):
  """The docstring's formula, from integer codes."""
  n, grid = codes.size, codes[(codes != 0) & (codes != -128)]
  pruned, escaped = np.mean(codes == 0), np.mean(codes == -128)
  mean = (np.sum(np.abs(grid.astype(int)) - 1) + 1) / (grid.size + 1)
  kinds = h(pruned) + (1 - pruned) * h(escaped / (1 - pruned))
  return n * kinds + grid.size * (1 + (1 + mean) * np.log2(1 + mean) - mean * np.log2(mean))


def laplace(shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).laplace(size=shape).astype(dtype)


@pytest.mark.parametrize('bits', [0.3, 1.0, 2.0, 4.0])
def test_bits_are_those_of_the_codes(bits):
  weights = laplace((256, 512))
  state = opq_jax.init_state(weights, opq_jax.allocate(weights, bits_per_weight=bits))
  found = float(bits_per_weight(weights, state))
  codes = np.asarray(opq_jax.encode(weights, state))
  np.testing.assert_allclose(found, expected_bits(codes) / codes.size, rtol=1e-5)
  # of Laplace weights it is the entropy of the codes
  _, counts = np.unique(codes, return_counts=True)
  shares = counts / counts.sum()
  np.testing.assert_allclose(found, -np.sum(shares * np.log2(shares)), rtol=2e-3)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16], ids=str)
def test_leaves_slices_and_escapes_add_up(dtype):
  params = {'stack': laplace((3, 32, 40), 1, dtype), 'plain': laplace((48, 20), 2, dtype)}
  params['stack'][1, 3, 4], params['plain'][5, 6] = 900, -700
  params['bias'] = np.ones(7, dtype)
  allocation = opq_jax.allocate(params, bits_per_weight=2.0, slices=lambda _, leaf: leaf.ndim - 2)
  state = opq_jax.init_state(params, allocation)
  codes = jax.tree.map(np.asarray, opq_jax.encode(params, state))
  assert (codes['stack'] == -128).any() and (codes['plain'] == -128).any()
  total = sum(map(expected_bits, [*codes['stack'], codes['plain']]))
  weights = codes['stack'].size + codes['plain'].size
  np.testing.assert_allclose(bits_per_weight(params, state), total / weights, rtol=1e-5)


def test_bits_of_slices_inside_of_transforms():
  weights = laplace((3, 64, 32))
  state = opq_jax.init_state(
    weights, opq_jax.allocate(weights, bits_per_weight=2.0, slices=lambda path, leaf: 1)
  )
  bits_of_slice = lambda leaf, record: bits_per_weight(leaf, CompressionState(record))
  expected = [bits_of_slice(weights[i], slice_of(state.tree, (i,))) for i in range(3)]
  scanned = jax.lax.scan(
    lambda carry, each: (carry, bits_of_slice(*each)), 0, (weights, state.tree)
  )
  for found in (jax.vmap(bits_of_slice)(weights, state.tree), scanned[1]):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(bits_per_weight(weights, state), np.mean(expected), rtol=1e-5)


def test_nothing_compressed_takes_no_bits():
  assert float(bits_per_weight({'bias': np.ones(3)}, CompressionState({'bias': None}))) == 0


def test_derivative_is_the_price_of_a_cell():
  weights = laplace((64, 96))
  weights[2, 3] = 800
  state = opq_jax.init_state(weights, opq_jax.allocate(weights, bits_per_weight=2.0))
  moved = weights * np.float32(1.3)  # some lie beyond the last cell, and come back too
  found = np.asarray(jax.jit(jax.grad(bits_per_weight))(moved, state))
  codes = np.asarray(opq_jax.encode(moved, state))
  grid = (codes != 0) & (codes != -128)
  mean = (np.sum(np.abs(codes[grid].astype(int)) - 1) + 1) / (grid.sum() + 1)
  price = np.log2((1 + mean) / mean) / float(state.tree.step) / weights.size
  price *= grid.sum() / (grid.sum() + 1)  # of the one cell that is added
  is_priced = grid & (np.abs(moved) > float(state.tree.codebook[1]))
  assert 0 < is_priced.sum() < grid.sum() and codes[2, 3] == -128
  np.testing.assert_allclose(found, np.where(is_priced, np.sign(moved) * price, 0), rtol=1e-5)


def test_derivative_in_units_of_output_scales():
  scales = scales_along((40, 64), 1)
  weights = unlike((40, 64), scales)
  leaf = scaled_state(weights, scales)
  gradient = np.asarray(jax.grad(bits_per_weight)(jnp.asarray(weights), CompressionState(leaf)))
  # a cell of output j is its scale times as wide
  times_scale = np.abs(gradient * np.asarray(leaf.output_scales))
  priced = times_scale[times_scale > 0]
  assert priced.size > 100
  np.testing.assert_allclose(priced, priced[0], rtol=1e-5)


def test_descent_makes_the_file_smaller():
  weights = laplace((64, 128))
  state = opq_jax.init_state(weights, opq_jax.allocate(weights, bits_per_weight=2.0))
  moved = jnp.asarray(weights) * 1.5
  descent = jax.jit(lambda w: w - 1000 * jax.grad(bits_per_weight)(w, state))
  before = opq_jax.size_report(opq_jax.apply_compression(moved, state), state).file
  for _ in range(20):
    moved = descent(moved)
  after = opq_jax.size_report(opq_jax.apply_compression(moved, state), state).file
  assert after < 0.9 * before
  np.testing.assert_array_equal(opq_jax.apply_compression(moved, state) != 0, state.tree.mask)


def test_price_in_train_step():
  variables, state = small_networks.compressed_network(8.0)
  start = float(bits_per_weight(variables['params'], state))
  optimizer = optax.sgd(0.3, momentum=0.9)

  def trained(**options):
    step = jax.jit(
      functools.partial(
        training.train_step,
        apply_fn=small_networks.Network().apply,
        optimizer=optimizer,
        **options,
      )
    )
    train_state = training.init_train_state(variables, optimizer, jax.random.key(0))
    for batch in small_networks.batches(40):
      train_state, metrics = step(train_state, state, batch)
    return float(bits_per_weight(train_state.params, state)), float(metrics['loss'])

  free, loss = trained()
  priced, loss_of_priced = trained(price_of_bits=1.0)
  held, loss_of_held = trained(price_of_bits=1.0, bits_limit=start)
  assert free > start + 0.3
  assert priced < start - 0.3
  assert start - 0.05 < held < start + 0.02
  # that of the task alone
  assert max(loss_of_priced, loss_of_held) < 1.1 * loss


def test_bits_of_another_tree():
  params, state = small_networks.compressed_network()
  turned = jax.tree.map(jnp.transpose, params['params'])
  with pytest.raises(ValueError, match=r'head/kernel: found shape \(5, 64\), expected \(64, 5\)'):
    bits_per_weight(turned, state)
