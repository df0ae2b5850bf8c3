import numpy as np
import pytest

from opq_jax.coding import ans, frequencies, sequential_ans, trellis

RNG = np.random.default_rng


def message(seed, n, start):
  """Indices along a trellis of two ranges, their models, and the words they make."""
  rng = RNG(seed)
  indices = np.clip(np.rint(rng.laplace(size=n)), -64, 64).astype(np.int8)
  ranges = rng.integers(0, 2, n).astype(np.uint8)
  indices[ranges == 1] *= 2
  state, subsets = 0, np.empty(n, np.uint8)
  for i, k in enumerate(indices):
    subsets[i] = trellis.SUBSET_OF[state]
    state = trellis.NEXT[state, k & 1]
  models = 2 * ranges + subsets
  fitted = [frequencies.fit(frequencies.histogram(indices[models == m])) for m in range(4)]
  words = sequential_ans.encode(start, indices, models, sequential_ans.tables(fitted))
  return indices, ranges, subsets, models, fitted, words


@pytest.mark.parametrize('n', [1, 2, 7, 20_000])
def test_decode_of_encode(n):
  start = np.array([0x9ABCDEF0], np.uint32)
  indices, ranges, subsets, _, fitted, words = message(0, n, start)
  assert words[-1] != 0
  found, theirs = np.empty(n, np.int8), np.empty(n, np.uint8)
  left, _ = sequential_ans.decode(words, ranges, 0, sequential_ans.tables(fitted), found, theirs)
  np.testing.assert_array_equal(found, indices)
  np.testing.assert_array_equal(theirs, subsets)
  np.testing.assert_array_equal(left, start)


def test_encode_takes_ideal_bits():
  start = np.array([1 << 31], np.uint32)
  indices, _, _, models, fitted, words = message(1, 20_000, start)
  ideal = 0.0
  for m, model in enumerate(fitted):
    of_symbol = dict(zip(model.symbols.tolist(), model.frequencies.tolist(), strict=True))
    ideal += sum(model.precision - np.log2(of_symbol[k]) for k in indices[models == m].tolist())
  assert ideal < 32 * len(words) < 1.0005 * ideal + 96


def test_encode_continues_a_coder():
  codes = np.rint(RNG(2).laplace(size=500)).astype(np.int8)
  model = frequencies.fit(frequencies.histogram(codes))
  coder = ans.begin(codes)
  model.encode(coder, codes)
  before = ans.words(coder)
  indices, ranges, _, models, fitted, _ = message(3, 300, before)
  known = sequential_ans.tables(fitted)
  coder = ans.from_words(sequential_ans.encode(before, indices, models, known))
  model.encode(coder, codes)

  found = np.empty(500, np.int8)
  model.decode(coder, found)
  np.testing.assert_array_equal(found, codes)
  theirs = np.empty((2, 300), np.int8)
  left, _ = sequential_ans.decode(
    ans.words(coder), ranges, 0, known, theirs[0], theirs[1].view(np.uint8)
  )
  np.testing.assert_array_equal(theirs[0], indices)
  coder = ans.from_words(left)
  model.decode(coder, found)
  ans.check_end(coder, codes)
