"""Palettes: at most 2^b values a leaf, none stored exactly, and nearly the least error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import opq_jax
from tests.helpers.allocations import sample


def least_error(weights, levels):
  """Returns the least relative error of all grids of so many levels, by Nelder and Mead.

  Of the same form as ours: pruned up to a threshold, cells of one width, values at one place in all
  cells, and the last cell takes all beyond it.
  """
  magnitude = np.abs(np.asarray(weights, np.float64)).ravel()

  def error(logs):
    threshold, step = np.exp(logs)
    is_left = magnitude > threshold
    cell = np.clip(np.floor((magnitude - threshold) / step), 0, levels - 1)
    rest = (magnitude - threshold - step * cell)[is_left]
    offset = np.clip(rest.mean() if rest.size else 0, step / 64, step * 63 / 64)
    return np.sum((rest - offset) ** 2) + np.sum(magnitude[~is_left] ** 2)

  mean = np.log(magnitude.mean())
  starts = [(mean + a, mean + b) for a in (-3.0, -1.5, -0.5) for b in (-3.0, -2.0, -1.0, 0.0, 1.0)]
  found = min(optimize.minimize(error, start, method='Nelder-Mead').fun for start in starts)
  return found / np.sum(magnitude**2)


def relative_error(values, weights):
  return np.sum((values - weights) ** 2, dtype=np.float64) / np.sum(weights**2, dtype=np.float64)


@pytest.mark.parametrize('bits', [2, 4])
@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
def test_palette_has_nearly_the_least_error_of_all_grids(kind, bits):
  rng = np.random.default_rng(0)
  draws = {'laplace': rng.laplace, 'normal': rng.normal, 'student': partial(rng.standard_t, 4)}
  weights = draws[kind](size=(300, 64)).astype(np.float32)
  network = opq_jax.compress({'kernel': weights}, palette_bits=bits)
  values, record = np.asarray(network.params['kernel']), network.allocation.tree['kernel']
  assert relative_error(values, weights) <= 1.01 * least_error(weights, 2 ** (bits - 1) - 1)
  # predictions are those of the weights over the scales that some outputs may have
  scales = np.float32(1) if record.output_scales is None else np.asarray(record.output_scales)
  assert float(record.error) == pytest.approx(
    relative_error(values / scales, weights / scales), rel=0.01
  )
  end = float(record.threshold + record.step * record.levels)
  assert float(record.clipped) == pytest.approx(np.mean(np.abs(weights / scales) > end), abs=2e-3)


@pytest.mark.filterwarnings('ignore:found')
@given(
  kind=st.sampled_from(['laplace', 'normal', 'student']),
  outlier=st.sampled_from([0.0, 1e3]),
  dtype=st.sampled_from(['float32', 'bfloat16']),
  target=st.sampled_from([{}, {'bits_per_weight': 0.8}, {'compression_rate': 32.0}]),
)
def test_palettes_have_few_values_and_no_escape(kind, outlier, dtype, target):
  weights = np.array(sample((32, 64), kind))
  weights[3, 5] = outlier or weights[3, 5]
  params = {'kernel': jnp.asarray(weights, dtype)}
  network = opq_jax.compress(params, palette_bits=4, **target)
  codes = np.asarray(opq_jax.encode(network.params, network.state)['kernel'])
  assert np.abs(codes.astype(int)).max() <= 7  # an escape is -128
  for column in np.asarray(network.params['kernel'], np.float32).T:
    assert len(np.unique(column)) <= 15


@pytest.mark.parametrize('bits_per_weight', [0.8, 1.5, 2.4])
def test_palettes_within_a_rate(bits_per_weight):
  # far below what 15 values take, the levels are no bound, and palettes cost nothing
  params = {'a': sample((64, 300)), 'b': 3 * sample((128, 100), 'normal')}
  free = opq_jax.compress(params, bits_per_weight=bits_per_weight)
  bound = opq_jax.compress(params, bits_per_weight=bits_per_weight, palette_bits=4)
  error = lambda network: sum(
    float(np.sum((np.asarray(network.params[name]) - params[name]) ** 2)) for name in params
  )
  assert error(bound) <= 1.1 * error(free)
  rate = lambda network: opq_jax.size_report(network.params, network.state).entropy_rate
  assert rate(bound) == pytest.approx(rate(free), rel=0.02)


def test_more_bits_than_palettes_take_are_said():
  params = {'kernel': sample((64, 300))}
  with pytest.warns(UserWarning, match='palettes of 4 bits'):
    network = opq_jax.compress(params, bits_per_weight=6.0, palette_bits=4)
  alone = opq_jax.compress(params, palette_bits=4)
  np.testing.assert_allclose(network.params['kernel'], alone.params['kernel'], rtol=1e-6)


def test_each_slice_has_a_palette_of_its_own():
  stack = {'kernel': jnp.stack([sample((64, 32)), 10 * sample((64, 32), 'normal')])}
  network = opq_jax.compress(stack, palette_bits=4, slices=lambda path, leaf: 1)
  for i in range(2):
    alone = opq_jax.compress({'kernel': stack['kernel'][i]}, palette_bits=4)
    np.testing.assert_allclose(
      network.params['kernel'][i], alone.params['kernel'], rtol=1e-4, atol=0
    )


def test_outputs_of_unlike_scales_have_scales():
  rng = np.random.default_rng(0)
  weights = (rng.normal(size=(256, 16)) * np.geomspace(0.1, 10, 16)).astype(np.float32)
  network = opq_jax.compress({'kernel': weights}, palette_bits=4)
  scales = np.asarray(network.state.tree['kernel'].output_scales)
  values = np.asarray(network.params['kernel'])
  assert len(np.unique(values / scales)) <= 15
  error = np.mean((values - weights) ** 2, axis=0) / np.mean(weights**2, axis=0)
  # 15 levels on normal weights: .0127, as with one scale; those of a file are 6 to 12 % apart
  assert error.max() < 0.02


def test_scales_are_taken_where_their_bits_are_worth_it():
  rng = np.random.default_rng(0)
  spread = np.exp(rng.normal(size=512)).astype(np.float32)
  few_inputs = rng.normal(size=(9, 512)).astype(np.float32) * spread
  alike = rng.normal(size=(512, 512)).astype(np.float32)
  network = opq_jax.compress({'few': few_inputs, 'alike': alike}, palette_bits=4)
  assert network.state.tree['few'].output_scales is not None
  assert network.state.tree['alike'].output_scales is None


def test_vectors_and_long_outputs_have_scales_by_all_their_weights():
  rng = np.random.default_rng(0)
  # one output; and outputs of more inputs than are looked at, whose bits are spread over all
  params = {'vector': rng.laplace(size=3000), 'long': rng.normal(size=(40_000, 2)) * [1, 1.06]}
  params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
  network = opq_jax.compress(params, palette_bits=4, compressible=lambda path, leaf: True)
  assert network.state.tree['vector'].output_scales is None
  assert len(np.unique(np.asarray(network.params['vector']))) <= 15
  assert network.state.tree['long'].output_scales is not None


def test_weights_that_are_not_finite_are_named():
  weights = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
  weights[3, 4] = np.nan
  with pytest.raises(ValueError, match='kernel: found NaN or infinite weights'):
    opq_jax.compress({'kernel': weights}, palette_bits=4)


def test_transposed_ties_stay_equal():
  rng = np.random.default_rng(0)
  table = (rng.normal(size=(96, 64)) * np.exp(rng.normal(size=64))).astype(np.float32)
  params = {'embedding': table, 'head': {'kernel': np.ascontiguousarray(table.T)}}
  values = opq_jax.compress(params, palette_bits=4, compressible=lambda path, leaf: True).params
  np.testing.assert_array_equal(values['embedding'], values['head']['kernel'].T)


def test_leaf_by_leaf_has_the_palettes_of_a_tree_in_memory(tmp_path):
  rng = np.random.default_rng(0)
  spread = np.exp(rng.normal(size=(40, 1))).astype(np.float32)
  params = {'a': rng.laplace(size=(40, 300)).astype(np.float32) * spread, 'b': np.ones(3, 'f4')}
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  leaves = opq_jax.weights.open_weights(tmp_path / 'net.safetensors')
  axis = {'channel_axis': 0}
  opq_jax.weights.compress_stored(leaves, tmp_path / 'net.opq', palette_bits=4, **axis)
  loaded, _ = opq_jax.load(tmp_path / 'net.opq')
  expected = opq_jax.compress(params, palette_bits=4, **axis).params
  np.testing.assert_array_equal(loaded['a'], expected['a'])


def test_lattice_of_few_levels_is_kept_exactly():
  ternary = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (64, 64)), jnp.float32) * 0.5
  network = opq_jax.compress({'kernel': ternary}, palette_bits=2)
  assert (network.params['kernel'] == ternary).all()


def test_palettes_in_a_trace():
  weights = np.random.default_rng(0).laplace(size=(64, 32)).astype(np.float32)
  traced = jax.jit(lambda w: opq_jax.allocate({'kernel': w}, palette_bits=4).tree['kernel'].step)
  concrete = opq_jax.allocate({'kernel': weights}, palette_bits=4).tree['kernel'].step
  assert float(traced(weights)) == pytest.approx(float(concrete), rel=1e-4)


def test_feedback_keeps_to_palettes():
  weights = sample((64, 48), 'student')
  inputs = sample((4096, 64), 'normal') @ (jnp.eye(64) + 0.5 * sample((64, 64), 'normal'))
  moments = {'kernel': (inputs.T @ inputs / len(inputs))[None]}
  error = lambda network: float(jnp.sum(jnp.square(inputs @ (network.params['kernel'] - weights))))
  params = {'kernel': weights}
  feedback = opq_jax.encoders.Feedback(moments)
  coded = opq_jax.compress(params, palette_bits=4, encoder=feedback)
  scales = coded.state.tree['kernel'].output_scales
  values = np.asarray(coded.params['kernel'], np.float64) / (1 if scales is None else scales)
  assert len(np.unique(values)) <= 15
  assert error(coded) < 0.8 * error(opq_jax.compress(params, palette_bits=4))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'palette_bits': 1}, 'palette_bits: found 1, expected a whole number from 2 to 8'),
    ({'palette_bits': 9}, 'found 9'),
    ({'palette_bits': 2.5}, 'found 2.5'),
    ({'palette_bits': 4, 'sparsity': 0.5, 'bits': 3.0}, 'together with sparsity and bits'),
    ({'palette_bits': 4, 'corrected': False}, 'found corrected=False'),
    ({'palette_bits': 4, 'encoder': opq_jax.encoders.Trellis()}, r'together with Trellis\('),
  ],
)
def test_what_palettes_do_not_go_with(options, message):
  with pytest.raises(ValueError, match=message):
    opq_jax.compress({'kernel': sample((64, 32))}, **options)
