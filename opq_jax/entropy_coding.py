"""Arrays of integer codes <-> bytes, at the cost of their zeroth-order entropy.

One payload codes one array:

    [table of frequencies][words of an asymmetric numeral system (ANS), little-endian uint32]

The table is a string of bits, padded with zeros to whole bytes.  It holds the precision P, the
least and the largest symbol, and an integer frequency f for every symbol between them but 0; the
frequency of 0 is what is left of 2**P.  A symbol of frequency f has probability f / 2**P, costs
P - log2 f bits, and does not occur where f = 0.  Nothing but integers is stored, and f / 2**P is
exact in float64, so every platform rebuilds the same model, bit for bit.

The words are what `constriction` makes of the symbols, last symbol first; the zero bytes at the
end of the last word are left out.  The coder does not begin empty but with the checksum of the
codes, which costs one byte more than beginning empty and which the decoder must find at the end.

No symbol is ever certain (a constant array keeps a second symbol that does not occur), so the
length of a payload bounds the number of codes in it: `decode_codes` refuses a size that the
payload cannot hold before it allocates anything.
"""

import math
import zlib

import constriction
import numpy as np
from jaxtyping import Int8, Int64

_MAX_PRECISION = 16  # bits of a frequency; the models of constriction have 24
_MAX_TABLE_BYTES = 1200  # 255 frequencies of at most 33 bits, the bounds of the alphabet, and P
_CHUNK = 1 << 16  # symbols at a time: the int32 copy that the coder needs stays in the cache


def entropy(codes: Int8[np.ndarray, '...']) -> float:
  """The empirical zeroth-order entropy of `codes` in bits per code (METHOD.md section 6).

  >>> entropy(np.array([0, 0, 1, -1], np.int8))
  1.5
  """
  counts = histogram(codes)
  counts = counts[counts > 0]
  return float(np.sum(counts * np.log2(codes.size / counts))) / max(codes.size, 1)


def histogram(codes: Int8[np.ndarray, '...']) -> Int64[np.ndarray, '256']:
  """How often each code occurs; a negative code is counted at its value as a byte."""
  counts = np.zeros(256, np.int64)
  as_bytes = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
  for start in range(0, as_bytes.size, _CHUNK):
    counts += np.bincount(as_bytes[start : start + _CHUNK], minlength=256)
  return counts


def encode_codes(codes: Int8[np.ndarray, '...']) -> bytes:
  """The payload of `codes`.

  Args:
    codes: int8, of any shape and any values; coded in C order.

  Returns:
    The payload, empty where `codes` is.  The same codes make the same bytes.

  Raises:
    ValueError: `codes` is not int8.

  >>> payload = encode_codes(np.array([0, 3, 0, 0, -1, 0], np.int8))
  >>> decode_codes(payload, 6).tolist()
  [0, 3, 0, 0, -1, 0]
  """
  if codes.dtype != np.int8:
    raise ValueError(f'found codes of dtype {codes.dtype}, expected int8')
  if codes.size == 0:
    return b''
  flat = np.ascontiguousarray(codes).reshape(-1)
  symbols, counts = _alphabet(histogram(flat))
  precision = _precision(symbols.size, flat.size)
  frequencies = _quantized(counts, precision)
  coded, model = _model(symbols, frequencies)
  index_of = np.zeros(256, np.int32)
  index_of[coded.view(np.uint8)] = np.arange(coded.size)

  coder = constriction.stream.stack.AnsCoder(np.array([_first_word(flat)], np.uint32))
  as_bytes = flat.view(np.uint8)
  for start in reversed(range(0, flat.size, _CHUNK)):
    coder.encode_reverse(index_of.take(as_bytes[start : start + _CHUNK]), model)
  # the last word of a coder is never 0, so a decoder can tell how many zero bytes are left out
  words = coder.get_compressed().astype('<u4').tobytes().rstrip(b'\0')
  return _write_table(symbols, frequencies, precision) + words


def decode_codes(data: bytes | memoryview, size: int) -> Int8[np.ndarray, ' size']:
  """The codes of a payload.

  Args:
    data: what `encode_codes` returned.
    size: how many codes it was given.

  Returns:
    int8, one-dimensional.

  Raises:
    ValueError: `data` is no payload of `size` codes.  Nothing larger than such a payload can hold
      is ever allocated, whatever `size` says.
  """
  if size == 0 and len(data) == 0:
    return np.zeros(0, np.int8)
  if size <= 0 or len(data) == 0:
    raise ValueError(f'found {len(data)} bytes of codes, expected those of {size} codes')
  symbols, frequencies, begin = _read_table(data)
  words = bytes(data[begin:])
  if len(words) < 4 or words[-1] == 0:
    raise ValueError(f'found {len(words)} bytes of ANS words that no encoder ends in this way')
  words += bytes(-len(words) % 4)

  # by up to 1 % and a few bits the integers of the coder may stay below the ideal length
  least_bits = math.log2(frequencies.sum() / frequencies.max())
  most_codes = int((8 * len(words) * 1.01 + 64) / least_bits)
  if size > most_codes:
    raise ValueError(f'found codes for at most {most_codes} weights, expected {size}')
  coded, model = _model(symbols, frequencies)
  coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, '<u4').astype(np.uint32))
  try:
    codes = np.empty(size, np.int8)
  except MemoryError as error:
    raise ValueError(f'found {size} codes, expected as many as memory holds') from error
  for start in range(0, size, _CHUNK):
    part = codes[start : start + _CHUNK]
    np.take(coded, coder.decode(model, part.size), out=part, mode='clip')
  found, expected = coder.get_compressed(), _first_word(codes)
  if found.tolist() != [expected]:
    raise ValueError(f'found ANS words {found[:3]} left over, expected checksum {expected} alone')
  return codes


