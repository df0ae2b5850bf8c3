"""Error feedback against plain encoding, and against the same thing in plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import opq_jax
from opq_jax import encoders
from opq_jax.compression.records import affine_codebook
from tests.helpers import small_networks


def problem(seed=0, inputs=96, outputs=80, rate=16.0):
  """A kernel, its state, and correlated inputs."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(inputs, inputs)) * rng.uniform(0.1, 1, size=inputs)
  x = (rng.normal(size=(2048, inputs)) @ mixing).astype(np.float32)
  kernel = rng.laplace(size=(inputs, outputs)).astype(np.float32)
  state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=rate))
  return kernel, state, x, (x.T @ x / len(x))[None]


def entropy(codes):
  _, counts = np.unique(np.asarray(codes), return_counts=True)
  share = counts / counts.sum()
  return -(share * np.log2(share)).sum()


def reference(kernel, state, matrix, damping):
  """Codes by the definition: after every input, solve for all that are still to come."""
  leaf = state.tree
  codebook = np.asarray(leaf.codebook)
  matrix = matrix.astype(np.float64) / np.diagonal(matrix).mean()
  matrix += damping * np.eye(len(matrix))
  order = list(np.argsort(-np.diagonal(matrix), kind='stable'))
  target, codes = kernel.astype(np.float64), np.zeros(kernel.shape, int)
  values = np.zeros(kernel.shape)
  for position, i in enumerate(order):
    known, left = order[:position], order[position:]
    # the best unrounded weights of all that are left, given the errors of all that are known
    error = target[known] - values[known]
    best = target[left] + scipy.linalg.solve(
      matrix[np.ix_(left, left)], matrix[np.ix_(left, known)] @ error, assume_a='pos'
    )
    cell = np.floor((np.abs(best[0]) - float(leaf.threshold)) / float(leaf.step)) + 1
    cell = np.clip(cell, 1, int(leaf.levels)).astype(int)
    cell[np.abs(best[0]) <= float(leaf.threshold)] = 0
    codes[i] = np.where(best[0] < 0, -cell, cell)
    # what is pushed on; a weight beyond the grid would bend all others
    most = max(float(leaf.step), float(leaf.threshold))
    error = np.clip(best[0] - codebook[codes[i]], -most, most)
    values[i] = best[0] - error
  return codes


@pytest.mark.parametrize('reach', [3, 127])  # in levels: weights beyond the grid, and none
def test_feedback_equals_least_squares(reach):
  # more inputs than a block has, and no multiple of it
  kernel, state, _, matrix = problem()
  leaf = state.tree
  levels = jnp.int32(reach)
  codebook = affine_codebook(leaf.codebook[1], leaf.step, levels)
  state = opq_jax.CompressionState(dataclasses.replace(leaf, levels=levels, codebook=codebook))
  coded, coded_state = encoders.Feedback(matrix).choose_codes(kernel, state)
  found = np.asarray(opq_jax.encode(coded, coded_state))
  expected = reference(kernel, state, matrix[0], encoders.DAMPING)
  # rounding may move a weight over the edge of its cell, and that its channel's later ones
  assert (found == expected).all(axis=0).mean() > 0.9


@pytest.mark.parametrize('rate', [8.0, 16.0, 24.0])
def test_feedback_lowers_output_error(rate):
  kernel, state, x, matrix = problem(rate=rate)
  plain = np.asarray(opq_jax.apply_compression(kernel, state))
  coded, coded_state, _ = opq_jax.compress(
    kernel, compression_rate=rate, encoder=encoders.Feedback(matrix)
  )
  bits = entropy(opq_jax.encode(coded, coded_state)) / entropy(opq_jax.encode(kernel, state))
  assert bits == pytest.approx(1, abs=0.01)
  error = lambda values: np.square(x @ (kernel - values)).sum()
  assert error(np.asarray(coded)) < 0.7 * error(plain)


