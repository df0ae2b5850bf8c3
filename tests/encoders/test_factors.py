"""Factors of moments on the host."""

import numpy as np
import pytest

from opq_jax.encoders.factors import IndefiniteMomentsError, factor_of


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize(('groups', 'width'), [(1, 1), (1, 5), (1, 800), (7, 9)])
def test_factor_of_inverts_damped_moments(version, groups, width):
  x = np.random.default_rng(0).normal(size=(groups, 2 * width, width)) + 1
  moments = (x.transpose(0, 2, 1) @ x).astype(np.float32)
  found = factor_of(moments, 0.1, version)
  energy = np.mean(np.diagonal(moments, axis1=1, axis2=2), axis=1)
  for factor, matrix, mean in zip(found.astype(np.float64), moments, energy, strict=True):
    np.testing.assert_array_equal(factor, np.triu(factor))
    damped = matrix / mean + 0.1 * np.eye(width)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(width), atol=1e-4)
  assert found.flags.c_contiguous and found.dtype == np.float32


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('place', [0, 2])
def test_factor_of_refuses_indefinite_moments(version, place):
  moments = np.eye(3, dtype=np.float32)[None].copy()
  moments[0, place, place] = -0.5
  with pytest.raises(IndefiniteMomentsError, match=r'not positive definite with damping 0\.1'):
    factor_of(moments, 0.1, version)
