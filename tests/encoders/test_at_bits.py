"""Codes of one leaf in the bits asked, by every encoder."""

import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax.encoders import Feedback, Rounding, Trellis
from opq_jax.encoders.at_bits import code_at_bits
from opq_jax.network import InputMoments


@pytest.fixture(scope='module')
def leaf():
  """A kernel of outputs by inputs, larger than a pilot, and inputs that go together."""
  rng = np.random.default_rng(0)
  rows = (rng.normal(size=(512, 64)) @ rng.normal(size=(64, 256))).astype(np.float32)
  kernel = rng.laplace(size=(1200, 256)).astype(np.float32)
  return jnp.asarray(kernel), InputMoments(jnp.asarray((rows.T @ rows / 512)[None]), (1,))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('encoder', 'has_moments'), [(Rounding(), False), (Feedback({}), True), (Trellis(), True)]
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_code_at_bits_takes_the_bits(leaf, encoder, has_moments, dtype):
  kernel, moments = leaf
  found = code_at_bits(
    'w', kernel, jnp.dtype(dtype), 2.5, encoder, moments if has_moments else None, 0.05
  )
  assert abs(found.bits / 2.5 - 1) < 0.01
  assert found.values.dtype == dtype and found.values.shape == kernel.shape
  # an independent count, of the file that the codes make
  report = opq_jax.size_report(found.values, opq_jax.CompressionState(found.state))
  assert abs(32 / report.entropy_rate - found.bits) < 1e-3


def test_code_at_bits_begins_where_a_leaf_alike_ended(leaf):
  kernel, moments = leaf
  first = code_at_bits('w', kernel, jnp.float32, 3.0, Trellis(), moments, 0.05)
  again = code_at_bits('w', kernel, jnp.float32, 3.0, Trellis(), moments, 0.05, first.ratio)
  # the same grid, found at the first trial
  assert again.ratio == pytest.approx(first.ratio, rel=2e-3)
  assert abs(again.bits / 3.0 - 1) < 0.01


# feedback without a factor factors in XLA, whose last digits are others
@pytest.mark.parametrize(('encoder', 'share'), [(Feedback({}), 0.995), (Trellis(), 1.0)])
def test_code_at_bits_of_factored_moments(leaf, encoder, share):
  """Several leaves may share a factor: the codes are the same."""
  kernel, moments = leaf
  kernel = kernel[:64]
  factored = encoder.factored(moments, 0.05)
  one, other = (
    code_at_bits('w', kernel, jnp.float32, 3.0, encoder, each, 0.05) for each in (moments, factored)
  )
  assert np.mean(np.asarray(one.values) == np.asarray(other.values)) >= share


def test_code_at_bits_refuses_zeros():
  with pytest.raises(ValueError, match='a/w: found weights that are all zero'):
    code_at_bits('a/w', jnp.zeros((8, 8)), jnp.float32, 3.0, Rounding(), None, 0.05)
