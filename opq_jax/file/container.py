"""The header of an `.opq` file, which is a safetensors file of a few tensors.

    u64            length of the header in bytes, little-endian
    header         JSON without spaces, then spaces up to a multiple of 8 bytes

There is one header of its kind alone: a reader builds the header that the sizes, the version and
the checksum in it imply, and refuses any other text.  Its `crc32` is the CRC-32 of grids and index.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from opq_jax.file import side_files

VERSIONS = ('1', '2', side_files.VERSION)
"""Versions of the format that a reader takes."""

TENSORS = ('grids', 'index', 'codes', 'uncompressed')
"""Names of the four safetensors tensors, in their order in the file."""

SIDE_FILES = 'files'
"""Name of a fifth tensor, of a file that carries others (`opq_jax.file.side_files`)."""

GRID_BYTES = 12
"""Bytes of one row of grids."""

MAX_HEADER = 1 << 12
"""Bytes of a header that are read; one has some 350."""


class Header(NamedTuple):
  """A parsed header.

  Attributes:
    version: of the format.
    sizes: of the tensors: rows of grids, bytes of the others.
    checksum: of grids and index.
    size: bytes of the header, with its length.
  """

  version: str
  sizes: tuple[int, ...]
  checksum: int
  size: int


def header(sizes: Sequence[int], checksum: int, version: str) -> bytes:
  """Returns the header of a file, with its length.

  Args:
    sizes: rows of grids, and bytes of the index, the codes and the packed uncompressed leaves; and
      those of packed side files where there are some.
    checksum: CRC-32 of grids and index.
    version: of the format.
  """
  about = {'format': 'opq', 'version': version, 'crc32': f'{checksum:08x}'}
  content: dict[str, Any] = {'__metadata__': about}
  begin = 0
  for name, size in zip((*TENSORS, SIDE_FILES)[: len(sizes)], sizes, strict=True):
    dtype, shape, end = 'U8', [size], begin + size
    if name == 'grids':
      dtype, shape, end = 'F32', [size, 3], begin + GRID_BYTES * size
    content[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}
    begin = end
  text = json.dumps(content, separators=(',', ':')).encode('ascii')
  # as safetensors pads: the tensor of grids then begins at a multiple of its item size
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def read_header(file: BinaryIO, label: str) -> Header:
  """Reads the header of a file.

  Raises:
    ValueError: this is no file of a known version, or not as long as its header says.
  """
  file_size = file.seek(0, os.SEEK_END)
  file.seek(0)
  length = int.from_bytes(file.read(8), 'little')
  # a length of 2**63 must not be believed; what is cut off here is no JSON, or not the header that
  # is expected below
  text = file.read(min(length, MAX_HEADER))
  try:
    content = json.loads(text)
    about = content['__metadata__']
    if about['format'] != 'opq':
      raise ValueError(f'found format {about["format"]!r}, expected opq')
    version = about['version']
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f'{label}: found no .opq file: {error!r}') from error
  if version not in VERSIONS:
    raise ValueError(f'{label}: found version {version!r}, expected one of {VERSIONS}')
  try:
    names: tuple[str, ...] = TENSORS
    # the index of such a file has side files too, and the sizes of both are compared
    has_files = version >= side_files.VERSION
    if has_files != (SIDE_FILES in content):
      # no checksum covers the version: one flipped bit makes a 3 of a 2
      raise ValueError(
        f'found version {version} {"without" if has_files else "with"} {SIDE_FILES}, expected '
        f'files in version {side_files.VERSION} alone'
      )
    if has_files:
      names = (*TENSORS, SIDE_FILES)
    sizes = tuple(content[name]['shape'][0] for name in names)
    # `true` would pass as an int
    if not all(type(size) is int and size >= 0 for size in sizes):
      raise ValueError(f'found sizes {sizes}')
    checksum = int(about['crc32'], 16)
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise ValueError(f'{label}: found a damaged header: {error!r}') from error
  # one header for given sizes: JSON of other spacing, order or repeated keys, which readers
  # understand differently, cannot hide here
  expected = header(sizes, checksum, version)
  if length.to_bytes(8, 'little') + text != expected:
    raise ValueError(f'{label}: found header {text!r}, expected {expected[8:]!r}')
  if file_size != (expected_size := len(expected) + GRID_BYTES * sizes[0] + sum(sizes[1:])):
    raise ValueError(f'{label}: found {file_size} bytes, expected {expected_size}')
  return Header(version, sizes, checksum, len(expected))
