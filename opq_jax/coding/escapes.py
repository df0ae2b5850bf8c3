"""Escaped weights of a leaf to bytes and back: their positions and their values.

m of the n weights of a leaf, in C order, at the ascending positions p_1 ... p_m, are stored as they
are.  The gap before each is g_i = p_i - p_(i-1) - 1, with p_0 = -1, and its bucket is the bit
length of the gap: 0 for a gap of 0, else 1 + floor(log2 g).  A section is

    u32                 bytes of the buckets
    buckets             plain payload (`opq_jax.coding.payload`) of the m buckets
    gaps                of every gap its bits below the leading one, the highest first; after every
                        2**16 gaps, padded with zeros to whole bytes
    u32                 bytes of the heads
    u8                  h, the head that most values have
    heads               plain payload of the m heads, each as (head - h) mod 256, an int8
    rests               of every value, w - 1 bytes, little-endian, of a value of w bytes; rests of
                        one bit (w = 1) eight in a byte, the first the highest, padded with zeros
    u32                 CRC-32 of all of the above

with all numbers little-endian.  The head of a value is the 8 bits that follow its sign (7 of a
value of 8 bits): the exponent of float32 and bfloat16, which repeats, and so costs its entropy
alone.  The rest is the sign, then the bits below the head.

At random places an escape takes log2(n / m) + 1.5 bits for its position, the entropy of its head
and the bits of its rest; a section adds some 30 bytes.
"""

import zlib

import numpy as np

from opq_jax.coding.payload import decode_codes, encode_codes
from opq_jax.core.array_types import Int8, Int64, Shaped, UInt8

_PIECE = 1 << 16
"""Gaps whose bits are padded to whole bytes together, and values that are cut at a time: memory for
one piece bounds what a hostile section takes."""

_WORD = 4
"""Bytes of a length and of the checksum."""


def encode(positions: Int64[np.ndarray, ' m'], values: Shaped[np.ndarray, ' m']) -> bytes:
  """Returns the section of escaped weights.

  Args:
    positions: in the leaf, in C order, ascending.
    values: the weight at each position, in the leaf's dtype.

  Returns:
    The section, empty where there are no escaped weights.  The same weights make the same bytes.

  >>> section = encode(np.array([3, 70]), np.array([9.5, -8.0], np.float32))
  >>> [part.tolist() for part in decode(section, 100, 2, np.dtype('float32'))]
  [[3, 70], [9.5, -8.0]]
  """
  if positions.size == 0:
    return b''
  buckets, bits = np.empty(positions.size, np.int8), []
  for start in range(0, positions.size, _PIECE):
    piece = positions[start : start + _PIECE]
    gaps = np.diff(piece, prepend=positions[start - 1] if start else -1) - 1
    length = _bit_length(gaps)
    buckets[start : start + _PIECE] = length
    bits.append(_packed(gaps, np.maximum(length.astype(np.int64) - 1, 0)))
  coded = encode_codes(buckets, contexts=False)
  heads, rests = _cut(values)
  # relative to the most frequent head, heads are near 0, and their table is short
  frequent = int(np.argmax(np.bincount(heads, minlength=256)))
  relative = encode_codes((heads - np.uint8(frequent)).view(np.int8), contexts=False)
  parts = [_length(coded), coded, *bits, _length(relative), bytes([frequent]), relative, *rests]
  section = b''.join(parts)
  return section + zlib.crc32(section).to_bytes(_WORD, 'little')


