"""Core ML's files of weights: blobs behind each other, each with 64 bytes that describe it.

    bytes        content
    64           header: number of blobs (uint32), version 2 (uint32), zeros
    64           of each blob, at a multiple of 64: 0xDEADBEEF (uint32), kind (uint32), bytes of its
                 data, their place in the file, bits without use in their last byte (uint64 each),
                 zeros
    any          its data: little-endian; numbers of fewer than 8 bits follow each other without
                 gaps, lowest bits first

An ML program names a blob by the place of its description.  The format is that of
`mlmodel/src/MILBlob/Blob/StorageFormat.hpp` of coremltools.
"""

import hashlib
import os
import struct
from typing import BinaryIO, NamedTuple

import numpy as np

from opq_jax.core.array_types import UInt8

_HEADER = struct.Struct('<II56x')
_DESCRIPTION = struct.Struct('<IIQQQ32x')
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_ALIGNMENT = 64
_CHUNK = 1 << 20  # numbers that are packed at once: whole bytes of any width

KINDS = {
  'FLOAT16': 1,
  'FLOAT32': 2,
  'UINT8': 3,
  'INT8': 4,
  'INT16': 6,
  'UINT16': 7,
  'UINT1': 9,
  'UINT2': 10,
  'UINT4': 11,
  'UINT3': 12,
  'UINT6': 13,
  'INT32': 14,
  'UINT32': 15,
}
"""The kind of a blob, by the name that a program has for the type of its numbers."""


class Blob(NamedTuple):
  """Numbers of a file.

  Attributes:
    kind: one of `KINDS`, or another one of a later version.
    data: their bytes.
    unused: bits without use in the last byte.
  """

  kind: int
  data: UInt8[np.ndarray, ' bytes']
  unused: int = 0


def packed(numbers: UInt8[np.ndarray, ' n'], bits: int) -> Blob:
  """Returns the blob of numbers of 1, 2, 3, 4, 6 or 8 bits.

  >>> packed(np.uint8([1, 2, 3]), 3).data.tolist()  # 0b011_010_001
  [209, 0]
  """
  kind, unused = KINDS[f'UINT{bits}'], -numbers.size * bits % 8
  if bits == 8:
    return Blob(kind, np.ascontiguousarray(numbers))
  places = np.arange(bits, dtype=np.uint8)
  parts = [
    np.packbits((numbers[start : start + _CHUNK, None] >> places) & 1, bitorder='little')
    for start in range(0, numbers.size, _CHUNK)
  ]
  return Blob(kind, np.concatenate([np.zeros(0, np.uint8), *parts]), unused)


class BlobReader:
  """Reads the blobs of a file, which stays on disk.

  Raises:
    ValueError: this is no such file.
    OSError: it cannot be read.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path = os.fspath(path)
    self._data = np.memmap(path, np.uint8, 'r') if os.path.getsize(path) else np.zeros(0, np.uint8)
    if self._data.size < _HEADER.size:
      raise ValueError(f'{self._path}: found {self._data.size} bytes, expected {_HEADER.size}')
    _, version = _HEADER.unpack(self._data[: _HEADER.size].tobytes())
    if version != _VERSION:
      raise ValueError(f'{self._path}: found version {version}, expected {_VERSION}')

  def blob(self, place: int) -> Blob:
    """Returns the blob that is described at this place.

    Raises:
      ValueError: no blob is there, or the file ends within.
    """
    description = self._data[place : place + _DESCRIPTION.size].tobytes()
    if len(description) < _DESCRIPTION.size:
      raise ValueError(f'{self._path}: found no blob at byte {place}, expected one')
    sentinel, kind, size, begin, unused = _DESCRIPTION.unpack(description)
    if sentinel != _SENTINEL:
      raise ValueError(
        f'{self._path}: found {sentinel:#x} at byte {place}, expected {_SENTINEL:#x}'
      )
    if begin + size > self._data.size:
      raise ValueError(
        f'{self._path}: found a blob up to byte {begin + size}, expected at most {self._data.size}'
      )
    return Blob(kind, self._data[begin : begin + size], unused)


class BlobWriter:
  """Writes blobs to a file, the same ones once.

  Attributes:
    size: bytes written so far.
  """

  def __init__(self, file: BinaryIO):
    self._file = file
    self._places: dict[bytes, int] = {}
    self.size = file.write(_HEADER.pack(0, _VERSION))

  def add(self, blob: Blob) -> int:
    """Writes a blob, unless the file has it already; returns the place of its description."""
    content = hashlib.sha256(np.ascontiguousarray(blob.data).data).digest()
    key = content + bytes([blob.kind, blob.unused])
    if key not in self._places:
      self.size += self._file.write(bytes(-self.size % _ALIGNMENT))
      begin = self.size + _DESCRIPTION.size
      self._places[key] = self.size
      self.size += self._file.write(
        _DESCRIPTION.pack(_SENTINEL, blob.kind, blob.data.size, begin, blob.unused)
      )
      self.size += self._file.write(np.ascontiguousarray(blob.data).data)
    return self._places[key]

  def finish(self) -> None:
    """Writes the number of blobs."""
    self._file.seek(0)
    self._file.write(_HEADER.pack(len(self._places), _VERSION))


def bytes_of(blob: Blob) -> int:
  """Returns the bytes that a blob takes in a file, at most.

  >>> bytes_of(packed(np.zeros(100, np.uint8), 1))
  128
  """
  return _DESCRIPTION.size + blob.data.size + -blob.data.size % _ALIGNMENT
