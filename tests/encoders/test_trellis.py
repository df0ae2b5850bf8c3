import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import encoders
from opq_jax.allocation import laplace
from opq_jax.coding import arrangements, trellis
from opq_jax.coding import payload as entropy_coding
from opq_jax.encoders import trellis_leaves
from opq_jax.file import writer

RNG = np.random.default_rng


def laplace_kernel(shape, seed=0, scale=0.1):
  return (scale * RNG(seed).laplace(size=shape)).astype(np.float32)


def plain_state(kernel, rate=16.0):
  return opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=rate))


def error(kernel, values):
  return float(np.square(np.asarray(values, np.float32) - kernel).sum(dtype=np.float64))


@pytest.mark.slow
@pytest.mark.parametrize('rate', [32.0, 16.0, 10.0])
def test_trellis_beats_best_plain_codes(rate):
  # the bits of the best plain codes of an error from the closed forms, not from our encoder
  kernel = laplace_kernel((1024, 512))
  coded, state, _ = opq_jax.compress(kernel, compression_rate=rate, encoder=encoders.Trellis())
  bits = entropy_coding.entropy(np.asarray(opq_jax.encode(coded, state)))
  distortion = error(kernel, coded) / kernel.size / np.mean(np.abs(kernel)) ** 2
  threshold, step = np.meshgrid(np.linspace(0.2, 3.5, 331), np.linspace(0.3, 4.5, 421))
  one = jnp.float32(1)
  errors, bits_of = (
    np.asarray(f(jnp.float32(threshold), jnp.float32(step), one))
    for f in (laplace.distortion, laplace.entropy)
  )
  plain = bits_of[errors <= distortion].min()
  assert 0.91 * plain < bits < 0.95 * plain


def test_trellis_meets_rate():
  tree = {'a': laplace_kernel((3, 3, 32, 64)), 'b': laplace_kernel((256, 128), 1, 0.02)}
  state = opq_jax.init_state(tree, opq_jax.allocate(tree, compression_rate=20.0))
  coded, coded_state, _ = opq_jax.compress(tree, compression_rate=20.0, encoder=encoders.Trellis())
  plain = len(writer.serialize(tree, state))
  assert len(writer.serialize(coded, coded_state)) == pytest.approx(plain, rel=0.03)
  for name, kernel in tree.items():
    assert error(kernel, coded[name]) < 0.95 * error(
      kernel, opq_jax.apply_compression(tree, state)[name]
    )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize(
  'shape', [(3, 3, 16, 24), (200, 48), (24, 16, 3, 3), (30, 4, 16), (3, 3, 1, 96)]
)
def test_trellis_file_loads_exactly(shape, dtype):
  kernel = jnp.asarray(laplace_kernel(shape), dtype)
  coded, state = encoders.Trellis().choose_codes({'w': kernel}, plain_state({'w': kernel}))
  data = writer.serialize(coded, state)
  loaded, loaded_state = opq_jax.load(data)
  assert loaded['w'].dtype == kernel.dtype
  np.testing.assert_array_equal(loaded['w'], np.asarray(coded['w']))
  again = opq_jax.apply_compression(loaded, loaded_state)['w']
  np.testing.assert_array_equal(np.asarray(again), np.asarray(coded['w']))
  np.testing.assert_array_equal(np.asarray(state.tree['w'].mask), np.asarray(coded['w']) != 0)
  with opq_jax.OpqFile(data) as file:
    codes = file.codes('w')
  found = [
    trellis.indices_and_subsets(arrangements.arranged(codes, arrangement)[0])
    for arrangement in arrangements.choices(shape)
  ]
  assert any(item is not None for item in found)


def inputs_and_kernel(width=96, outputs=64):
  rng = RNG(3)
  x = np.maximum(rng.normal(size=(2000, width)) @ rng.normal(size=(width, width)), 0)
  return x.astype(np.float32), laplace_kernel((width, outputs), 4)


@pytest.mark.slow
def test_trellis_feedback_lowers_output_error():
  x, kernel = inputs_and_kernel()
  moments = (x.T @ x / len(x))[None]
  output_error = lambda values: float(np.square(x @ (kernel - np.asarray(values))).sum())
  alone, _, _ = opq_jax.compress(kernel, compression_rate=20.0, encoder=encoders.Trellis())
  coded, state, _ = opq_jax.compress(
    kernel, compression_rate=20.0, encoder=encoders.Trellis(moments)
  )
  without, _, _ = opq_jax.compress(
    kernel, compression_rate=20.0, encoder=encoders.Feedback(moments)
  )
  assert output_error(coded) < 0.7 * output_error(alone)
  assert output_error(coded) < 0.9 * output_error(without)
  codes = np.asarray(opq_jax.encode(coded, state))
  assert trellis.indices_and_subsets(codes) is not None