def decode(
  data: bytes, size: int, count: int, dtype: np.dtype
) -> tuple[Int64[np.ndarray, ' m'], Shaped[np.ndarray, ' m']]:
  """Returns the positions and the values of a section.

  Args:
    data: the section.
    size: weights of the leaf, n.
    count: its escaped weights, m.
    dtype: of the leaf.

  Raises:
    ValueError: `data` is no section of so many weights of such a leaf.
  """
  if not 0 <= count <= size:
    raise ValueError(f'found {count} escaped weights, expected 0 to {size}')
  if count == 0:
    if data:
      raise ValueError(f'found {len(data)} bytes of escaped weights, expected none')
    return np.zeros(0, np.int64), np.zeros(0, dtype)
  body, checksum = data[:-_WORD], int.from_bytes(data[-_WORD:], 'little')
  if (found := zlib.crc32(body)) != checksum or len(data) < 2 * _WORD:
    raise ValueError(f'found CRC-32 {found:08x} of the escaped weights, expected {checksum:08x}')
  end = _WORD + int.from_bytes(body[:_WORD], 'little')
  if end > len(body):
    raise ValueError(f'found {end - _WORD} bytes of buckets in {len(body)}, expected fewer')
  buckets = decode_codes(body[_WORD:end], (count,))
  # no gap is beyond size - 1, so no hostile bucket shifts a bit out of an int64 below
  least, largest, bound = int(buckets.min()), int(buckets.max()), (size - 1).bit_length()
  if least < 0 or largest > bound:
    raise ValueError(f'found buckets {least} to {largest}, expected 0 to {bound}')
  positions, last = np.empty(count, np.int64), -1
  for start in range(0, count, _PIECE):
    length = buckets[start : start + _PIECE].astype(np.int64)
    widths = np.maximum(length - 1, 0)
    begin, end = end, end + -(-int(widths.sum()) // 8)
    if end > len(body):
      raise ValueError(f'found {len(body) - begin} bytes of gaps, expected {end - begin}')
    gaps = _unpacked(body[begin:end], widths) + np.where(length > 0, 1 << widths, 0)
    # in float64 first: a hostile sum of int64 may wrap around to a small one
    is_far = float(np.sum(gaps, dtype=np.float64)) > 1.5 * size
    if is_far or last + int(gaps.sum()) + gaps.size >= size:
      raise ValueError(f'found an escaped weight beyond the {size} of the leaf')
    piece = positions[start : start + _PIECE]
    np.cumsum(gaps + 1, out=piece)
    piece += last
    last = int(piece[-1])
  return positions, _parsed_values(body[end:], count, dtype)


def _parsed_values(data: bytes, count: int, dtype: np.dtype) -> Shaped[np.ndarray, ' m']:
  head = _WORD + 1
  end = head + int.from_bytes(data[:_WORD], 'little')
  if len(data) < head or end > len(data):
    raise ValueError(
      f'found {len(data)} bytes of escaped values, expected {max(end, head)} and more'
    )
  relative = decode_codes(data[head:end], (count,)).view(np.uint8)
  # values of one byte have rests of one bit, eight to a byte
  expected = count * (dtype.itemsize - 1) or -(-count // 8)
  if len(data) - end != expected:
    raise ValueError(f'found {len(data) - end} bytes of rests, expected {expected}')
  # uint8 wraps around: the inverse of (head - h) mod 256
  heads, width = relative + np.uint8(data[_WORD]), dtype.itemsize - 1
  values = np.empty(count, dtype)
  for start in range(0, count, _PIECE):
    stop = min(start + _PIECE, count)
    part = slice(end + start * width, end + stop * width)
    if not width:
      part = slice(end + start // 8, end + -(-stop // 8))
    values[start:stop] = _joined(heads[start:stop], data[part], dtype)
  return values


def _length(part: bytes) -> bytes:
  return len(part).to_bytes(_WORD, 'little')


def _cut(values: Shaped[np.ndarray, ' m']) -> tuple[UInt8[np.ndarray, ' m'], list[bytes]]:
  """Cuts values into heads, and rests as bytes of one piece after the other."""
  size = values.dtype.itemsize
  heads, rests = np.empty(values.size, np.uint8), []
  for start in range(0, values.size, _PIECE):
    bits = np.ascontiguousarray(values[start : start + _PIECE]).view(f'<u{size}')
    if size == 1:
      heads[start : start + _PIECE] = bits & np.uint8(127)
      rests.append(np.packbits(bits >> 7).tobytes())
      continue
    # bits below the head: all but the sign and 8 more
    below = bits.dtype.type(8 * size - 9)
    heads[start : start + _PIECE] = (bits >> below).astype(np.uint8)
    sign, low = bits >> bits.dtype.type(8 * size - 1), bits & bits.dtype.type((1 << int(below)) - 1)
    # the sign takes the place of the head's lowest bit: 8 size - 8 bits, whose top byte is empty
    rest = (sign << below | low).astype(f'<u{size}').view(np.uint8).reshape(-1, size)
    rests.append(rest[:, : size - 1].tobytes())
  return heads, rests


def _joined(
  heads: UInt8[np.ndarray, ' m'], rests: bytes, dtype: np.dtype
) -> Shaped[np.ndarray, ' m']:
  """Joins heads and rests to values: the inverse of `_cut`."""
  size, stored = dtype.itemsize, np.frombuffer(rests, np.uint8)
  if size == 1:
    signs = np.unpackbits(stored)
    if (heads > 127).any() or signs[heads.size :].any():
      raise ValueError('found heads or signs of escaped values that no value has')
    return (heads | signs[: heads.size] << 7).view(dtype)
  wide = np.zeros((heads.size, size), np.uint8)
  wide[:, : size - 1] = stored.reshape(-1, size - 1)
  bits = wide.view(f'<u{size}').reshape(-1)
  number, below = bits.dtype.type, bits.dtype.type(8 * size - 9)
  low = bits & number((1 << int(below)) - 1)
  sign = (bits >> below) << number(8 * size - 1)
  return (sign | heads.astype(bits.dtype) << below | low).view(dtype)


def _bit_length(numbers: Int64[np.ndarray, ' k']) -> Int8[np.ndarray, ' k']:
  """The bit length of numbers from 0 to 2**62; exact, unlike a logarithm in float64."""
  length = np.zeros(numbers.size, np.int8)
  rest = numbers.copy()
  # a binary search for the highest bit, in six passes over all numbers at once
  for shift in (32, 16, 8, 4, 2, 1):
    is_long = rest >> shift > 0
    length[is_long] += shift
    rest[is_long] >>= shift
  return length + (rest > 0).astype(np.int8)


def _places(
  widths: Int64[np.ndarray, ' k'],
) -> tuple[Int64[np.ndarray, ' bits'], Int64[np.ndarray, ' bits']]:
  """For every bit of a sequence of numbers: which number has it, and its place, the lowest 0."""
  ends = np.cumsum(widths)
  which = np.repeat(np.arange(widths.size), widths)
  return which, ends[which] - 1 - np.arange(which.size)


def _packed(numbers: Int64[np.ndarray, ' k'], widths: Int64[np.ndarray, ' k']) -> bytes:
  which, place = _places(widths)
  return np.packbits((numbers[which] >> place & 1).astype(np.uint8)).tobytes()


def _unpacked(data: bytes, widths: Int64[np.ndarray, ' k']) -> Int64[np.ndarray, ' k']:
  which, place = _places(widths)
  bits: UInt8[np.ndarray, ' bits'] = np.unpackbits(np.frombuffer(data, np.uint8))
  if bits[which.size :].any():
    raise ValueError('found bits of gaps that are not padded with zeros')
  # each number is the difference of two running sums; the sums may wrap around mod 2**64, their
  # differences, below 2**62, are right all the same
  sums = np.concatenate([[0], np.cumsum(bits[: which.size].astype(np.int64) << place)])
  ends = np.cumsum(widths)
  return sums[ends] - sums[ends - widths]
