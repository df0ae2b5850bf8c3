"""Symbols to words of an ANS and back, one by one: the symbols before select the model of the next.

`constriction` decodes many symbols of one model at once.  Along a trellis
(`opq_jax.coding.trellis`) each index selects the model of the next one, so a compiled loop takes
the place of a call a symbol.  This module loads numba.

State and words are those of `opq_jax.coding.ans`, so that a message may go on with either.  But
probabilities have the P bits of their own table instead of 24: with F_i = f_0 + ... + f_(i-1),

    encode i:   if x >> (64 - P) >= f_i:  push the low 32 bits of x;  x >>= 32
                x  <-  (x // f_i) 2**P  +  x mod f_i  +  F_i
    decode:     i with F_i <= x mod 2**P < F_(i+1)
                x  <-  (x >> P) f_i  +  x mod 2**P  -  F_i
                if x < 2**32 and a word is left:  x  <-  2**32 x + word
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int64, UInt8, UInt32

from opq_jax.coding import frequencies
from opq_jax.coding.trellis import NEXT, SUBSET_OF
from opq_jax.core import native

_WORD = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


class Tables(NamedTuple):
  """Models side by side: the symbols of each that occur, in the order of its table.

  Attributes:
    symbols: padded with zeros.
    cumulative: F_i of each symbol, then 2**precision.
    precisions: of each model.
  """

  symbols: Int8[np.ndarray, 'models most']
  cumulative: Int64[np.ndarray, 'models most+1']
  precisions: Int64[np.ndarray, ' models']


def tables(models: list[frequencies.Frequencies]) -> Tables:
  """Returns models as tables for compiled loops."""
  occurring = [model.frequencies > 0 for model in models]
  most = max(int(np.count_nonzero(o)) for o in occurring)
  symbols = np.zeros((len(models), most), np.int8)
  cumulative = np.zeros((len(models), most + 1), np.int64)
  for row, (model, o) in enumerate(zip(models, occurring, strict=True)):
    count = int(np.count_nonzero(o))
    symbols[row, :count] = model.symbols[o]
    # padded with 2**P: a slot is below it, so the search of `_pull` ends at the model's own symbols
    cumulative[row, 1:] = 1 << model.precision
    cumulative[row, 1 : count + 1] = np.cumsum(model.frequencies[o])
  return Tables(symbols, cumulative, np.array([model.precision for model in models], np.int64))


def encode(
  words: UInt32[np.ndarray, ' words'],
  symbols: Int8[np.ndarray, ' n'],
  models: UInt8[np.ndarray, ' n'],
  known: Tables,
) -> UInt32[np.ndarray, ' more']:
  """Puts symbols onto words, the last one first.

  Args:
    words: of the message so far.
    symbols: in the order in which they will be decoded; each must occur in its model.
    models: the row of `known` of each symbol.
    known: the models.

  Returns:
    The words of the longer message.
  """
  place = np.full((len(known.precisions), 256), -1, np.int64)
  for row, (some, ends) in enumerate(zip(known.symbols, known.cumulative, strict=True)):
    count = int(np.count_nonzero(np.diff(ends)))
    place[row, some[:count].view(np.uint8)] = np.arange(count)
  # a symbol pushes one word at most, and the head of a message of one word may grow to two
  room = np.empty(len(words) + symbols.size + 1, np.uint32)
  room[: len(words)] = words
  return room[: _push(room, len(words), symbols, models, place, *known[1:])]


def decode(
  words: UInt32[np.ndarray, ' words'],
  ranges: UInt8[np.ndarray, ' n'],
  state: int,
  known: Tables,
  indices: Int8[np.ndarray, ' n'],
  subsets: UInt8[np.ndarray, ' n'],
) -> tuple[UInt32[np.ndarray, ' fewer'], int]:
  """Takes indices along a trellis off words, each of the model 2 range + subset.

  Args:
    words: of the message; their memory is used again.
    ranges: the range of scores of each weight.
    state: of the trellis before the first weight.
    known: the models.
    indices, subsets: room for the index and the subset of each weight.

  Returns:
    The words that are left, and the state of the trellis after the last weight.
  """
  count, state = _pull(words, len(words), ranges, state, *known, indices, subsets)
  return words[:count], state


# in the loops every operand of the coder is uint64: an int64 beside one would make numba compute in
# float64, which holds 53 bits
@native.compiled
def _push(words, size, symbols, models, place, cumulative, precisions):  # type: ignore[no-untyped-def]
  head, size = _taken(words, size)
  for i in range(symbols.size - 1, -1, -1):
    model = models[i]
    column = place[model, np.uint8(symbols[i])]
    precision = np.uint64(precisions[model])
    begin = np.uint64(cumulative[model, column])
    frequency = np.uint64(cumulative[model, column + 1]) - begin
    # one word is enough: the head is below 2**32 then, and f 2**(64 - P) is at least 2**48
    if head >> (np.uint64(64) - precision) >= frequency:
      words[size] = np.uint32(head & _LOW)
      size += 1
      head >>= _WORD
    head = ((head // frequency) << precision) | (head % frequency + begin)
  return _put(words, size, head)


@native.compiled
def _pull(  # type: ignore[no-untyped-def]
  words, size, ranges, state, symbols, cumulative, precisions, indices, subsets
):
  head, size = _taken(words, size)
  one = np.uint64(1)
  for i in range(ranges.size):
    subset = SUBSET_OF[state]
    model = 2 * ranges[i] + subset
    precision = np.uint64(precisions[model])
    slot = head & ((one << precision) - one)
    column = 0
    # from the first symbol on: codes near 0 come first and are the most frequent ones
    while np.uint64(cumulative[model, column + 1]) <= slot:
      column += 1
    begin = np.uint64(cumulative[model, column])
    frequency = np.uint64(cumulative[model, column + 1]) - begin
    head = (head >> precision) * frequency + slot - begin
    if head >> _WORD == 0 and size > 0:
      size -= 1
      head = (head << _WORD) | np.uint64(words[size])
    index = symbols[model, column]
    indices[i], subsets[i] = index, subset
    state = NEXT[state, index & 1]
  return _put(words, size, head), state


@native.compiled
def _taken(words, size):  # type: ignore[no-untyped-def]
  """The last two words as the head of the coder, and how many are left."""
  head = np.uint64(0)
  for _ in range(min(size, 2)):
    size -= 1
    head = (head << _WORD) | np.uint64(words[size])
  return head, size


@native.compiled
def _put(words, size, head):  # type: ignore[no-untyped-def]
  """The inverse of `_taken`: how many words there are with those of the head."""
  while head:
    words[size] = np.uint32(head & _LOW)
    size += 1
    head >>= _WORD
  return size
