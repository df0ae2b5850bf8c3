"""Compiled loops over the trellis: the cheapest path (Viterbi's algorithm), and the walk of codes.

`opq_jax.coding.trellis` describes states, subsets and indices.  This module loads numba.

From each state two branches lead on, one for each parity of the index.  Together with the subset
that the state selects there are four kinds of branches, kind = 2 subset + parity, and the codes of
a kind are those of every fourth magnitude:

    kind 0:  0, 4, 8, ...   kind 1:  2, 6, 10, ...   kind 2:  0, 3, 7, ...   kind 3:  1, 5, 9, ...

So each weight has one best code of every kind, and the 64 branches between 32 states share these
four costs.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64, UInt8

from opq_jax.coding.trellis import MAX_INDEX, NEXT, STATES, SUBSET_OF
from opq_jax.core import native

# the two states that lead to each state, and the kind of the branch from there
_BEFORE = np.array(
  [[s for s in range(STATES) if target in NEXT[s]] for target in range(STATES)], np.uint8
)
_KIND = np.array(
  [
    [2 * SUBSET_OF[s] + NEXT[s].tolist().index(target) for s in _BEFORE[target]]
    for target in range(STATES)
  ],
  np.uint8,
)
# states j and j + 16 both lead to 2 j and 2 j + 1, by branches of two kinds that differ in parity:
# one kind for j -> 2 j and j + 16 -> 2 j + 1, the other for j -> 2 j + 1 and j + 16 -> 2 j
_HALF = STATES // 2
_KIND_OF_HALF = _KIND[::2, 0].astype(np.int64)
# least magnitude but 0 of each kind; the next ones are 4 apart
_LEAST = np.array([4, 2, 3, 1], np.int64)
# weights after which path costs are taken relative to the least: float32 has 24 bits for a sum
_REBASE = 64


@native.compiled
def split(
  codes: Int8[np.ndarray, ' n'], indices: Int8[np.ndarray, ' n'], subsets: UInt8[np.ndarray, ' n']
) -> bool:
  """Writes index and subset of every code; stops and returns False where a code is off the path.

  >>> indices, subsets = np.zeros(4, np.int8), np.zeros(4, np.uint8)
  >>> split(np.array([2, -1, 0, -4], np.int8), indices, subsets), indices.tolist(), subsets.tolist()
  (True, [1, -1, 0, -2], [0, 1, 0, 0])
  >>> split(np.array([1, 0, 0, 0], np.int8), indices, subsets)
  False
  """
  state = 0
  for i in range(codes.size):
    magnitude, subset = abs(int(codes[i])), SUBSET_OF[state]
    if magnitude and (magnitude & 1) != subset:
      return False
    index = (magnitude + 1) >> 1
    indices[i] = index if codes[i] > 0 else -index
    subsets[i] = subset
    state = NEXT[state, index & 1]
  return True


@native.compiled
def search(
  weights: Float32[np.ndarray, ' n'],
  slopes: Float32[np.ndarray, ' n'],
  models: UInt8[np.ndarray, ' n'],
  is_turned: Bool[np.ndarray, ' n'],
  bits: Float32[np.ndarray, 'models 2 129'],
  usable: Bool[np.ndarray, '128'],
  first: float,
  step: float,
  levels: int,
  state: int,
  codes: Int8[np.ndarray, ' count'],
) -> int:
  """Chooses the codes of least sum (w - value)^2 + slope bits over all paths through the trellis.

  Args:
    weights: in the order of the codes; NaN for one that is escaped, whose code is 0.
    slopes: squared error that one bit is worth, at each weight.
    models: the row of `bits` that prices each weight.
    is_turned: where `bits` is of -index.
    bits: the price of index k at k + 64, by model and subset.
    usable: the magnitudes that may be chosen.
    first, step, levels: of the `opq_jax.coding.trellis.Grid`.
    state: before the first weight.
    codes: room for the codes of the first weights.  Where it is shorter than `weights`, the others
      are the look-ahead: they decide between paths, and get no code.

  Returns:
    The state after the last code.
  """
  cost, new = np.full(STATES, np.inf, np.float32), np.empty(STATES, np.float32)
  cost[state] = 0
  # 36 bytes a weight to find the way back: the best code of every kind, and which of two paths won
  branch = np.empty(4, np.float32)
  chosen = np.empty((weights.size, 4), np.int8)
  is_second = np.empty((weights.size, STATES), np.bool_)
  # float32 throughout: a Python float would make numba compute in float64
  origin, width = np.float32(first - step), np.float32(step)
  per_width, infinity = np.float32(1 / step), np.float32(np.inf)
  values, sides = _values(origin, width, levels), _sides(levels, usable)
  for i in range(weights.size):
    size, slope, table = abs(weights[i]), slopes[i], bits[models[i]]
    turn = -1 if (weights[i] < 0) != is_turned[i] else 1
    if np.isnan(weights[i]):
      for kind in range(4):
        branch[kind] = infinity if kind & 1 else slope * table[kind >> 1, MAX_INDEX]
        chosen[i, kind] = 0
    else:
      # the last magnitude whose value is at most |w|.  NaN, of no grid that is fitted, is 0 too
      exact = (size - origin) * per_width
      place = int(min(exact, np.float32(levels))) if exact > 0 else 0
      # the best code of each kind: 0, or one of the two magnitudes around |w|
      for kind in range(4):
        best = infinity
        if kind & 1 == 0:
          best = size * size + slope * table[kind >> 1, MAX_INDEX]
        low, high = sides[place, kind]
        error, other = size - values[low], size - values[high]
        of_low = error * error + slope * table[kind >> 1, MAX_INDEX + turn * ((low + 1) >> 1)]
        of_high = other * other + slope * table[kind >> 1, MAX_INDEX + turn * ((high + 1) >> 1)]
        code, least = high if of_high < of_low else low, min(of_high, of_low)
        chosen[i, kind] = code if least < best else 0
        branch[kind] = min(least, best)
    # of the two paths that meet in each state the cheaper one goes on
    for j in range(_HALF):
      even, odd = branch[_KIND_OF_HALF[j]], branch[_KIND_OF_HALF[j] ^ 1]
      one, two = cost[j] + even, cost[j + _HALF] + odd
      is_second[i, 2 * j], new[2 * j] = two < one, min(one, two)
      one, two = cost[j] + odd, cost[j + _HALF] + even
      is_second[i, 2 * j + 1], new[2 * j + 1] = two < one, min(one, two)
    # only differences between paths matter: a common constant may go
    if i % _REBASE == 0:
      new -= np.min(new)
    cost, new = new, cost
  # back along the cheapest path
  here = int(np.argmin(cost))
  end = here
  for i in range(weights.size - 1, -1, -1):
    # the state after the last code that is kept; steps beyond it belong to the look-ahead
    if i == codes.size - 1:
      end = here
    way = int(is_second[i, here])
    if i < codes.size:
      code = chosen[i, _KIND[here, way]]
      codes[i] = -code if weights[i] < 0 else code
    here = _BEFORE[here, way]
  return end


@native.compiled
def _values(origin: np.float32, width: np.float32, levels: int) -> Float32[np.ndarray, ' levels+1']:
  """Returns the value of every magnitude; infinity for 0, which stands for none in `_sides`."""
  values = np.empty(levels + 1, np.float32)
  values[0] = np.inf
  for magnitude in range(1, levels + 1):
    values[magnitude] = origin + width * np.float32(magnitude)
  return values


@native.compiled
def _sides(levels: int, usable: Bool[np.ndarray, '128']) -> Int64[np.ndarray, 'levels+1 4 2']:
  """Returns the two magnitudes of every kind around each place on the grid; 0 where there is none.

  The first is the usable one next to the last of the kind at or below the place, inwards; the
  second the next usable one beyond it.

  >>> _sides(9, np.ones(128, bool))[7].tolist()
  [[4, 8], [6, 0], [7, 0], [5, 9]]
  """
  sides = np.zeros((levels + 1, 4, 2), np.int64)
  for kind in range(4):
    least = _LEAST[kind]
    for place in range(levels + 1):
      magnitude = least + 4 * max((place - least) >> 2, 0)
      while magnitude > 0 and (magnitude > levels or not usable[magnitude]):
        magnitude -= 4
      sides[place, kind, 0] = max(magnitude, 0)
      # where the inner side ran down to nothing, the least of the kind
      magnitude = max(magnitude, least - 4) + 4
      while magnitude <= levels and not usable[magnitude]:
        magnitude += 4
      if magnitude <= levels:
        sides[place, kind, 1] = magnitude
  return sides
