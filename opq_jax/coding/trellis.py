r"""The trellis of one codebook in two subsets: the codes so far select the subset of the next one.

Codes are read in order, along with a state s of five bits that is 0 at first.  The state selects
the subset that the next code c is of.  Both subsets hold 0:

    subset 0:  0, +-2, +-4, ...        subset 1:  0, +-1, +-3, ...

so the index of c in its subset, k = sign(c) ceil(|c| / 2), is all that is coded.  The subset is the
parity of the bits of s & 9.  The parity of k moves the state on:

    s  <-  (s << 1) & 31  |  (parity of s & 29) xor (k & 1)

A decoder keeps one codebook and tells half as many symbols apart at each weight.  An encoder is
free to choose the path (`opq_jax.coding.viterbi`), and reaches errors that a codebook of so many
levels does not: at the same squared error, Laplace weights take 5 to 8 % fewer bits than with the
best codebook all of whose levels each weight may have, from 4 bits down to half a bit
(`experiments.benchmarks.accuracy.trellis`).

Trellis-coded quantization is from Marcellin and Fischer, "Trellis Coded Quantization of Memoryless
and Gauss-Markov Sources", IEEE Trans. Communications 38, 1990.  With two subsets that share zero,
and parities of indices, it is known from video coding as dependent quantization (ISO/IEC 23090-3),
with 4 or 8 states; NNCodec (ISO/IEC 15938-17) has it too.  The shift register of 32 states and its
two masks are ours, and so are prices of codes that do not adapt.
"""

import sys
from typing import NamedTuple

import numpy as np

from opq_jax.core.array_types import Int8, UInt8

STATES = 32
MAX_INDEX = 64
"""The largest |k|, that of codes 127 and -127."""

# bits of the state whose parity is the subset, and the next bit of the shift register.  The second
# mask has the bit that is shifted out: states that differ in it alone lead to the same two states,
# each by the other parity, so every state has two ways in
_SUBSET_MASK, _REGISTER_MASK = 9, 29
# codes that Python walks, in some 2 ms, unless numba is loaded: plain codes leave the trellis there
_HEAD = 1 << 12


def _parity(number: int) -> int:
  return number.bit_count() & 1


SUBSET_OF = np.array([_parity(s & _SUBSET_MASK) for s in range(STATES)], np.uint8)
"""The subset that each state selects."""

NEXT = np.array(
  [
    [(s << 1) % STATES | (_parity(s & _REGISTER_MASK) ^ parity) for parity in (0, 1)]
    for s in range(STATES)
  ],
  np.uint8,
)
"""The state after each state, by the parity of the index."""


class Grid(NamedTuple):
  """The codebook: code c has the magnitude first + step (|c| - 1), 1 <= |c| <= levels."""

  first: float
  step: float
  levels: int

  def value(self, code: int) -> float:
    """Returns the value of a code from 1 up."""
    return self.first + self.step * (code - 1)


def indices_and_subsets(
  codes: Int8[np.ndarray, '...'],
) -> tuple[Int8[np.ndarray, '...'], UInt8[np.ndarray, '...']] | None:
  """Returns index and subset of codes in C order; None where they do not follow the trellis.

  >>> indices, subsets = indices_and_subsets(np.array([[2, -1], [0, -4]], np.int8))
  >>> indices.tolist(), subsets.tolist()
  ([[1, -1], [0, -2]], [[0, 1], [0, 0]])
  >>> indices_and_subsets(np.array([1, 0, 0, 0], np.int8)) is None
  True
  """
  flat = np.ascontiguousarray(codes).reshape(-1)
  indices, subsets = np.empty((2, flat.size), np.int8)
  if 'opq_jax.coding.viterbi' not in sys.modules:
    head = _walked(flat[:_HEAD].tolist())
    if head is None:
      return None
    if flat.size <= _HEAD:
      indices[:], subsets[:] = head
      return indices.reshape(codes.shape), subsets.view(np.uint8).reshape(codes.shape)
  from opq_jax.coding import viterbi  # loads numba

  if not viterbi.split(flat, indices, subsets.view(np.uint8)):
    return None
  return indices.reshape(codes.shape), subsets.view(np.uint8).reshape(codes.shape)


def _walked(codes: list[int]) -> tuple[list[int], list[int]] | None:
  """Index and subset of every code; None where a code is off the trellis."""
  indices, subsets, state = [], [], 0
  subset_of, following = SUBSET_OF.tolist(), NEXT.tolist()
  for code in codes:
    subset = subset_of[state]
    # 0 is in both subsets; any other code is in that of its own parity
    if code and (code & 1) != subset:
      return None
    index = (abs(code) + 1) >> 1
    indices.append(index if code > 0 else -index)
    subsets.append(subset)
    state = following[state][index & 1]
  return indices, subsets


def join(
  indices: Int8[np.ndarray, '...'], subsets: UInt8[np.ndarray, '...']
) -> Int8[np.ndarray, '...']:
  """Returns the codes of indices in their subsets.

  Raises:
    ValueError: a code is outside of -127 to 127.

  >>> join(np.array([1, -1, 0, 2], np.int8), np.array([0, 1, 0, 1], np.uint8)).tolist()
  [2, -1, 0, 3]
  """
  # indices of a damaged file reach 127 and codes 254, beyond int8
  codes = 2 * indices.astype(np.int16) - np.sign(indices) * subsets.astype(np.int16)
  if codes.size and (codes.min() < -127 or codes.max() > 127):
    raise ValueError(f'found codes {codes.min()} to {codes.max()}, expected -127 to 127')
  return codes.astype(np.int8)
