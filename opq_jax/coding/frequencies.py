"""Frequencies of symbols, their tables in a file, and integers as bits.

A model of symbols that are int8 gives symbol i the frequency f_i, a whole number; all f_i sum to
2**P, 1 <= P <= 16.  A symbol has the probability f_i / 2**P and costs P - log2 f_i bits; it does
not occur where f_i = 0.  No symbol is ever certain: every table knows two symbols at least, so the
length of a message bounds the number of symbols in it.  Nothing but integers is stored, so every
platform rebuilds the same model, bit for bit.

A table is written as bits:

    P - 1                     4 bits, the highest first
    largest symbol            Golomb(2); 0 where all are negative
    - least symbol            Golomb(2); 0 where none is negative
    frequencies               of the symbols from least to largest, in the order 1, -1, 2, -2, ...
                              without those outside of the bounds: Golomb(k) with k = max(0, b - 2),
                              b the bit length of the frequency before, at first of 2**P >> 3

The frequency of symbol 0 is what the others leave of 2**P.  Golomb(k) is the exponential Golomb
code of order k: of the number n + 2**k, which has m bits, m - k - 1 zeros and then these m bits.
"""

import dataclasses
import functools
import math
from typing import Any

import constriction
import numpy as np

from opq_jax.core.array_types import Float64, Int8, Int64, Num

_MAX_PRECISION = 16
"""Bits of a frequency; those of the coder are 24 (`opq_jax.coding.ans`)."""

_CHUNK = 1 << 16
"""Symbols at a time: the int32 copy that the coder needs stays in a processor's cache."""


@dataclasses.dataclass(frozen=True)
class Frequencies:
  """A model of symbols that are int8.

  Attributes:
    symbols: all from the least to the largest, in the order 0, 1, -1, 2, -2, ...
    frequencies: of each, whole numbers that sum to 2**precision; 0 where it does not occur.
    precision: 1 to 16.
  """

  symbols: Int8[np.ndarray, ' k']
  frequencies: Int64[np.ndarray, ' k']
  precision: int

  @property
  def least_bits(self) -> float:
    """The bits of the cheapest symbol, more than 0."""
    return self.precision - math.log2(self.frequencies.max())

  @functools.cached_property
  def _occurring(self) -> Int8[np.ndarray, ' m']:
    return self.symbols[self.frequencies > 0]

  @functools.cached_property
  def _model(self) -> constriction.stream.model.Categorical:
    frequencies = self.frequencies[self.frequencies > 0]
    # a power of two divides exactly, so every platform hands over the same float64; False asks for
    # the rounding of `opq_jax.coding.ans`, whose shares are then the same integers everywhere
    return constriction.stream.model.Categorical(frequencies / float(1 << self.precision), False)

  def encode(self, coder: Any, symbols: Int8[np.ndarray, ' size']) -> None:
    """Puts symbols onto the coder, the last one first; all must occur in the model."""
    # the index of a symbol that does not occur is one that constriction refuses
    index_of = np.full(256, self._occurring.size, np.int32)
    index_of[self._occurring.view(np.uint8)] = np.arange(self._occurring.size)
    as_bytes = symbols.view(np.uint8)
    for start in reversed(range(0, symbols.size, _CHUNK)):
      coder.encode_reverse(index_of.take(as_bytes[start : start + _CHUNK]), self._model)

  def decode(self, coder: Any, out: Int8[np.ndarray, ' size']) -> None:
    """Takes as many symbols off the coder as `out` has room for."""
    for start in range(0, out.size, _CHUNK):
      part = out[start : start + _CHUNK]
      # clip, because `take` with `out` copies once more where it checks; no place is out of range
      np.take(self._occurring, coder.decode(self._model, part.size), out=part, mode='clip')


