"""What is read off the weights, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax import histograms, statistics
from opq_jax.entropy_coding import encode_codes
from opq_jax.histograms import BINS
from opq_jax.statistics import leaf_statistics, merge_statistics

SHAPES = {
  'vector': ((1000,), 0),
  'last': ((40, 7, 36), -1),
  'first': ((36, 280), 0),
  'mid': ((9, 4, 280), 1),
}


def RANK(weights, stats, rank):
  coarse, left = histograms.bins_at_rank(stats.histogram[None], rank[None])
  fine = statistics.fine_histogram(weights, stats.largest, coarse[0])[None]
  return histograms.magnitudes_at_rank(fine, stats.largest[None], coarse, left, rank[None])[0]


COUNT = statistics.per_channel_count


def sample(shape, kind='laplace', dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  draw = {
    'laplace': lambda: rng.laplace(size=shape),
    'normal': lambda: rng.normal(size=shape),
    'student': lambda: rng.standard_t(3, size=shape),
    'few': lambda: rng.integers(-3, 4, size=shape),
  }
  return jnp.asarray(draw[kind](), dtype)


def by_channel(weights, axis):
  weights = np.asarray(weights, np.float64)
  if weights.ndim == 1:
    return weights[:, None]
  return np.moveaxis(weights, axis, -1).reshape(-1, weights.shape[axis])


def entropy_of(codes):
  _, counts = np.unique(codes, return_counts=True)
  share = counts / counts.sum()
  return -np.sum(share * np.log2(share))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_scale_and_maximum_are_per_channel(shape, axis, dtype):
  weights = sample(shape, dtype=dtype)
  stats = leaf_statistics(weights, axis, histogram=False)
  columns = np.abs(by_channel(weights, axis))
  np.testing.assert_allclose(stats.scale, columns.mean(0), rtol=1e-6)
  np.testing.assert_array_equal(stats.maximum, columns.max(0))
  assert stats.scale.dtype == stats.maximum.dtype == jnp.float32
  assert stats.per_channel == len(columns)
  assert stats.histogram is None


@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_histogram_counts_every_weight_once(shape, axis):
  weights = sample(shape)
  counts = np.asarray(leaf_statistics(weights, axis).histogram)
  assert counts.shape == (2, BINS)
  assert counts.sum() == weights.size
  flat = np.asarray(weights, np.float64).ravel()
  np.testing.assert_array_equal(counts.sum(1), [(flat >= 0).sum(), (flat < 0).sum()])
  # an edge may fall one rounding from where numpy puts it
  edges = np.linspace(0, np.abs(flat).max(), BINS + 1)
  for row, part in zip(counts, (flat[flat >= 0], -flat[flat < 0]), strict=True):
    expected, _ = np.histogram(part, edges)
    assert np.abs(np.cumsum(row) - np.cumsum(expected)).max() <= 1


def test_histogram_of_zeros_is_all_in_one_bin():
  counts = np.asarray(leaf_statistics(jnp.zeros((40, 7, 36)), -1).histogram)
  assert counts[0, 0] == counts.sum() == 40 * 7 * 36


@pytest.mark.parametrize('size', [1, 2, 4095, 4096, 4097, 10_080])
def test_histogram_of_any_size(size):
  assert leaf_statistics(jnp.ones((size, 1)), -1).histogram.sum() == size


@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
def test_rank_is_that_of_a_sort(kind):
  weights = sample((40, 7, 36), kind)
  stats = leaf_statistics(weights, -1)
  magnitude = np.sort(np.abs(np.asarray(weights)).ravel())
  for rank in (0, 1, 17, 5000, 9000, len(magnitude) - 1, len(magnitude)):
    threshold = float(RANK(weights, stats, jnp.int32(rank)))
    assert abs(int((magnitude <= np.float32(threshold)).sum()) - rank) <= 1
    if 0 < rank < len(magnitude):
      between = np.partition(magnitude, [rank - 1, rank])[rank - 1 : rank + 1]
      width = magnitude[-1] / BINS**2
      assert between[0] - 2 * width <= threshold <= between[1] + 2 * width


def test_rank_among_ties_is_the_nearest_that_can_be():
  # the largest magnitude always survives: no leaf dies of a tie
  weights = sample((40, 7, 36), 'few')
  stats = leaf_statistics(weights, -1)
  magnitude = np.abs(np.asarray(weights)).ravel()
  possible = np.array([(magnitude <= m).sum() for m in range(3)])
  for rank in (1, 1000, 3000, 6000, 9999):
    threshold = float(RANK(weights, stats, jnp.int32(rank)))
    found = (magnitude <= threshold).sum()
    assert abs(found - rank) <= np.abs(possible - rank).min()


@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_survivors_per_channel(shape, axis):
  weights = sample(shape)
  found = COUNT(weights, jnp.float32(0.8), axis)
  np.testing.assert_array_equal(found, (np.abs(by_channel(weights, axis)) > np.float32(0.8)).sum(0))


@pytest.mark.parametrize('shape', [(3, 3, 16, 16), (40, 7, 36), (300, 500)], ids=str)
def test_payload_is_that_of_the_coder(shape):
  weights = sample(shape)
  stats = leaf_statistics(weights, -1)
  flat = np.asarray(weights, np.float64).ravel()
  payloads = jax.jit(
    lambda histogram, *args: histograms.payload_of_shares(
      *histograms.code_shares(histograms.counts_beyond(histogram), *args),
      jnp.float32([weights.size]),
    )
  )
  for threshold, step in [(0.0, 0.1), (0.2, 0.5), (0.7, 1.3), (2.5, 3.5)]:
    largest = jnp.max(stats.maximum)
    found = payloads(stats.histogram[None], *[jnp.float32([x]) for x in (largest, threshold, step)])
    cell = 1 + np.floor((np.abs(flat) - threshold) / step)
    codes = np.where(np.abs(flat) > threshold, np.sign(flat) * np.minimum(cell, 127), 0)
    expected = 8 * len(encode_codes(codes.astype(np.int8))) / flat.size
    assert float(found[0]) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
def test_entropy_and_moments_are_those_of_the_codes(kind):
  weights = sample((40, 7, 36), kind)
  stats = leaf_statistics(weights, -1)
  flat = np.asarray(weights, np.float64).ravel()
  largest = np.abs(flat).max()
  entropies = jax.jit(
    lambda histogram, *args: histograms.entropy_of_shares(
      *histograms.code_shares(histograms.counts_beyond(histogram), *args)
    )
  )
  moments = jax.jit(histograms.histogram_moments)
  for threshold, step in [(0.0, 0.5), (0.7, 0.3), (1.5, 2.5), (0.2, 30.0), (largest / 8, 1.5)]:
    levels = max(1, int(np.ceil((largest - threshold) / step)))
    as_rows = [jnp.float32([x]) for x in (largest, threshold, step)]
    found = entropies(stats.histogram[None], *as_rows)[0]
    magnitude = np.abs(flat)
    survives = magnitude > threshold
    cell = np.minimum(np.floor((magnitude - threshold) / step), levels - 1)
    codes = np.where(survives, np.sign(flat) * (1 + cell), 0)
    assert float(found) == pytest.approx(entropy_of(codes), abs=2e-3)
    energy, offset, error, sparsity = moments(
      stats.histogram, *map(jnp.float32, (largest, threshold, step, levels))
    )
    rest = (magnitude - threshold - step * cell)[survives]
    value = np.where(survives, threshold + step * cell + rest.mean(), 0)
    assert float(energy) == pytest.approx(np.mean(flat**2), rel=1e-3)
    assert float(offset) == pytest.approx(rest.mean(), rel=1e-2, abs=1e-3 * step)
    assert float(error) == pytest.approx(np.mean((magnitude - value) ** 2), rel=1e-2)
    assert float(sparsity) == pytest.approx(1 - survives.mean(), abs=2e-3)


def test_least_step_clips_a_lone_outlier_and_nothing_else():
  least = jax.jit(histograms.histogram_min_step, static_argnums=2)
  weights = sample((40, 7, 36))
  largest = jnp.max(jnp.abs(weights))
  step = least(leaf_statistics(weights, -1).histogram, largest, 127)
  assert float(step) <= float(largest) / 127 * 1.001
  weights = weights.at[0, 0, 0].set(1e3)
  step = least(leaf_statistics(weights, -1).histogram, jnp.float32(1e3), 127)
  assert float(step) <= 1e3 / 127
  uniform = jnp.linspace(-1, 1, 10_080).reshape(40, 7, 36)
  step = least(leaf_statistics(uniform, -1).histogram, jnp.float32(1), 127)
  assert float(step) == pytest.approx(1 / 127, rel=5e-3)


def test_least_step_is_the_best_of_all():
  # the trade it claims: rounding of everything against clipping beyond 127 steps
  weights = np.array(sample((40, 7, 36)))
  weights[0, 0, :12] = 1e3
  histogram = leaf_statistics(jnp.asarray(weights), -1).histogram
  found = float(
    jax.jit(histograms.histogram_min_step, static_argnums=2)(histogram, jnp.float32(1e3), 127)
  )
  steps = np.linspace(1e-3, 1, 500) * 1e3 / 127
  beyond = np.maximum(np.abs(weights).ravel() - 127 * steps[:, None], 0)
  cost = np.sum(beyond**2, 1) + weights.size * steps**2 / 12
  assert found == pytest.approx(steps[np.argmin(cost)], rel=0.01)


@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('channel_axis', [0, -1])
def test_parts_merge_to_the_whole(axis, channel_axis):
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
    np.testing.assert_array_equal(found.histogram.sum(1), whole.histogram.sum(1))
    # no weight is more than a bin away
    ahead = np.cumsum(found.histogram, 1)
    exactly = np.cumsum(whole.histogram, 1)
    assert (ahead[:, 1:] >= exactly[:, :-1]).all() and (ahead[:, :-1] <= exactly[:, 1:]).all()
  np.testing.assert_array_equal(merge_statistics(exact, axis).histogram, whole.histogram)


def test_parts_of_different_leaves_are_refused():
  one = leaf_statistics(jnp.ones((4, 3)))
  for other in (
    leaf_statistics(jnp.ones((4, 5))),
    leaf_statistics(jnp.ones((4, 3), jnp.bfloat16)),
    leaf_statistics(jnp.ones((4, 3)), 0),
    leaf_statistics(jnp.ones((4, 3)), histogram=False),
  ):
    with pytest.raises(ValueError, match='expected pieces of one leaf'):
      merge_statistics([one, other], axis=0)
