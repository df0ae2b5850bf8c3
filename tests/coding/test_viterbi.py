import itertools

import numpy as np
import pytest

from opq_jax.coding import trellis, viterbi

RNG = np.random.default_rng


@pytest.mark.parametrize('seed', range(12))
def test_search_finds_cheapest_path(seed):
  # against all ways of six weights, with prices that differ by weight, subset and sign
  rng = RNG(seed)
  n, levels, first, step = 6, 5, 0.6, 0.4
  weights = rng.laplace(size=n).astype(np.float32)
  slopes = rng.uniform(0.05, 0.5, n).astype(np.float32)
  models = rng.integers(0, 3, n).astype(np.uint8)
  is_turned = rng.random(n) < 0.5
  bits = rng.uniform(0, 4, (3, 2, 2 * trellis.MAX_INDEX + 1)).astype(np.float32)
  codes = np.empty(n, np.int8)
  usable = np.ones(128, bool)
  usable[4] = seed % 2 == 0
  if seed >= 6:  # any magnitudes, of a narrow dtype
    usable = rng.random(128) < 0.6
  tables = slopes, models, is_turned, bits, usable
  end = viterbi.search(weights, *tables, first, step, levels, 0, codes)

  def cost(chosen):
    found = trellis.indices_and_subsets(np.array(chosen, np.int8))
    if found is None:
      return np.inf
    total = 0.0
    for i, (code, k, q) in enumerate(zip(chosen, *found, strict=True)):
      value = np.sign(code) * (first + step * (abs(code) - 1)) if code else 0.0
      index = -int(k) if is_turned[i] else int(k)
      total += (weights[i] - value) ** 2 + slopes[i] * bits[models[i], q, index + 64]
    return total

  # a weight never gets a code of the other sign, and of a kind only the nearest ones are looked at
  options = []
  for w in weights:
    sign = -1 if w < 0 else 1
    near = []
    for least in (1, 2, 3, 4):
      kind = [c for c in range(least, levels + 1, 4) if usable[c]]
      below = [c for c in kind if first + step * (c - 1) <= abs(w)]
      at = len(below) - 1 if below else 0
      near += kind[at : at + 2]
    options.append([0, *(sign * c for c in near)])
  best = min(itertools.product(*options), key=cost)
  assert cost(codes.tolist()) == pytest.approx(cost(best), rel=1e-5)
  state = 0
  for k in trellis.indices_and_subsets(codes)[0]:
    state = trellis.NEXT[state, k & 1]
  assert end == state


def test_search_with_look_ahead():
  rng = RNG(1)
  weights = rng.laplace(size=4000).astype(np.float32)
  bits = 1.0 + np.abs(np.arange(-64, 65, dtype=np.float32))
  bits = np.broadcast_to(bits, (1, 2, 129)).copy()
  whole = np.empty(4000, np.int8)
  usable = np.ones(128, bool)
  prices = lambda n: (
    *(np.full(n, 0.2, np.float32), np.zeros(n, np.uint8), np.zeros(n, bool), bits),
    usable,
  )
  viterbi.search(weights, *prices(4000), 0.9, 0.75, 40, 0, whole)
  pieces, state = np.empty(4000, np.int8), 0
  for start in range(0, 4000, 100):
    part = weights[start : start + 300]
    state = viterbi.search(
      part, *prices(part.size), 0.9, 0.75, 40, state, pieces[start : start + 100]
    )
  np.testing.assert_array_equal(pieces, whole)


def test_search_with_escaped_weights():
  weights = RNG(2).laplace(size=3000).astype(np.float32)
  places = RNG(3).choice(3000, 200, replace=False)
  weights[places] = np.nan
  bits = np.broadcast_to(1.0 + np.abs(np.arange(-64, 65, dtype=np.float32)), (1, 2, 129)).copy()
  codes = np.empty(3000, np.int8)
  tables = np.full(3000, 0.05, np.float32), np.zeros(3000, np.uint8), np.zeros(3000, bool), bits
  viterbi.search(weights, *tables, np.ones(128, bool), 0.9, 0.75, 40, 0, codes)
  assert not codes[places].any() and np.count_nonzero(codes) > 500
  assert trellis.indices_and_subsets(codes) is not None
