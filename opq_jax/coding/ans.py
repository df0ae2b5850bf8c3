"""Frequencies of symbols, and the words of an asymmetric numeral system (ANS) that uses them.

A symbol of frequency f has probability f / 2**P, costs P - log2 f bits, and does not occur where
f = 0.  Nothing but integers is stored, and f / 2**P is exact in float64, so every platform rebuilds
the same model, bit for bit.  No symbol is ever certain: `fit` keeps a second one that does not
occur, so the length of a message bounds the number of symbols in it.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any, TypeAlias

import constriction
import numpy as np
from jaxtyping import Float64, Int8, Int64, Num, UInt32

_MAX_PRECISION = 16  # bits of a frequency; the models of constriction have 24
_CHUNK = 1 << 16  # symbols at a time: the int32 copy that the coder needs stays in the cache

Coder: TypeAlias = Any  # constriction.stream.stack.AnsCoder, which has no types


@dataclasses.dataclass(frozen=True)
class Frequencies:
  """A model of symbols that are int8.

  Attributes:
    symbols: least to largest in the order 0, 1, -1, 2, -2, ...
    frequencies: of each, whole numbers that sum to 2**precision.
    precision: 1 to 16.
  """

  symbols: Int8[np.ndarray, ' k']
  frequencies: Int64[np.ndarray, ' k']
  precision: int

  @property
  def least_bits(self) -> float:
    """What the cheapest symbol costs."""
    return self.precision - math.log2(self.frequencies.max())

  @functools.cached_property
  def _occurring(self) -> Int8[np.ndarray, ' m']:
    return self.symbols[self.frequencies > 0]

  @functools.cached_property
  def _model(self) -> constriction.stream.model.Categorical:
    frequencies = self.frequencies[self.frequencies > 0]
    return constriction.stream.model.Categorical(frequencies / float(1 << self.precision), False)

  def encode(self, coder: Coder, symbols: Int8[np.ndarray, ' size']) -> None:
    """Puts symbols, which must all occur, onto the coder, the last one first."""
    index_of = np.full(256, self._occurring.size, np.int32)  # which constriction refuses
    index_of[self._occurring.view(np.uint8)] = np.arange(self._occurring.size)
    as_bytes = symbols.view(np.uint8)
    for start in reversed(range(0, symbols.size, _CHUNK)):
      coder.encode_reverse(index_of.take(as_bytes[start : start + _CHUNK]), self._model)

  def decode(self, coder: Coder, out: Int8[np.ndarray, ' size']) -> None:
    """Takes as many symbols off the coder as `out` has room for."""
    for start in range(0, out.size, _CHUNK):
      part = out[start : start + _CHUNK]
      np.take(self._occurring, coder.decode(self._model, part.size), out=part, mode='clip')


def histogram(codes: Int8[np.ndarray, '...']) -> Int64[np.ndarray, '256']:
  """How often each code occurs; a negative code is counted at its value as a byte."""
  counts = np.zeros(256, np.int64)
  as_bytes = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
  for start in range(0, as_bytes.size, _CHUNK):
    counts += np.bincount(as_bytes[start : start + _CHUNK], minlength=256)
  return counts


def ideal_bits(counts: Num[np.ndarray, '... symbols']) -> Float64[np.ndarray, '...']:
  """What symbols that occur so often take at their own zeroth-order entropy, without a table."""
  total = counts.sum(-1, keepdims=True)
  return (counts * np.log2(np.maximum(total, 1) / np.maximum(counts, 1))).sum(-1)


def fit(counts: Int64[np.ndarray, '256']) -> Frequencies:
  """The frequencies that code symbols of a `histogram` in the fewest bits.

  Their precision grows by 3/4 bit for every doubling of the counts, so that tables of few symbols
  are short.
  """
  counts = counts.copy()
  if not counts.any():  # of a model that nothing is coded with
    counts[0] = 1
  occurring = np.flatnonzero(counts).astype(np.uint8).view(np.int8)
  size = int(counts.sum())
  if occurring.size == 1:  # the second symbol: 0, or 1 where all codes are 0
    counts[0 if occurring[0] else 1] = 1
    occurring = np.append(occurring, np.int8(0 if occurring[0] else 1))
  symbols = _symbols(min(0, int(occurring.min())), max(0, int(occurring.max())))
  precision = min(
    max((symbols.size - 1).bit_length(), 1 + 3 * size.bit_length() // 4), _MAX_PRECISION
  )
  return Frequencies(symbols, _quantized(counts[symbols.view(np.uint8)], precision), precision)


def write_table(model: Frequencies) -> str:
  """Bits as a string of 0 and 1: precision, least and largest symbol, frequencies of all but 0.

  The numbers are in exponential Golomb codes.  The parameter of each frequency follows from the
  frequency before it, which is of like size because the symbols come in the order 1, -1, 2, -2, ...
  """
  bits = f'{model.precision - 1:04b}'
  bits += golomb(int(model.symbols.max()), 2) + golomb(-int(model.symbols.min()), 2)
  previous = (1 << model.precision) >> 3
  for frequency in model.frequencies[1:].tolist():
    bits += golomb(frequency, _parameter(previous))
    previous = frequency
  return bits


def read_table(bits: str, position: int) -> tuple[Frequencies, int]:
  """The table that begins at `position`, and where it ends."""
  precision, position = int(bits[position : position + 4] or '0', 2) + 1, position + 4
  largest, position = read_golomb(bits, position, 2)
  minus_least, position = read_golomb(bits, position, 2)
  if largest > 127 or minus_least > 128:
    raise ValueError(f'found symbols {-minus_least} to {largest}, expected -128 to 127 at most')
  symbols = _symbols(-minus_least, largest)
  frequencies = np.zeros(symbols.size, np.int64)
  previous = (1 << precision) >> 3
  for i in range(1, symbols.size):
    previous, position = read_golomb(bits, position, _parameter(previous))
    frequencies[i] = previous
  frequencies[0] = (1 << precision) - frequencies.sum()
  if frequencies[0] < 0 or np.count_nonzero(frequencies) < 2:
    raise ValueError(
      f'found frequencies {frequencies[1:].tolist()}, expected two symbols or more that share '
      f'{1 << precision}'
    )
  return Frequencies(symbols, frequencies, precision), position


def to_bytes(bits: str) -> bytes:
  """A string of 0 and 1, padded with zeros to whole bytes."""
  bits += '0' * (-len(bits) % 8)
  return int(bits, 2).to_bytes(len(bits) // 8, 'big')


def to_bits(data: bytes | memoryview, most_bytes: int) -> str:
  """The string of 0 and 1 with which `data` begins."""
  head = bytes(data[:most_bytes])
  return f'{int.from_bytes(head, "big"):0{8 * len(head)}b}'


def end_of_bits(bits: str, position: int) -> int:
  """The first byte after the bits before `position` and their padding.

  Raises:
    ValueError: the padding is not zeros.
  """
  end = -(-position // 8)
  if '1' in bits[position : 8 * end]:
    raise ValueError('found a table of frequencies that is not padded with zeros')
  return end


def golomb(value: int, k: int) -> str:
  """The exponential Golomb code, of order k, of a number that is not negative."""
  value += 1 << k
  return f'{value:0{2 * value.bit_length() - k - 1}b}'


def read_golomb(bits: str, position: int, k: int) -> tuple[int, int]:
  """The number whose code begins at `position`, and where that code ends."""
  first = bits.find('1', position, position + _MAX_PRECISION + 1)
  end = 2 * first - position + k + 1
  if first < 0 or end > len(bits):
    raise ValueError('found a table of frequencies that is cut off or damaged')
  return int(bits[first:end], 2) - (1 << k), end


def begin(codes: Int8[np.ndarray, '...'], head: bytes = b'') -> Coder:
  """A coder that ends in the checksum of head and codes: what comes off it last.

  That is 31 bits of CRC-32 below a bit that is set.  From an empty state a run of the alphabet's
  first symbol would take no bits at all, and a message would bound nothing.  From any state of at
  least 2**24, the denominator of constriction's probabilities, each symbol lengthens the message by
  nearly -log2 of its probability.
  """
  return constriction.stream.stack.AnsCoder(np.array([_first_word(codes, head)], np.uint32))


def end(coder: Coder) -> bytes:
  """The words of a coder; the zero bytes at the end of the last, which is not 0, are left out."""
  return coder.get_compressed().astype('<u4').tobytes().rstrip(b'\0')


def resume(words: bytes, size: int, least_bits: float) -> Coder:
  """The coder of a message.

  Raises:
    ValueError: no encoder ends in such words, or they cannot hold `size` symbols of `least_bits`.
  """
  if len(words) < 4 or words[-1] == 0:
    raise ValueError(f'found {len(words)} bytes of ANS words that no encoder ends in this way')
  words += bytes(-len(words) % 4)
  # by up to 1 % and a few bits the integers of the coder may stay below the ideal length
  most_codes = int((8 * len(words) * 1.01 + 64) / least_bits)
  if size > most_codes:
    raise ValueError(f'found codes for at most {most_codes} weights, expected {size}')
  return constriction.stream.stack.AnsCoder(np.frombuffer(words, '<u4').astype(np.uint32))


def words(coder: Coder) -> UInt32[np.ndarray, ' words']:
  """All that is on a coder."""
  return coder.get_compressed()


def from_words(words: UInt32[np.ndarray, ' words']) -> Coder:
  """The coder with these words on it, of which the last is not 0."""
  return constriction.stream.stack.AnsCoder(words)


def check_end(coder: Coder, codes: Int8[np.ndarray, '...'], head: bytes = b'') -> None:
  """Raises ValueError where the coder does not end in the checksum of head and codes."""
  found, expected = coder.get_compressed(), _first_word(codes, head)
  if found.tolist() != [expected]:
    raise ValueError(f'found ANS words {found[:3]} left over, expected checksum {expected} alone')


def room(shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """An array for codes.

  Raises:
    ValueError: memory does not hold it.
  """
  try:
    return np.empty(shape, np.int8)
  except MemoryError as error:
    raise ValueError(f'found {math.prod(shape)} codes, expected as many as memory holds') from error


def _first_word(codes: Int8[np.ndarray, '...'], head: bytes) -> int:
  return zlib.crc32(np.ascontiguousarray(codes).data, zlib.crc32(head)) | 1 << 31


def _symbols(least: int, largest: int) -> Int8[np.ndarray, ' k']:
  """The symbols least ... largest in the order of the table: 0, 1, -1, 2, -2, ..."""
  return np.array(sorted(range(least, largest + 1), key=lambda s: (abs(s), s < 0)), np.int8)


def _quantized(counts: Int64[np.ndarray, ' k'], precision: int) -> Int64[np.ndarray, ' k']:
  """Integer frequencies that sum to 2**precision, at least 1 where a symbol occurs.

  The rounded frequencies first; then, unit by unit, the change that costs the fewest bits (or
  saves the most) until the sum is right.
  """
  ideal = np.rint(counts * ((1 << precision) / counts.sum()))
  frequencies = np.where(counts > 0, np.maximum(ideal, 1), 0).astype(np.int64)
  while excess := int(frequencies.sum()) - (1 << precision):
    changed = frequencies - (1 if excess > 0 else -1)
    allowed = (counts > 0) & (changed > 0)
    saved = counts * np.log2(np.maximum(changed, 1) / np.maximum(frequencies, 1))
    best = np.argmax(np.where(allowed, saved, -np.inf))
    frequencies[best] = changed[best]
  return frequencies


def _parameter(previous: int) -> int:
  return max(0, previous.bit_length() - 2)