def histogram(codes: Int8[np.ndarray, '...']) -> Int64[np.ndarray, '256']:
  """Returns how often each code occurs; a negative code is counted at its value as a byte.

  >>> histogram(np.array([0, 0, 1, -1], np.int8))[[0, 1, 255]].tolist()
  [2, 1, 1]
  """
  counts = np.zeros(256, np.int64)
  as_bytes = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
  # `bincount` widens its input to 8 bytes an element
  for start in range(0, as_bytes.size, _CHUNK):
    counts += np.bincount(as_bytes[start : start + _CHUNK], minlength=256)
  return counts


def ideal_bits(counts: Num[np.ndarray, '... symbols']) -> Float64[np.ndarray, '...']:
  """Returns the bits of symbols with these counts at their own entropy, without a table.

  sum_i n_i log2(n / n_i), n = sum_i n_i, along the last axis.

  >>> float(ideal_bits(np.array([4, 2, 2])))
  12.0
  """
  # a count of 0 is multiplied by a finite logarithm, so it adds 0 and no NaN
  total = counts.sum(-1, keepdims=True)
  return (counts * np.log2(np.maximum(total, 1) / np.maximum(counts, 1))).sum(-1)


def fit(counts: Int64[np.ndarray, '256']) -> Frequencies:
  """Returns the frequencies that code symbols of these counts in the fewest bits.

  P = min(16, 1 + 3/4 of the bit length of the number of symbols): a table of few symbols is short,
  and of many its rounding costs next to nothing.

  Args:
    counts: of every int8, as `histogram` returns them.

  >>> model = fit(histogram(np.array([0, 0, 1, -1], np.int8)))
  >>> model.symbols.tolist(), model.frequencies.tolist(), model.precision
  ([0, 1, -1], [4, 2, 2], 3)
  """
  counts = counts.copy()
  if not counts.any():  # a range of scores, or a subset, that no code is of
    counts[0] = 1
  occurring = np.flatnonzero(counts).astype(np.uint8).view(np.int8)
  size = int(counts.sum())
  if occurring.size == 1:  # a second symbol: 0, or 1 where all codes are 0
    counts[0 if occurring[0] else 1] = 1
    occurring = np.append(occurring, np.int8(0 if occurring[0] else 1))
  symbols = _symbols(min(0, int(np.min(occurring))), max(0, int(np.max(occurring))))
  # 2**P is at least the number of symbols, so that each may have a frequency of 1 or more
  precision = min(
    max((symbols.size - 1).bit_length(), 1 + 3 * size.bit_length() // 4), _MAX_PRECISION
  )
  return Frequencies(symbols, _quantized(counts[symbols.view(np.uint8)], precision), precision)


def write_table(model: Frequencies) -> str:
  """Returns the table of a model as a string of 0 and 1.

  The order of each Golomb code follows from the frequency before it: along 1, -1, 2, -2, ...
  frequencies are of like size.

  >>> model = fit(histogram(np.array([0, 0, 1, -1], np.int8)))
  >>> write_table(model)
  '0010101101011011'
  """
  bits = f'{model.precision - 1:04b}'
  bits += golomb(int(model.symbols.max()), 2) + golomb(-int(model.symbols.min()), 2)
  previous = (1 << model.precision) >> 3
  for frequency in model.frequencies[1:].tolist():
    bits += golomb(frequency, _order(previous))
    previous = frequency
  return bits


def read_table(bits: str, position: int) -> tuple[Frequencies, int]:
  """Returns the model whose table begins at `position`, and the position after it.

  Raises:
    ValueError: the bits are no table.
  """
  precision, position = int(bits[position : position + 4] or '0', 2) + 1, position + 4
  largest, position = read_golomb(bits, position, 2)
  minus_least, position = read_golomb(bits, position, 2)
  if largest > 127 or minus_least > 128:
    raise ValueError(f'found symbols {-minus_least} to {largest}, expected -128 to 127 at most')
  symbols = _symbols(-minus_least, largest)
  frequencies = np.zeros(symbols.size, np.int64)
  previous = (1 << precision) >> 3
  for i in range(1, symbols.size):
    previous, position = read_golomb(bits, position, _order(previous))
    frequencies[i] = previous
  frequencies[0] = (1 << precision) - frequencies.sum()
  if frequencies[0] < 0 or np.count_nonzero(frequencies) < 2:
    raise ValueError(
      f'found frequencies {frequencies[1:].tolist()}, expected two symbols or more that share '
      f'{1 << precision}'
    )
  return Frequencies(symbols, frequencies, precision), position


def to_bytes(bits: str) -> bytes:
  """Returns a string of 0 and 1 as bytes, padded with zeros."""
  bits += '0' * (-len(bits) % 8)
  return int(bits, 2).to_bytes(len(bits) // 8, 'big')


def to_bits(data: bytes | memoryview, most_bytes: int) -> str:
  """Returns the first bytes of `data` as a string of 0 and 1."""
  head = bytes(data[:most_bytes])
  return f'{int.from_bytes(head, "big"):0{8 * len(head)}b}'


def end_of_bits(bits: str, position: int) -> int:
  """Returns the number of the first byte after the bits before `position` and their padding.

  Raises:
    ValueError: the padding is not zeros.
  """
  end = -(-position // 8)
  if '1' in bits[position : 8 * end]:
    raise ValueError('found a table of frequencies that is not padded with zeros')
  return end


def golomb(value: int, k: int) -> str:
  """Returns the exponential Golomb code, of order k, of a number that is not negative.

  >>> golomb(0, 2), golomb(5, 2), golomb(5, 0)
  ('100', '01001', '00110')
  """
  value += 1 << k
  return f'{value:0{2 * value.bit_length() - k - 1}b}'


def read_golomb(bits: str, position: int, k: int) -> tuple[int, int]:
  """Returns the number whose Golomb code begins at `position`, and the position after it.

  Raises:
    ValueError: no code of a number up to 2**17 begins there.
  """
  # a frequency, at most 2**16, has no more than 16 leading zeros: a longer run is damage
  first = bits.find('1', position, position + _MAX_PRECISION + 1)
  end = 2 * first - position + k + 1
  if first < 0 or end > len(bits):
    raise ValueError('found a table of frequencies that is cut off or damaged')
  number = int(bits[first:end], 2) - (1 << k)
  if number > 2 << _MAX_PRECISION:
    raise ValueError(f'found {number} in a table of frequencies, expected 2**17 at most')
  return number, end


def _symbols(least: int, largest: int) -> Int8[np.ndarray, ' k']:
  """The symbols from least to largest in the order of a table: 0, 1, -1, 2, -2, ..."""
  return np.array(sorted(range(least, largest + 1), key=lambda s: (abs(s), s < 0)), np.int8)


def _quantized(counts: Int64[np.ndarray, ' k'], precision: int) -> Int64[np.ndarray, ' k']:
  """Rounds counts to frequencies that sum to 2**precision, at least 1 where a symbol occurs.

  Counts are rounded each for itself; then single units are taken or given where this costs the
  fewest bits (or saves the most), until the sum is right.
  """
  # the loop takes no more turns than there are symbols: each is off by one unit at most.  Other
  # platforms may compute other logarithms, hence tables; a decoder reads whole numbers alone
  ideal = np.rint(counts * ((1 << precision) / counts.sum()))
  frequencies = np.where(counts > 0, np.maximum(ideal, 1), 0).astype(np.int64)
  while excess := int(frequencies.sum()) - (1 << precision):
    changed = frequencies - (1 if excess > 0 else -1)
    allowed = (counts > 0) & (changed > 0)
    # a symbol of count n costs n (P - log2 f) bits: this is what the unit saves, below 0 where one
    # is taken
    saved = counts * np.log2(np.maximum(changed, 1) / np.maximum(frequencies, 1))
    best = np.argmax(np.where(allowed, saved, -np.inf))
    frequencies[best] = changed[best]
  return frequencies


def _order(previous: int) -> int:
  return max(0, previous.bit_length() - 2)