def test_feedback_of_identity_is_rounding():
  kernel, state, _, _ = problem()
  matrix = np.eye(96, dtype=np.float32)[None]
  coded, coded_state = encoders.Feedback(matrix).choose_codes(kernel, state)
  plain = opq_jax.apply_compression(kernel, state)
  small_networks.assert_same_bits((coded, coded_state), (plain, state))


def test_feedback_groups_have_own_moments():
  kernel, _, _, _ = problem(inputs=9, outputs=32)
  kernel = kernel.reshape(3, 3, 1, 32)
  state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=8.0))
  rng = np.random.default_rng(1)
  rows = rng.normal(size=(16, 64, 9)) @ rng.normal(size=(16, 9, 9))
  matrices = (np.swapaxes(rows, 1, 2) @ rows / 64).astype(np.float32)
  coded, coded_state = encoders.Feedback(matrices).choose_codes(kernel, state)
  found = np.asarray(opq_jax.encode(coded, coded_state)).reshape(9, 16, 2)
  for group in range(16):
    part = kernel.reshape(9, 16, 2)[:, group]
    expected = reference(part, state, matrices[group], encoders.DAMPING)
    assert (found[:, group] == expected).mean() > 0.85


def test_feedback_network_survives_file(tmp_path):
  variables, _ = small_networks.compressed_network()
  state = opq_jax.init_state(variables, opq_jax.allocate(variables, compression_rate=16.0))
  x = np.stack([batch['image'] for batch in small_networks.batches(2)]).reshape(-1, 24)
  found = opq_jax.network.second_moments(small_networks.Network().apply, variables, x)
  # a layer without moments keeps its codes
  found['params']['head']['kernel'] = None
  coded, coded_state = encoders.Feedback(found).choose_codes(variables, state)
  small_networks.assert_compressed(coded, coded_state)
  small_networks.assert_same_bits(opq_jax.apply_compression(coded, coded_state), coded)
  plain = opq_jax.apply_compression(variables, state)
  head = lambda tree: tree['params']['head']
  small_networks.assert_same_bits(head(coded), head(plain))
  hidden = lambda tree: np.asarray(tree['params']['hidden']['kernel'])
  assert (hidden(coded) != hidden(plain)).any()

  opq_jax.save(tmp_path / 'net.opq', coded, coded_state)
  loaded, loaded_state = opq_jax.load(tmp_path / 'net.opq', like=coded)
  small_networks.assert_same_bits(loaded, coded)
  small_networks.assert_same_bits(loaded_state, coded_state)


def test_feedback_may_be_traced():
  kernel, state, _, matrix = problem(inputs=20, outputs=8)
  choose = lambda *args: encoders.Feedback(args[2]).choose_codes(*args[:2])
  found = jax.jit(choose)(kernel, state, matrix)
  again = choose(kernel, state, matrix)
  small_networks.assert_same_bits(found, again)


def test_feedback_of_zeros_and_dead_inputs():
  kernel, state, _, matrix = problem(inputs=20, outputs=8)
  dead = matrix.copy()
  dead[:, 3], dead[:, :, 3] = 0, 0
  for moments in (np.zeros_like(matrix), dead):
    coded, coded_state = encoders.Feedback(moments).choose_codes(kernel, state)
    small_networks.assert_compressed(coded, coded_state)
  kernel, _, _, matrix = problem()
  zeros = np.zeros_like(kernel)
  both = {'zeros': zeros, 'kernel': kernel}
  allocation = opq_jax.allocate(both, compression_rate=16.0, corrected=False)
  state = opq_jax.init_state(zeros, opq_jax.Allocation(allocation.tree['zeros']))
  coded, coded_state = encoders.Feedback(matrix).choose_codes(zeros, state)
  assert not np.asarray(coded).any() and not np.asarray(coded_state.tree.mask).any()


def test_feedback_keeps_bfloat16():
  kernel, _, _, matrix = problem(inputs=20, outputs=64)
  kernel = jnp.asarray(kernel, jnp.bfloat16)
  state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  coded, coded_state = encoders.Feedback(matrix).choose_codes(kernel, state)
  assert coded.dtype == jnp.bfloat16
  small_networks.assert_same_bits(opq_jax.apply_compression(coded, coded_state), coded)


