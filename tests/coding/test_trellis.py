import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opq_jax.coding import trellis
from tests.helpers.kernels import codes_along_the_trellis

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
def test_indices_as_described(indices):
  codes = np.array(spec_walk(indices), np.int8)
  found, subsets = trellis.indices_and_subsets(codes)
  assert found.tolist() == indices
  np.testing.assert_array_equal(trellis.join(found, subsets), codes)


def test_indices_of_other_codes():
  codes = RNG(0).integers(-3, 4, 100).astype(np.int8)
  assert trellis.indices_and_subsets(codes) is None
  assert trellis.indices_and_subsets(np.array([0, 2, -1, 0], np.int8)) is not None
  assert trellis.indices_and_subsets(np.ones(1, np.int8)) is None


def test_join_refuses_wide_codes():
  with pytest.raises(ValueError, match='found codes 0 to 128, expected -127 to 127'):
    trellis.join(np.array([0, 64], np.int8), np.zeros(2, np.uint8))


def test_indices_of_long_codes():
  # beyond the head that is walked without numba
  codes = codes_along_the_trellis((96, 64))
  indices, subsets = trellis.indices_and_subsets(codes)
  for part in (slice(0, 20), slice(0, 60)):
    head = trellis.indices_and_subsets(codes[part])
    np.testing.assert_array_equal(head, (indices[part], subsets[part]))
  codes[-1, -1] = 1 + codes[-1, -1] | 1 if subsets[-1, -1] == 0 else 2
  assert trellis.indices_and_subsets(codes) is None
