"""Rotations of inputs by signs and Hadamard matrices."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from opq_jax.coding import rotations
from tests.helpers.rotated_files import dense_rotation


@pytest.mark.parametrize('inputs', [1, 2, 3, 7, 8, 12, 63, 64, 65, 576])
def test_rotations_equal_dense_matrix(inputs):
  matrix = dense_rotation(inputs)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(inputs), atol=1e-12)
  rows = np.random.default_rng(inputs).normal(size=(inputs, 5)).astype(np.float32)
  for found, expected in (
    (rotations.rotated(rows, 0), matrix.T @ rows),
    (rotations.restored(rows, 0), matrix @ rows),
    (rotations.rotated(rows.T, 1), rows.T @ matrix),
  ):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


@hypothesis.given(
  shape=st.lists(st.integers(1, 20), min_size=1, max_size=4), axis=st.integers(0, 3)
)
def test_restored_undoes_rotated(shape, axis):
  axis %= len(shape)
  weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  turned = rotations.rotated(weights, axis)
  np.testing.assert_allclose(rotations.restored(turned, axis), weights, atol=2e-6)
  np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(weights), rtol=1e-6)
  # other axes are independent problems
  np.testing.assert_array_equal(
    np.take(turned, [0], axis - 1) if len(shape) > 1 else turned,
    rotations.rotated(np.take(weights, [0], axis - 1), axis) if len(shape) > 1 else turned,
  )


def test_pieces_do_not_change_values(monkeypatch):
  rows = np.random.default_rng(1).normal(size=(96, 50)).astype(np.float32)
  whole = rotations.restored(rows, 0)
  monkeypatch.setattr(rotations, '_PIECE', 96 * 7)
  np.testing.assert_array_equal(rotations.restored(rows, 0), whole)


def test_a_rotation_spreads_energy():
  """One input that holds nearly all energy shares it with all others, up to two passes of signs."""
  weights = np.full((576, 200), 1e-3, np.float32)
  weights[100] = np.random.default_rng(2).normal(size=200)
  energy = (rotations.rotated(weights, 0) ** 2).sum(1)
  assert energy.max() < 12 * energy.mean()
  assert (weights**2).sum(1).max() > 500 * (weights**2).sum(1).mean()
  whole = np.zeros((512, 3), np.float32)
  whole[77] = 1
  np.testing.assert_allclose(rotations.rotated(whole, 0) ** 2, 1 / 512, rtol=1e-5)


def test_signs_are_balanced():
  signs = rotations.signs(1 << 14)
  assert abs(signs.mean()) < 0.03
  assert abs((signs[1:] * signs[:-1]).mean()) < 0.03
  np.testing.assert_array_equal(rotations.signs(10, 5), rotations.signs(15)[5:])
