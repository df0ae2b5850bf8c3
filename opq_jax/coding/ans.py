"""Words of an asymmetric numeral system (ANS), and the checksum at their end.

A coder has a state x of 64 bits and a stack of words of 32 bits.  With the m symbols that occur in
a model (`opq_jax.coding.frequencies`), in the order of its table, the coder has 24 bits for their
probabilities, and shares out 2**24 so that none is 0:

    begin of symbol i    c_i  =  i + floor((f_0 + ... + f_(i-1)) (2**24 - m) / 2**P)
    share of symbol i    g_i  =  c_(i+1) - c_i,   with c_m = 2**24

    encode i:   if x >> 40 >= g_i:  push the low 32 bits of x;  x >>= 32
                x  <-  (x // g_i) 2**24  +  x mod g_i  +  c_i
    decode:     i with c_i <= x mod 2**24 < c_(i+1)
                x  <-  (x >> 24) g_i  +  x mod 2**24  -  c_i
                if x < 2**32 and a word is left:  x  <-  2**32 x + word

Symbols come off in the reverse order of encoding, so an encoder puts the last one on first.  A
message is the stack, then the low and the high word of x, little-endian, without the zero bytes
at its end; a decoder fills up the last word with zeros, and takes the last two words, or the only
one, as x.  These are the words of `constriction`, with 64-bit states
(https://docs.rs/constriction, `DefaultAnsCoder`).

The encoder starts with x = CRC-32 | 2**31 of the message, which a decoder must find at the end.
"""

import math
import zlib
from typing import Any, TypeAlias

import constriction
import numpy as np

from opq_jax.core.array_types import Int8, UInt32

Coder: TypeAlias = Any
"""`constriction.stream.stack.AnsCoder`, which has no types."""


def begin(codes: Int8[np.ndarray, '...'], head: bytes = b'') -> Coder:
  """Returns a coder that holds the checksum of head and codes alone.

  The checksum, the low 31 bits of CRC-32 below a bit that is set, comes off last.  From an empty
  state a run of the alphabet's first symbol would take no bits at all, and the length of a message
  would bound nothing.  From any state of at least 2**24, the denominator of the probabilities, each
  symbol lengthens the message by nearly -log2 of its probability.

  Args:
    codes: that will be coded.
    head: the bytes before the words, where they are not checked otherwise.
  """
  return constriction.stream.stack.AnsCoder(np.array([_first_word(codes, head)], np.uint32))


def end(coder: Coder) -> bytes:
  """Returns the words of a coder as bytes, without the zero bytes at their end."""
  # the last word is not 0: less than one word is cut off, and a decoder that pads to whole words
  # restores it
  return coder.get_compressed().astype('<u4').tobytes().rstrip(b'\0')


def resume(words: bytes, size: int, least_bits: float) -> Coder:
  """Returns the coder of a message.

  Args:
    words: the bytes of `end`.
    size: symbols that will be decoded.
    least_bits: of the cheapest symbol.

  Raises:
    ValueError: no encoder ends in such words, or they cannot hold `size` symbols of `least_bits`.
  """
  # the top bit of the checksum is set and symbols only lengthen a message: four bytes at least,
  # and the last of them is not 0
  if len(words) < 4 or words[-1] == 0:
    raise ValueError(f'found {len(words)} bytes of ANS words that no encoder ends in this way')
  words += bytes(-len(words) % 4)
  # integers of the coder may take up to 1 % and a few bits less than the ideal length
  most_codes = int((8 * len(words) * 1.01 + 64) / least_bits)
  if size > most_codes:
    raise ValueError(f'found codes for at most {most_codes} weights, expected {size}')
  return constriction.stream.stack.AnsCoder(np.frombuffer(words, '<u4').astype(np.uint32))


def words(coder: Coder) -> UInt32[np.ndarray, ' words']:
  """Returns the words of a coder, the last of them not 0."""
  return coder.get_compressed()


def from_words(words: UInt32[np.ndarray, ' words']) -> Coder:
  """Returns the coder with these words, the last of them not 0."""
  return constriction.stream.stack.AnsCoder(words)


def check_end(coder: Coder, codes: Int8[np.ndarray, '...'], head: bytes = b'') -> None:
  """Checks that nothing but the checksum of head and codes is left on a coder.

  Raises:
    ValueError: other words are.
  """
  found, expected = coder.get_compressed(), _first_word(codes, head)
  if found.tolist() != [expected]:
    raise ValueError(f'found ANS words {found[:3]} left over, expected checksum {expected} alone')


def room(shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """Returns an empty array for codes.

  Raises:
    ValueError: memory does not hold it.
  """
  try:
    return np.empty(shape, np.int8)
  except MemoryError as error:
    raise ValueError(f'found {math.prod(shape)} codes, expected as many as memory holds') from error


def _first_word(codes: Int8[np.ndarray, '...'], head: bytes) -> int:
  # bit 31 is set whatever the CRC: the state begins above 2**24 (see `begin`), and the word of an
  # empty message is not cut off
  return zlib.crc32(np.ascontiguousarray(codes).data, zlib.crc32(head)) | 1 << 31
