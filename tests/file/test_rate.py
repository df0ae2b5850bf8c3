"""The whole file as small as asked."""

import threading
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.file import rate as rate_of_file
from opq_jax.file.rate import at_file_rate
from opq_jax.weights import compress_stored, open_weights


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


@pytest.mark.parametrize('rate', [0.0, -1.0, np.nan, np.inf])
def test_file_rate_that_is_none(rate):
  with pytest.raises(ValueError, match=r'file_rate: found .*, expected a positive number'):
    at_file_rate(tree(), rate)
  with pytest.raises(ValueError, match='found file_rate together with another target'):
    at_file_rate(tree(), 9.0, bits_per_weight=2.0)


def test_warnings_of_the_rate_that_is_met(tmp_path):
  """Those of its own allocation, and not of the others that were tried; on disk as in memory."""
  rng = np.random.default_rng(0)
  # of 17 values: from some rate on codes are exact, and with more bits the file stays as it is
  weights = np.clip(np.round(2 * rng.laplace(size=(256, 256))), -8, 8).astype(np.float32)
  params = {'count': rng.integers(0, 1 << 30, size=40_000, dtype=np.int32), 'w': weights}
  path = tmp_path / 'net.safetensors'
  safetensors.numpy.save_file(params, path)
  searches = (
    lambda: at_file_rate(params, 2.0),
    lambda: compress_stored(open_weights(path), tmp_path / 'net.opq', file_rate=2.0),
  )
  both = []
  for search in searches:
    with pytest.warns(UserWarning) as found:
      search()
    both.append([str(one.message) for one in found])
  for texts in both:
    assert sum('there is nothing between' in text for text in texts) == 1
    assert sum('bits per weight' in text for text in texts) == 1
  assert both[0] == both[1]


def test_file_rates_of_threads_leave_warnings_on(monkeypatch):
  """Searches that overlap keep no warning of the process: one begins first and ends first."""
  variables, both = tree(), threading.Barrier(2, timeout=60)
  has_first_begun, is_first_done = threading.Event(), threading.Event()
  waits = {'first': has_first_begun.set, 'second': lambda: None}
  allocate = rate_of_file.allocate

  def met(*args, **options):
    name = threading.current_thread().name
    if name in waits:
      waits.pop(name)()
      both.wait()
      if name == 'second':
        is_first_done.wait(60)
    return allocate(*args, **options)

  def search():
    if threading.current_thread().name == 'second':
      has_first_begun.wait(60)
    at_file_rate(variables, 10.0)
    is_first_done.set()

  monkeypatch.setattr(rate_of_file, 'allocate', met)
  shown = warnings._showwarnmsg_impl
  threads = [threading.Thread(target=search, name=name) for name in ('first', 'second')]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert is_first_done.is_set() and warnings._showwarnmsg_impl is shown
