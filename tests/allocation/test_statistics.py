"""What is read off the weights, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.allocation import leaf_statistics, merge_statistics
from opq_jax.allocation.bins import BINS
from opq_jax.allocation.counts import fine_histogram, per_channel_count
from opq_jax.allocation.description import histogram_moments
from opq_jax.allocation.histogram_sums import sums_of
from opq_jax.allocation.ranks import bins_at_rank, magnitudes_at_rank
from opq_jax.allocation.rate_problem import RateProblem, entropy_of, payload_of
from opq_jax.coding import escapes
from opq_jax.coding.payload import encode_codes

SHAPES = {
  'vector': ((1000,), 0),
  'last': ((40, 7, 36), -1),
  'first': ((36, 280), 0),
  'mid': ((9, 4, 280), 1),
}


def RANK(weights, stats, rank):
  coarse, left = bins_at_rank(stats.histogram[None], rank[None])
  fine = fine_histogram(weights, stats.largest, coarse[0])[None]
  return magnitudes_at_rank(fine, stats.largest[None], coarse, left, rank[None])[0]


COUNT = per_channel_count


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


def empirical_entropy(codes):
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
  # the bins begin at the numbers whose lower 16 bits are zero, up to the end of an octave
  end = (np.float32(np.abs(flat).max()).view(np.uint32) >> 23) + 1 << 23
  edges = (end - (np.arange(BINS, -1, -1, dtype=np.int64) << 16)).astype(np.uint32).view(np.float32)
  edges = np.concatenate([[0], edges[1:].astype(np.float64)])
  for row, part in zip(counts, (flat[flat >= 0], -flat[flat < 0]), strict=True):
    np.testing.assert_array_equal(row, np.histogram(part, edges)[0])


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
      assert between[0] * (1 - 2**-19) <= threshold <= between[1] * (1 + 2**-19)


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


def summed(stats):
  """The sums of one leaf's histogram, in a unit of 1."""
  unknown = jnp.full((1, BINS), jnp.nan)
  is_coarse = jnp.asarray([jnp.finfo(stats.dtype).nmant <= 7])
  return sums_of(stats.histogram[None], stats.largest[None], unknown, is_coarse)


# none with an edge that is a number of few bits
GRIDS = [(0.013, 0.11, 127), (0.21, 0.51, 127), (0.71, 1.31, 4), (2.53, 3.51, 2), (0.11, 0.021, 60)]


def codes_on(weights, threshold, step, levels):
  """Codes of a grid, -128 beyond its last level, on the host."""
  flat = np.asarray(weights, np.float64).ravel()
  cell = 1 + np.floor((np.abs(flat) - threshold) / step)
  codes = np.where(np.abs(flat) > threshold, np.sign(flat) * np.minimum(cell, 127), 0)
  return np.where((np.abs(flat) > threshold) & (cell > levels), -128, codes).astype(np.int8)


@pytest.mark.parametrize('shape', [(3, 3, 16, 16), (40, 7, 36), (300, 500)], ids=str)
def test_payload_is_that_of_the_coder(shape):
  weights = sample(shape)
  sums = summed(leaf_statistics(weights, -1))
  one = lambda x: jnp.float32([x])

  @jax.jit
  def payloads(threshold, step, levels):
    sizes = one(weights.size), one(1), one(23), one(0)
    leaves = RateProblem(sums, *sizes, True, one(jnp.inf), one(0))
    return payload_of(leaves, threshold, step, levels)

  for threshold, step, levels in GRIDS:
    codes = codes_on(weights, threshold, step, levels)
    expected = 8 * len(encode_codes(np.where(codes == -128, 0, codes).astype(np.int8)))
    places = np.flatnonzero(codes == -128)
    if places.size:
      expected += 8 * len(escapes.encode(places, np.asarray(weights).ravel()[places]))
    found = float(payloads(one(threshold), one(step), one(levels))[0])
    assert found == pytest.approx(expected / codes.size, rel=0.015)


@pytest.mark.parametrize('kind', ['laplace', 'normal', 'student'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_entropy_and_moments_are_those_of_the_codes(kind, dtype):
  weights = sample((40, 7, 36), kind).astype(dtype)
  stats = leaf_statistics(weights, -1)
  sums = summed(stats)
  one = lambda x: jnp.float32([x])
  moments = jax.jit(histogram_moments)
  for threshold, step, levels in GRIDS:
    codes = codes_on(weights, threshold, step, levels)
    found, escaped = entropy_of(sums, one(threshold), one(step), one(levels), one(0))
    slack = 5e-3 if dtype == jnp.float32 else 0.03  # many weights lie on an edge
    assert float(found[0]) == pytest.approx(empirical_entropy(codes), abs=slack)
    assert float(escaped[0]) == pytest.approx((codes == -128).mean(), abs=slack)
    on_grid = (codes != 0) & (codes != -128)
    flat = np.abs(np.asarray(weights, np.float64).ravel())
    cell = np.abs(codes.astype(int)) - 1
    rest = (flat - threshold - step * cell)[on_grid]
    centre, mantissa = sums.centres()[0][0], jnp.finfo(dtype).nmant
    energy, offset, _, sparsity = moments(
      stats.histogram, centre, *map(jnp.float32, (threshold, step, levels, mantissa))
    )
    assert float(energy) == pytest.approx(np.mean(flat**2), rel=1e-3)
    assert float(offset) == pytest.approx(rest.mean(), rel=2e-2, abs=2 * slack * step)
    assert float(sparsity) == pytest.approx((codes == 0).mean(), abs=slack)


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
    np.testing.assert_array_equal(found.histogram, whole.histogram)
    if whole.leading is not None:
      np.testing.assert_array_equal(found.leading, whole.leading)


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
