import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opq_jax.coding import trellis, viterbi

RNG = np.random.default_rng


def spec_walk(indices):
  """Codes of indices, as the module's docstring says, with Python's integers."""
  state, codes = 0, []
  parity = lambda number: bin(number).count('1') % 2
  for k in indices:
    subset = parity(state & 9)
    size = 2 * abs(k) - (subset if k else 0)
    codes.append(size if k > 0 else -size)
    state = (state << 1) & 31 | (parity(state & 29) ^ (k % 2))
  return codes


@given(st.lists(st.integers(-63, 63), max_size=60))
def test_codes_are_those_of_the_trellis_that_is_described(indices):
  codes = np.array(spec_walk(indices), np.int8)
  found, subsets = trellis.indices_and_subsets(codes)
  assert found.tolist() == indices
  np.testing.assert_array_equal(trellis.join(found, subsets), codes)


def test_codes_that_were_not_chosen_along_it_do_not_follow_it():
  codes = RNG(0).integers(-3, 4, 100).astype(np.int8)
  assert trellis.indices_and_subsets(codes) is None
  assert trellis.indices_and_subsets(np.array([0, 2, -1, 0], np.int8)) is not None
  assert trellis.indices_and_subsets(np.ones(1, np.int8)) is None


def test_indices_of_no_int8_are_refused():
  with pytest.raises(ValueError, match='found codes 0 to 128, expected -127 to 127'):
    trellis.join(np.array([0, 64], np.int8), np.zeros(2, np.uint8))


@pytest.mark.parametrize('seed', range(6))
def test_no_other_way_costs_less(seed):
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


def test_weights_to_come_have_a_say():
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


def test_an_escaped_weight_has_code_0_whatever_the_ways_around_it():
  weights = RNG(2).laplace(size=3000).astype(np.float32)
  places = RNG(3).choice(3000, 200, replace=False)
  weights[places] = np.nan
  bits = np.broadcast_to(1.0 + np.abs(np.arange(-64, 65, dtype=np.float32)), (1, 2, 129)).copy()
  codes = np.empty(3000, np.int8)
  tables = np.full(3000, 0.05, np.float32), np.zeros(3000, np.uint8), np.zeros(3000, bool), bits
  viterbi.search(weights, *tables, np.ones(128, bool), 0.9, 0.75, 40, 0, codes)
  assert not codes[places].any() and np.count_nonzero(codes) > 500
  assert trellis.indices_and_subsets(codes) is not None