def test_feedback_errors_name_the_leaf():
  kernel, state, _, matrix = problem(inputs=20, outputs=8)
  params, tree = {'kernel': kernel}, opq_jax.CompressionState({'kernel': state.tree})
  with pytest.raises(ValueError, match=r'kernel: found moments of shape \(1, 19, 19\)'):
    encoders.Feedback({'kernel': matrix[:, 1:, 1:]}).choose_codes(params, tree)
  with pytest.raises(ValueError, match='kernel: found NaN or infinite moments'):
    encoders.Feedback({'kernel': matrix * np.nan}).choose_codes(params, tree)
  with pytest.raises(ValueError, match='moments: found'):
    encoders.Feedback([matrix]).choose_codes(params, tree)


def test_feedback_ignores_massive_rows():
  kernel, _, _, _ = problem(inputs=256, outputs=64)
  kernel[0, 0] = 100.0  # beyond the grid
  leaf = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=20.0)).tree
  levels = jnp.int32(12)
  codebook = affine_codebook(leaf.codebook[1], leaf.step, levels)
  state = opq_jax.CompressionState(dataclasses.replace(leaf, levels=levels, codebook=codebook))
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2048, 256)).astype(np.float32)
  massive = 30 * np.abs(rng.normal(size=256)).astype(np.float32)
  massive[0] = 900
  rows = np.concatenate([x, np.tile(massive, (8, 1))])
  coded, _ = encoders.Feedback((rows.T @ rows / len(rows))[None]).choose_codes(kernel, state)
  plain = opq_jax.apply_compression(kernel, state)
  error = lambda x, values: float(np.square(x @ (kernel - np.asarray(values))).sum())
  assert error(rows, coded) < error(rows, plain)
  # pushing the whole error of the weight beyond the grid on makes it many times larger
  assert error(x, coded) < 1.02 * error(x, plain)


@pytest.mark.parametrize('damping', [-1.0, float('nan'), float('inf')])
@pytest.mark.parametrize('encoder', [encoders.Feedback, encoders.Trellis])
def test_damping_is_checked(encoder, damping):
  with pytest.raises(ValueError, match=r'damping: found .*, expected a finite number of 0'):
    encoder(np.eye(2)[None], damping=damping)


@pytest.mark.parametrize('encoder', [encoders.Feedback, encoders.Trellis])
def test_indefinite_moments_are_refused(encoder):
  kernel, state, _, moments = problem()
  singular = np.ones_like(moments)
  params, grids = {'kernel': kernel}, opq_jax.CompressionState({'kernel': state.tree})
  for matrix, damping in ((singular, 0.0), (moments - 2 * np.eye(96) * moments.max(), 0.05)):
    with pytest.raises(ValueError, match=r'^kernel: found moments that are not positive definite'):
      encoder({'kernel': matrix.astype(np.float32)}, damping).choose_codes(params, grids)
  # damped, they have a factor; in a trace nobody can be told, and weights are rounded
  encoder({'kernel': singular}, 0.05).choose_codes(params, grids)


def test_indefinite_moments_are_rounded_in_trace():
  kernel, state, _, moments = problem()
  traced = jax.jit(lambda m: encoders.Feedback(m, 0.0).choose_codes(kernel, state).params)
  rounded = encoders.Rounding().choose_codes(kernel, state).params
  np.testing.assert_array_equal(traced(np.ones_like(moments)), rounded)


def test_entropy_of_many_equal_codes():
  from opq_jax.encoders.feedback import _leaf_bits

  codes = np.zeros(3 << 23, np.int8)
  codes[: 1 << 21] = 1
  share = 1 / 12
  expected = codes.size * -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
  np.testing.assert_allclose(_leaf_bits(codes, 32.0), expected, rtol=1e-5)
