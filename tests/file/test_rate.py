"""The whole file as small as asked."""

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax.file.rate import at_file_rate


def tree():
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.asarray(0.1 * rng.laplace(size=shape), np.float32)
  return {'a': {'kernel': draw(128, 256), 'bias': draw(256)}, 'b': {'kernel': draw(3, 3, 32, 64)}}


@pytest.mark.parametrize('rate', [10.0, 25.0])
def test_file_rate_is_met(tmp_path, rate):
  variables = tree()
  found = at_file_rate(variables, rate, objective='relative_error')
  assert rate <= found.file_rate <= 1.003 * rate
  opq_jax.save(tmp_path / 'net.opq', variables, found.state)
  assert (tmp_path / 'net.opq').stat().st_size == found.file_bytes
  original = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  assert found.file_rate == pytest.approx(original / found.file_bytes)
  # the codes must be smaller still: biases and headers take their share
  assert found.compression_rate > rate
  again = opq_jax.allocate(
    variables, compression_rate=found.compression_rate, objective='relative_error'
  )
  for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(found.allocation), strict=True):
    np.testing.assert_array_equal(one, other)


def test_file_rate_out_of_reach():
  variables = {'kernel': tree()['a']['kernel'][:32], 'bias': tree()['a']['kernel'][32:].reshape(-1)}
  with pytest.raises(
    ValueError, match=r'file_rate: found 20, a file of .* expected one of [\d,]+ at least'
  ):
    at_file_rate(variables, 20.0)
