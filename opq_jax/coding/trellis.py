r"""A trellis of two subsets of one codebook: which of them a code is of, the codes before it say.

Codes follow each other, and a state s of five bits, 0 at first, goes with them.  In a state the
code c of a weight is of one of two subsets, both with 0:

    subset 0:  0, +-2, +-4, ...        subset 1:  0, +-1, +-3, ...

so that its index in the subset, k = sign(c) ceil(|c| / 2), tells the rest.  The subset is the
parity of the bits of s & 9, and the parity of k leads on:

    s  <-  (s << 1) & 31  |  (parity of s & 29) xor (k & 1)

The decoder has one codebook, as ever, and half as many symbols to tell apart at each weight.  The
encoder, which may choose the way, reaches errors that a codebook of that many levels does not: at
the same squared error, Laplace weights take 5 to 8 % fewer bits than with the best codebook all of
whose levels each weight has, from 4 bits down to half a bit (`experiments.benchmarks.trellis`).

Trellis-coded quantization is from Marcellin and Fischer, "Trellis Coded Quantization of Memoryless
and Gauss-Markov Sources", IEEE Trans. Communications 38, 1990.  With two subsets that share zero,
and parities of indices, it is known from video coding as dependent quantization (ISO/IEC 23090-3),
with 4 or 8 states, and NNCodec (ISO/IEC 15938-17) has it.  The shift register is ours, and so are
prices from contexts that do not adapt.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8, UInt8

from opq_jax.core import native

STATES = 32
MOST_INDEX = 64  # of a code of an int8
_REGISTER, _SUBSET = 29, 9


def _parity(number: int) -> int:
  return number.bit_count() & 1


SUBSET_OF = np.array([_parity(s & _SUBSET) for s in range(STATES)], np.uint8)
NEXT = np.array(
  [
    [(s << 1) % STATES | (_parity(s & _REGISTER) ^ parity) for parity in (0, 1)]
    for s in range(STATES)
  ],
  np.uint8,
)
# the two states before each, and subset and parity, as 2 * subset + parity, that lead from there
_BEFORE = np.array([[t >> 1, (t >> 1) | STATES >> 1] for t in range(STATES)], np.uint8)
_KIND = np.array(
  [
    [2 * SUBSET_OF[s] + (t & 1 ^ _parity(int(s) & _REGISTER)) for s in _BEFORE[t]]
    for t in range(STATES)
  ],
  np.uint8,
)
# least |c| but 0 of each kind; the others are 4 apart
_LEAST = np.array([4, 2, 3, 1], np.int64)
_RENEWED = 64  # weights after which the costs are those over the least, for float32 to hold them


class Grid(NamedTuple):
  """The codebook: |value| of code c is first + step (|c| - 1), 1 <= |c| <= levels."""

  first: float
  step: float
  levels: int

  def value(self, code: int) -> float:
    """Of a code from 1 up."""
    return self.first + self.step * (code - 1)


@native.compiled
def split(
  codes: Int8[np.ndarray, ' n'], indices: Int8[np.ndarray, ' n'], subsets: UInt8[np.ndarray, ' n']
) -> bool:
  """Writes index and subset of every code; False, and stops, where a code is of the other subset.

  >>> indices, subsets = np.zeros(4, np.int8), np.zeros(4, np.uint8)
  >>> split(np.array([2, -1, 0, -4], np.int8), indices, subsets), indices.tolist(), subsets.tolist()
  (True, [1, -1, 0, -2], [0, 1, 0, 0])
  >>> split(np.array([1, 0, 0, 0], np.int8), indices, subsets)
  False
  """
  state = 0
  for i in range(codes.size):
    size, subset = abs(int(codes[i])), SUBSET_OF[state]
    if size and (size & 1) != subset:
      return False
    index = (size + 1) >> 1
    indices[i] = index if codes[i] > 0 else -index
    subsets[i] = subset
    state = NEXT[state, index & 1]
  return True


def indices_and_subsets(
  codes: Int8[np.ndarray, '...'],
) -> tuple[Int8[np.ndarray, '...'], UInt8[np.ndarray, '...']] | None:
  """Of codes in C order; None where they do not follow the trellis.

  >>> indices_and_subsets(np.array([[2, -1], [0, -4]], np.int8))[0].tolist()
  [[1, -1], [0, -2]]
  """
  flat = np.ascontiguousarray(codes).reshape(-1)
  indices, subsets = np.empty((2, flat.size), np.int8)
  if not split(flat, indices, subsets.view(np.uint8)):
    return None
  return indices.reshape(codes.shape), subsets.view(np.uint8).reshape(codes.shape)


def join(
  indices: Int8[np.ndarray, '...'], subsets: UInt8[np.ndarray, '...']
) -> Int8[np.ndarray, '...']:
  """The codes of indices in their subsets.

  Raises:
    ValueError: an index is none of an int8's code.

  >>> join(np.array([1, -1, 0, 2], np.int8), np.array([0, 1, 0, 1], np.uint8)).tolist()
  [2, -1, 0, 3]
  """
  codes = 2 * indices.astype(np.int16) - np.sign(indices) * subsets.astype(np.int16)
  if codes.size and (codes.min() < -127 or codes.max() > 127):
    raise ValueError(f'found codes {codes.min()} to {codes.max()}, expected -127 to 127')
  return codes.astype(np.int8)


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
  """The codes of least sum (w - value)^2 + slope bits: all ways through the trellis are compared.

  Args:
    weights: in the order of the codes; NaN for one that is escaped, whose code is 0.
    slopes: squared error that a bit is worth.
    models: which of the tables of bits is that of each weight.
    is_turned: where the sign is that of -index in the table.
    bits: of each index + 64, in each subset.
    usable: which |code| may be chosen.
    first, step, levels: of the `Grid`.
    state: before the first of them.
    codes: room for those of the first weights, which may be fewer than all: those that come after
      them are only looked at.

  Returns:
    The state after those codes.
  """
  cost, new = np.full(STATES, np.inf, np.float32), np.empty(STATES, np.float32)
  cost[state] = 0
  branch = np.empty(4, np.float32)
  chosen = np.empty((weights.size, 4), np.int8)
  is_second = np.empty((weights.size, STATES), np.bool_)
  origin, width = np.float32(first - step), np.float32(step)
  per_width = np.float32(1 / step)
  for i in range(weights.size):
    size, slope, table = abs(weights[i]), slopes[i], bits[models[i]]
    is_escaped = np.isnan(weights[i])
    turn = -1 if (weights[i] < 0) != is_turned[i] else 1
    place = (size - origin) * per_width
    for kind in range(4):
      least, price = _LEAST[kind], table[kind >> 1]
      best, code = np.float32(np.inf), 0
      if kind & 1 == 0:
        best = size * size + slope * price[MOST_INDEX]
      c = least
      if is_escaped:
        if kind & 1 == 0:
          best = slope * price[MOST_INDEX]
        branch[kind], chosen[i, kind] = best, 0
        continue
      if place >= least + 4:
        c += int((place - np.float32(least)) * np.float32(0.25)) * 4
      for side in range(2):
        if c > levels:
          c -= (c - levels + 3) & ~3
        # the next that may be, inwards for the first and outwards for the second
        while 0 < c <= levels and not usable[c]:
          c += 8 * side - 4
        if 0 < c <= levels:
          error = size - (origin + width * np.float32(c))
          total = error * error + slope * price[MOST_INDEX + turn * ((c + 1) >> 1)]
          if total < best:
            best, code = total, c
        c = max(c, least - 4) + 4
      branch[kind], chosen[i, kind] = best, code
    for t in range(STATES):
      one = cost[_BEFORE[t, 0]] + branch[_KIND[t, 0]]
      two = cost[_BEFORE[t, 1]] + branch[_KIND[t, 1]]
      is_second[i, t] = two < one
      new[t] = min(one, two)
    if i % _RENEWED == 0:
      new -= new.min()
    cost, new = new, cost
  at = int(np.argmin(cost))
  end = at
  for i in range(weights.size - 1, -1, -1):
    if i == codes.size - 1:
      end = at
    which = int(is_second[i, at])
    if i < codes.size:
      code = chosen[i, _KIND[at, which]]
      codes[i] = -code if weights[i] < 0 else code
    at = _BEFORE[at, which]
  return end
