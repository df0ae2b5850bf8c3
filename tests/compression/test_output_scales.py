"""Outputs with scales: each has the codes and values of its own grid, times the scale."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import opq_jax
from opq_jax.coding.output_scales import GRID_BITS, scales_of
from opq_jax.compression import CompressionState, clip_to_grid, slice_of, stacked
from opq_jax.compression.records import affine_codebook, exact_grid, in_units, of_few_bits
from tests.helpers.output_scales import scaled_state, scales_along, unlike

DTYPES = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16)]


def output_alone(leaf, scale, output, axis):
  """The state of one output: a leaf without scales, on the grid times its own."""
  step, first = leaf.step * scale, leaf.codebook[1] * scale
  return dataclasses.replace(
    leaf,
    kinds=jnp.take(leaf.kinds, output, axis),
    codebook=affine_codebook(first, step, leaf.levels),
    threshold=leaf.threshold * scale,
    step=step,
    output_scales=None,
  )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('axis', [0, 1])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), bits=st.sampled_from([1.0, 3.0, 6.0]))
def test_output_is_the_leaf_alone_on_its_own_grid(dtype, axis, seed, bits):
  scales = scales_along((40, 40), axis, seed=seed)
  weights = unlike((40, 40), scales, seed, dtype)
  leaf = scaled_state(weights, scales, bits=bits)
  values = opq_jax.apply_compression(jnp.asarray(weights), CompressionState(leaf))
  codes = opq_jax.encode(jnp.asarray(weights), CompressionState(leaf))
  for output in range(40):
    own = CompressionState(output_alone(leaf, scales.reshape(-1)[output], output, axis))
    alone = jnp.asarray(np.take(weights, output, axis))
    expected = opq_jax.apply_compression(alone, own)
    assert np.take(np.asarray(values), output, axis).tobytes() == np.asarray(expected).tobytes()
    np.testing.assert_array_equal(
      np.take(np.asarray(codes), output, axis), opq_jax.encode(alone, own)
    )
  # what encode and apply promise of every state
  state = CompressionState(leaf)
  again = opq_jax.apply_compression(values, state)
  assert np.asarray(again).tobytes() == np.asarray(values).tobytes()
  np.testing.assert_array_equal(opq_jax.encode(values, state), codes)
  decoded = opq_jax.decode(codes, state, jnp.asarray(weights))
  assert np.asarray(decoded).tobytes() == np.asarray(values).tobytes()


@settings(deadline=None, max_examples=60)
@given(
  st.floats(1e-20, 1e20),
  st.floats(0, 60),
  st.sampled_from([1, 2, 3, 20, 127]),
  st.integers(-127, 127),
)
def test_products_of_a_scaled_grid_are_exact(step, offset, levels, code):
  grid = jnp.float32(step), jnp.float32(step * offset), jnp.int32(levels)
  step, first = (np.float32(x) for x in exact_grid(*grid, has_scales=True))
  scale = scales_of(np.array(code, np.int8))
  for number in (step, first):
    assert np.float64(scale * number) == np.float64(scale) * np.float64(number)
  index = np.arange(levels, dtype=np.float32)
  products = (scale * step) * index
  np.testing.assert_array_equal(products, np.float64(scale) * np.float64(step) * index)
  assert abs(step / grid[0] - 1) < 2.0**-12


def test_of_few_bits_leaves_what_has_few():
  numbers = jnp.array([0.0, 1.5, 3.0e-7, (2.0**GRID_BITS - 1) * 2**30], jnp.float32)
  few = of_few_bits(numbers)
  assert float(few[0]) == 0 and float(few[1]) == 1.5 and float(few[3]) == float(numbers[3])
  np.testing.assert_allclose(few, numbers, rtol=2.0**-GRID_BITS)


def test_in_units_has_the_codes_of_the_weights():
  scales = scales_along((64, 48), 1)
  weights = unlike((64, 48), scales)
  leaf = scaled_state(weights, scales)
  units, plain = in_units(jnp.asarray(weights), leaf)
  assert plain.output_scales is None and units.dtype == jnp.float32
  found = opq_jax.encode(units, CompressionState(plain))
  expected = opq_jax.encode(jnp.asarray(weights), CompressionState(leaf))
  assert np.count_nonzero(found != expected) <= 2  # at edges of cells


def test_slices_have_scales_of_their_own():
  shape = 3, 20, 30
  scales = scales_along(shape, 2, slices=1)
  weights = unlike(shape, scales)
  leaf = scaled_state(weights, scales, slices=1)
  whole = opq_jax.apply_compression(jnp.asarray(weights), CompressionState(leaf))
  parts = [slice_of(leaf, (i,)) for i in range(3)]
  assert parts[1].output_scales.shape == (1, 30)
  for own, part, values in zip(weights, parts, whole, strict=True):
    alone = opq_jax.apply_compression(jnp.asarray(own), CompressionState(part))
    assert np.asarray(alone).tobytes() == np.asarray(values).tobytes()
  for first, second in zip(
    jax.tree.leaves(stacked(parts, (3,))), jax.tree.leaves(leaf), strict=True
  ):
    np.testing.assert_array_equal(first, second)


def test_finetuning_transforms_know_scales():
  scales = np.array([[1.0, 4.0]], np.float32)
  weights = unlike((64, 2), scales, outliers=0)
  leaf = scaled_state(weights, scales)
  end = float(leaf.threshold) + float(leaf.step) * int(leaf.levels)
  # beyond the last cell of the first output, within that of the second
  latent = jnp.full((64, 2), 2 * end)
  gradient = clip_to_grid(CompressionState(leaf)).update(-latent, (), latent)[0]
  escaped = np.asarray(leaf.escaped)
  assert (np.asarray(gradient)[:, 1] != 0).all()
  assert (np.asarray(gradient)[~escaped[:, 0], 0] == 0).all()
  slope = jax.grad(lambda w: opq_jax.apply_compression(w, CompressionState(leaf)).sum())(latent)
  np.testing.assert_array_equal(slope, leaf.mask)