def _first_word(flat: Int8[np.ndarray, ' size']) -> int:
  """31 bits of CRC-32 below a bit that is set.

  From an empty state a run of the alphabet's first symbol would take no bits at all, and a payload
  would bound nothing.  From any state of at least 2**24, the denominator of constriction's
  probabilities, each symbol lengthens the message by nearly -log2 of its probability.
  """
  return zlib.crc32(flat.data) | 1 << 31


def _symbols(least: int, largest: int) -> Int8[np.ndarray, ' k']:
  """The symbols least ... largest in the order of the table: 0, 1, -1, 2, -2, ..."""
  return np.array(sorted(range(least, largest + 1), key=lambda s: (abs(s), s < 0)), np.int8)


def _alphabet(
  counts: Int64[np.ndarray, '256'],
) -> tuple[Int8[np.ndarray, ' k'], Int64[np.ndarray, ' k']]:
  """Symbols in the order of the table, two at least, and how often each is taken to occur."""
  occurring = np.flatnonzero(counts).astype(np.uint8).view(np.int8)
  if occurring.size == 1:  # the second symbol: 0, or 1 where all codes are 0
    counts[0 if occurring[0] else 1] = 1
    occurring = np.append(occurring, np.int8(0 if occurring[0] else 1))
  symbols = _symbols(min(0, int(occurring.min())), max(0, int(occurring.max())))
  return symbols, counts[symbols.view(np.uint8)]


def _precision(symbols: int, size: int) -> int:
  """Bits of a frequency: 3/4 bit for every doubling of the array.

  On the layers of ResNet-20, MobileNet-V1, MobileNet-V2 and AlexNet at 1.2 to 2.5 bits per weight,
  trying every precision saves less than 0.01 % of the bytes.
  """
  return min(max((symbols - 1).bit_length(), 1 + 3 * size.bit_length() // 4), _MAX_PRECISION)


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


def _model(
  symbols: Int8[np.ndarray, ' k'], frequencies: Int64[np.ndarray, ' k']
) -> tuple[Int8[np.ndarray, ' m'], constriction.stream.model.Categorical]:
  """The symbols that have a frequency, and the model of their indices."""
  occurring = frequencies > 0
  probabilities = frequencies[occurring] / float(frequencies.sum())
  model = constriction.stream.model.Categorical(probabilities, perfect=False)
  return symbols[occurring], model


def _write_table(
  symbols: Int8[np.ndarray, ' k'], frequencies: Int64[np.ndarray, ' k'], precision: int
) -> bytes:
  """The table: numbers in exponential Golomb codes.

  The parameter of each frequency follows from the frequency before it, which is of like size
  because the symbols come in the order 1, -1, 2, -2, ...
  """
  bits = f'{precision - 1:04b}' + _golomb(int(symbols.max()), 2) + _golomb(-int(symbols.min()), 2)
  previous = (1 << precision) >> 3
  for frequency in frequencies[1:].tolist():
    bits += _golomb(frequency, _parameter(previous))
    previous = frequency
  bits += '0' * (-len(bits) % 8)
  return int(bits, 2).to_bytes(len(bits) // 8, 'big')


def _read_table(
  data: bytes | memoryview,
) -> tuple[Int8[np.ndarray, ' k'], Int64[np.ndarray, ' k'], int]:
  """Symbols and frequencies of a payload, and the number of bytes that they take."""
  head = bytes(data[:_MAX_TABLE_BYTES])
  bits = f'{int.from_bytes(head, "big"):0{8 * len(head)}b}'
  precision, position = int(bits[:4], 2) + 1, 4
  largest, position = _read_golomb(bits, position, 2)
  minus_least, position = _read_golomb(bits, position, 2)
  if largest > 127 or minus_least > 128:
    raise ValueError(f'found symbols {-minus_least} to {largest}, expected -128 to 127 at most')
  symbols = _symbols(-minus_least, largest)
  frequencies = np.zeros(symbols.size, np.int64)
  previous = (1 << precision) >> 3
  for i in range(1, symbols.size):
    previous, position = _read_golomb(bits, position, _parameter(previous))
    frequencies[i] = previous
  frequencies[0] = (1 << precision) - frequencies.sum()
  if frequencies[0] < 0 or np.count_nonzero(frequencies) < 2:
    raise ValueError(
      f'found frequencies {frequencies[1:].tolist()}, expected two symbols or more that share '
      f'{1 << precision}'
    )
  end = -(-position // 8)
  if '1' in bits[position : 8 * end]:
    raise ValueError('found a table of frequencies that is not padded with zeros')
  return symbols, frequencies, end


def _parameter(previous: int) -> int:
  return max(0, previous.bit_length() - 2)


def _golomb(value: int, k: int) -> str:
  """The exponential Golomb code, of order k, of a number that is not negative."""
  value += 1 << k
  return f'{value:0{2 * value.bit_length() - k - 1}b}'


def _read_golomb(bits: str, position: int, k: int) -> tuple[int, int]:
  """The number whose code begins at `position`, and where that code ends."""
  first = bits.find('1', position, position + _MAX_PRECISION + 1)
  end = 2 * first - position + k + 1
  if first < 0 or end > len(bits):
    raise ValueError('found a table of frequencies that is cut off or damaged')
  return int(bits[first:end], 2) - (1 << k), end