def test_trellis_of_identity_moments():
  kernel = laplace_kernel((64, 96))
  state = plain_state(kernel)
  coded, _ = encoders.Trellis(np.eye(64, dtype=np.float32)[None]).choose_codes(kernel, state)
  alone, _ = encoders.Trellis().choose_codes(kernel, state)
  assert error(kernel, coded) == pytest.approx(error(kernel, alone), rel=0.01)
  assert np.mean(np.asarray(coded) == np.asarray(alone)) > 0.9


def test_trellis_groups_have_own_moments():
  # a depthwise kernel: every channel reads one input, by a matrix of its own
  rng = RNG(5)
  kernel = laplace_kernel((3, 3, 1, 64), 6)
  mixed = rng.normal(size=(64, 400, 9)) @ rng.normal(size=(64, 9, 9))
  x = mixed.astype(np.float32)
  moments = np.einsum('gni,gnj->gij', x, x) / 400
  state = plain_state(kernel, 12.0)
  output_error = lambda values: float(
    np.square(np.einsum('gni,ig->gn', x, (kernel - np.asarray(values)).reshape(9, 64))).sum()
  )
  coded, _ = encoders.Trellis(moments).choose_codes(kernel, state)
  alone, _ = encoders.Trellis().choose_codes(kernel, state)
  assert output_error(coded) < 0.7 * output_error(alone)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_trellis_escapes_outliers(dtype):
  x, kernel = inputs_and_kernel(width=80)
  kernel[3, 5], kernel[70, 1] = 14.0, -1e3
  kernel = kernel.astype(dtype)
  state = plain_state(kernel)
  moments = (x.T @ x / len(x))[None]
  plain = opq_jax.apply_compression(kernel, state)
  error = lambda values: float(
    np.square(np.asarray(values, np.float64) - np.asarray(kernel, np.float64)).sum()
  )
  for given_moments in (None, moments):
    coded, coded_state = encoders.Trellis(given_moments).choose_codes(kernel, state)
    assert coded[3, 5] == kernel[3, 5] and coded[70, 1] == kernel[70, 1]
    assert np.asarray(coded_state.tree.escaped)[[3, 70], [5, 1]].all()
    codes = np.asarray(opq_jax.encode(coded, coded_state))
    assert np.count_nonzero(codes == -128) < 10
    # weights that are not escaped follow the trellis
    on_grid = np.where(codes == -128, np.int8(0), codes)
    assert trellis.indices_and_subsets(on_grid) is not None
    loaded, _ = opq_jax.load(writer.serialize(coded, coded_state))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(coded))
    if given_moments is None:
      assert error(coded) < 0.95 * error(plain)
    else:
      output_error = lambda values: float(
        np.square(x @ (np.asarray(kernel, np.float32) - np.asarray(values, np.float32))).sum()
      )
      assert output_error(coded) < 0.7 * output_error(plain)


