"""LZMA of the parts of a file that are not codes: uncompressed leaves, index, side files.

The data are raw LZMA1 streams (no container, with an end mark).  The streams of leaves and index
have the parameters dict_size = 2**20, lc = 0, lp = log2(period), pb = 0: literals are predicted by
their place in the period alone.  Of float32 numbers, period 4, sign and exponent then have
statistics of their own, which repeat.
"""

import lzma

BLOCK = 1 << 20
"""Bytes of uncompressed leaves that are packed, checked and read together."""

FLOAT_PERIOD = 4
"""The period of blocks of uncompressed leaves, most of which are of float32."""


TEXT_WINDOW = 1 << 23
"""Bytes that a stream of text looks back: a tokenizer's files repeat each other's vocabulary."""

_TEXT = {'id': lzma.FILTER_LZMA1, 'dict_size': TEXT_WINDOW, 'lc': 4, 'lp': 0, 'pb': 0}


def pack(data: bytes | bytearray, period: int = 1) -> bytes:
  """Returns data as an LZMA stream.

  >>> packed = pack(bytes(1000))
  >>> len(packed) < 30, unpack(packed, 1000) == bytes(1000)
  (True, True)
  """
  return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(period))


def unpack(data: bytes, most: int, period: int = 1) -> bytes:
  """Returns the data of an LZMA stream, of at most `most` bytes.

  A small stream may expand without bound; no more than `most` + 1 bytes are ever made.

  Raises:
    ValueError: the stream is damaged, or does not end within `most` bytes.
  """
  return _unpacked(data, most, _filters(period))


def pack_text(data: bytes) -> bytes:
  """Returns text as an LZMA stream: literals are predicted by the byte before (`lc` = 4)."""
  return lzma.compress(data, format=lzma.FORMAT_RAW, filters=[_TEXT])


def unpack_text(data: bytes, most: int) -> bytes:
  """Returns the text of a stream of `pack_text`, of at most `most` bytes.

  Raises:
    ValueError: as `unpack`.
  """
  return _unpacked(data, most, [_TEXT])


def _unpacked(data: bytes, most: int, filters: list[dict[str, int]]) -> bytes:
  decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
  try:
    unpacked = decompressor.decompress(data, most + 1)
  except lzma.LZMAError as error:
    raise ValueError(f'found damaged LZMA data: {error}') from error
  if len(unpacked) > most or not decompressor.eof or decompressor.unused_data:
    raise ValueError(f'found LZMA data that do not end within {most} bytes')
  return unpacked


def _filters(period: int) -> list[dict[str, int]]:
  # a block is no longer than the dictionary, so no match in it is out of reach; a larger dictionary
  # would be memory that a reader has to take
  place_bits = period.bit_length() - 1
  return [{'id': lzma.FILTER_LZMA1, 'dict_size': BLOCK, 'lc': 0, 'lp': place_bits, 'pb': 0}]
