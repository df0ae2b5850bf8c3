"""Statistics of a leaf, its counts and ranks, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.allocation import leaf_statistics, merge_statistics, statistics
from opq_jax.allocation.bins import BINS
from opq_jax.allocation.counts import fine_histogram, per_channel_count
from opq_jax.allocation.ranks import bins_at_rank, magnitudes_at_rank
from tests.helpers.allocations import sample

SHAPES = {
  'vector': ((1000,), 0),
  'last': ((40, 7, 36), -1),
  'first': ((36, 280), 0),
  'mid': ((9, 4, 280), 1),
  'heads': ((280, 6, 6), (1, 2)),
  'first and last': ((4, 280, 9), (0, 2)),
}


@pytest.fixture(params=['NumPy', 'XLA'])
def reader(request, monkeypatch):
  """Small leaves in the host's memory are read by NumPy, all others by a compiled program."""
  if request.param == 'XLA':
    monkeypatch.setattr(statistics, '_SMALL', 0)


by_both_readers = pytest.mark.usefixtures('reader')


def threshold_at_rank(weights, stats, rank):
  coarse, left = bins_at_rank(stats.histogram[None], rank[None])
  fine = fine_histogram(weights, stats.largest, coarse[0])[None]
  return magnitudes_at_rank(fine, stats.largest[None], coarse, left, rank[None])[0]


def by_channel(weights, axis):
  weights = np.asarray(weights, np.float64)
  if weights.ndim == 1:
    return weights[:, None]
  axes = np.atleast_1d(axis)
  channels = np.prod([weights.shape[axis] for axis in axes])
  return np.moveaxis(weights, axes, range(-len(axes), 0)).reshape(-1, channels)


@by_both_readers
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_statistics_by_channel(shape, axis, dtype):
  weights = sample(shape, dtype=dtype)
  stats = leaf_statistics(weights, axis, histogram=False)
  columns = np.abs(by_channel(weights, axis))
  np.testing.assert_allclose(stats.scale, columns.mean(0), rtol=1e-6)
  np.testing.assert_array_equal(stats.maximum, columns.max(0))
  assert stats.scale.dtype == stats.maximum.dtype == jnp.float32
  assert stats.per_channel == len(columns)
  assert stats.histogram is None


@by_both_readers
@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_histogram_counts_once(shape, axis):
  weights = sample(shape)
  counts = np.asarray(leaf_statistics(weights, axis).histogram)
  assert counts.shape == (2, BINS)
  assert counts.sum() == weights.size
  flat = np.asarray(weights, np.float64).ravel()
  np.testing.assert_array_equal(counts.sum(1), [(flat >= 0).sum(), (flat < 0).sum()])
  # the bins begin at the numbers whose lower 16 bits are zero, up to the end of an octave
  end = (np.float32(np.abs(flat).max()).view(np.uint32) >> 23) + 1 << 23
  edges = (end - (np.arange(BINS, -1, -1, dtype=np.int64) << 16)).astype(np.uint32).view(np.float32)
  edges = np.concatenate([[0], edges[1:].astype(np.float64)])
  for row, part in zip(counts, (flat[flat >= 0], -flat[flat < 0]), strict=True):
    np.testing.assert_array_equal(row, np.histogram(part, edges)[0])


def test_both_readers_take_denormal_numbers_for_zeros_and_doubles_for_floats(monkeypatch):
  weights = np.array([[1e-40, -1e-40, 0.0, -0.0], [1.0, -2.0, 1e-39, 3.0]])
  found = [leaf_statistics(weights)]
  monkeypatch.setattr(statistics, '_SMALL', 0)
  found += [leaf_statistics(weights)]
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert found[0].scale.tolist() == [0.5, 1.0, 0.0, 1.5]
  assert found[0].maximum.tolist() == [1.0, 2.0, 0.0, 3.0]
  assert found[0].histogram[:, 0].tolist() == [5, 0]
  assert found[0].dtype == found[1].dtype == jnp.float32


@by_both_readers
def test_histogram_of_zeros():
  counts = np.asarray(leaf_statistics(jnp.zeros((40, 7, 36)), -1).histogram)
  assert counts[0, 0] == counts.sum() == 40 * 7 * 36


@by_both_readers
@pytest.mark.parametrize('size', [1, 2, 4095, 4096, 4097, 10_080])
def test_histogram_of_any_size(size):
  assert leaf_statistics(jnp.ones((size, 1)), -1).histogram.sum() == size


@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
def test_rank_matches_sort(kind):
  weights = sample((40, 7, 36), kind)
  stats = leaf_statistics(weights, -1)
  magnitude = np.sort(np.abs(np.asarray(weights)).ravel())
  for rank in (0, 1, 17, 5000, 9000, len(magnitude) - 1, len(magnitude)):
    threshold = float(threshold_at_rank(weights, stats, jnp.int32(rank)))
    assert abs(int((magnitude <= np.float32(threshold)).sum()) - rank) <= 1
    if 0 < rank < len(magnitude):
      between = np.partition(magnitude, [rank - 1, rank])[rank - 1 : rank + 1]
      assert between[0] * (1 - 2**-19) <= threshold <= between[1] * (1 + 2**-19)


def test_rank_among_ties():
  # the largest magnitude always survives: no leaf dies of a tie
  weights = sample((40, 7, 36), 'few')
  stats = leaf_statistics(weights, -1)
  magnitude = np.abs(np.asarray(weights)).ravel()
  possible = np.array([(magnitude <= m).sum() for m in range(3)])
  for rank in (1, 1000, 3000, 6000, 9999):
    threshold = float(threshold_at_rank(weights, stats, jnp.int32(rank)))
    found = (magnitude <= threshold).sum()
    assert abs(found - rank) <= np.abs(possible - rank).min()


@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_per_channel_count(shape, axis):
  weights = sample(shape)
  found = per_channel_count(weights, jnp.float32(0.8), axis)
  np.testing.assert_array_equal(found, (np.abs(by_channel(weights, axis)) > np.float32(0.8)).sum(0))


@by_both_readers
@pytest.mark.slow
@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('channel_axis', [0, -1, (1, 2), (0, 2)], ids=str)
def test_merge_statistics(axis, channel_axis):
  weights = sample((12, 10, 36), 'student')
  largest = jnp.max(jnp.abs(weights))
  parts = jnp.split(weights, [4, 9], axis)
  whole = leaf_statistics(weights, channel_axis)
  exact = [leaf_statistics(part, channel_axis, largest=largest) for part in parts]
  alone = [leaf_statistics(part, channel_axis) for part in parts]
  for found in (merge_statistics(exact, axis), merge_statistics(alone, axis)):
    np.testing.assert_allclose(found.scale, whole.scale, rtol=1e-6)
    np.testing.assert_array_equal(found.maximum, whole.maximum)
    assert (found.shape, found.dtype, found.channel_axis) == (
      whole.shape,
      whole.dtype,
      whole.channel_axis,
    )
    np.testing.assert_array_equal(found.histogram, whole.histogram)
    if whole.leading is not None:
      np.testing.assert_array_equal(found.leading, whole.leading)


def test_merge_refuses_others():
  one = leaf_statistics(jnp.ones((4, 3)))
  for other in (
    leaf_statistics(jnp.ones((4, 5))),
    leaf_statistics(jnp.ones((4, 3), jnp.bfloat16)),
    leaf_statistics(jnp.ones((4, 3)), 0),
    leaf_statistics(jnp.ones((4, 3)), histogram=False),
  ):
    with pytest.raises(ValueError, match='expected pieces of one leaf'):
      merge_statistics([one, other], axis=0)