def test_trellis_names_unserved_leaves(monkeypatch):
  x, kernel = inputs_and_kernel(width=80)  # more inputs than a block has
  monkeypatch.setattr(trellis_leaves, '_has_too_many_beyond', lambda *_: True)
  moments = (x.T @ x / len(x))[None]
  state = plain_state(kernel)
  with pytest.warns(UserWarning, match='the trellis does not serve'):
    coded, coded_state = encoders.Trellis(moments).choose_codes(kernel, state)
  # one input after the other in float64, with the inverse that is left after each
  leaf = state.tree
  step, threshold, first = (float(v) for v in (leaf.step, leaf.threshold, leaf.codebook[1]))
  energy = np.diagonal(moments[0]).astype(np.float64).mean()
  inverse = np.linalg.inv(moments[0] / energy + encoders.DAMPING * np.eye(80))
  weights, expected = kernel.astype(np.float64), np.zeros(kernel.shape)
  for i in range(80):
    cell = np.clip((np.abs(weights[i]) - threshold) // step, 0, int(leaf.levels) - 1)
    values = np.where(np.abs(weights[i]) > threshold, first + step * cell, 0)
    expected[i] = np.copysign(values, weights[i])
    errors = np.clip(weights[i] - expected[i], -max(step, threshold), max(step, threshold))
    weights -= np.outer(inverse[:, i] / inverse[i, i], errors)
    inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
  # where a weight is at the edge of two cells, float32 may decide otherwise
  assert np.mean(np.isclose(np.asarray(coded), expected, atol=1e-5)) > 0.99
  np.testing.assert_array_equal(coded_state.tree.codebook, leaf.codebook)
  plain = np.asarray(opq_jax.apply_compression(kernel, state))
  output_error = lambda values: float(np.square(x @ (kernel - np.asarray(values))).sum())
  assert output_error(coded) < 0.7 * output_error(plain)


@pytest.mark.parametrize('exponent', [-60, 50])
def test_trellis_codes_have_no_unit(exponent):
  kernel = laplace_kernel((3, 3, 16, 24))
  unit = np.float32(2.0**exponent)
  encoded = lambda weights: opq_jax.encode(*encoders.Trellis().choose_codes(*weights))
  state = plain_state(kernel)
  record = dataclasses.replace(
    state.tree,
    codebook=unit * state.tree.codebook,
    threshold=unit * state.tree.threshold,
    step=unit * state.tree.step,
  )
  other = dataclasses.replace(state, tree=record)
  np.testing.assert_array_equal(encoded((kernel, state)), encoded((unit * kernel, other)))


def test_trellis_keeps_pruned_leaves():
  kernel = laplace_kernel((32, 32))
  state = plain_state(kernel)
  nothing = jnp.zeros(kernel.shape, jnp.uint8)
  record = dataclasses.replace(state.tree, threshold=jnp.float32(9.0), kinds=nothing)
  coded, _ = encoders.Trellis().choose_codes(kernel, dataclasses.replace(state, tree=record))
  assert not np.asarray(coded).any()


@pytest.mark.parametrize('found', [np.nan, np.inf])
def test_trellis_refuses_nonfinite(found):
  kernel = laplace_kernel((32, 32))
  state = plain_state({'w': kernel})
  kernel[1, 2] = found
  with pytest.raises(ValueError, match='w: found NaN or an infinity, expected finite weights'):
    encoders.Trellis().choose_codes({'w': kernel}, state)


def test_trellis_refuses_wrong_moments():
  kernel = laplace_kernel((32, 32))
  state = plain_state({'w': kernel})
  with pytest.raises(
    ValueError, match=r'w: found moments of shape \(1, 9, 9\), expected \[groups, 32'
  ):
    encoders.Trellis({'w': np.zeros((1, 9, 9), np.float32)}).choose_codes({'w': kernel}, state)
  with pytest.raises(ValueError, match='moments: found'):
    encoders.Trellis({'other': None}).choose_codes({'w': kernel}, state)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (64, 64, 8):
      x = nn.Dense(width)(nn.relu(x))
    return x


@pytest.mark.slow
def test_layer_by_layer_along_trellis():
  # files so small differ by some percent in size and in error: the sums of four networks
  distances = np.zeros(2)
  for seed in range(4):
    x = jnp.asarray(RNG(seed).normal(size=(2048, 32)), jnp.float32)
    variables = Network().init(jax.random.key(seed), x)
    moments = opq_jax.network.second_moments(Network().apply, variables, x)
    fn = Network().apply
    coded_by = lambda encoder, variables=variables: opq_jax.compress(
      variables, compression_rate=20.0, encoder=encoder
    )
    one_by_one, *_ = coded_by(encoders.Trellis(moments))
    coded, coded_state, _ = coded_by(encoders.LayerByLayer(fn, x, encoders.Trellis(moments)))
    plain, *_ = coded_by(encoders.LayerByLayer(fn, x, encoders.Feedback(moments)))
    expected = fn(variables, x)
    distance = lambda tree, x=x, fn=fn, expected=expected: float(
      jnp.square(fn(tree, x) - expected).sum()
    )
    assert distance(coded) < 0.9 * distance(one_by_one)
    distances += distance(coded), distance(plain)
    for name, record in coded_state.tree['params'].items():
      values = np.asarray(coded['params'][name]['kernel'])
      np.testing.assert_array_equal(np.asarray(record['kernel'].mask), values != 0)
  assert distances[0] < 0.97 * distances[1]
