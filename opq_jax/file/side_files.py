"""Files that an `.opq` file carries beside the leaves: a model's config, its tokenizer.

They lie end to end in one LZMA stream, sorted by name, so that what two of them share is stored
once.  The index names each with its size; their names are relative paths with '/' between parts.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from opq_jax.file import packing

VERSION = '3'
"""The least version of a file that carries others."""

MAX_BYTES = 1 << 28
"""Bytes of all carried files together, unpacked."""

# what no file system takes for a name within a folder: parents, roots, drives, control characters
_NAME = re.compile(
  r'(?!\.{1,2}(/|$))[^/\\:\x00-\x1f]{1,255}(/(?!\.{1,2}(/|$))[^/\\:\x00-\x1f]{1,255})*'
)
_MAX_NAME = 1024  # characters


class SideFiles(NamedTuple):
  """The carried files of an index.

  Attributes:
    packed: bytes of the stream.
    checksum: their CRC-32.
    sizes: bytes of every file, by name.
  """

  packed: int
  checksum: int
  sizes: dict[str, int]


def is_name(name: str) -> bool:
  """Returns whether a side file may have a name.

  >>> is_name('1_Pooling/config.json'), is_name('../config.json')
  (True, False)
  """
  return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def packed_files(files: Mapping[str, bytes]) -> tuple[SideFiles, bytes]:
  """Returns what the index says of files, and their stream.

  Raises:
    ValueError: a name is no relative path in plain form, or the files are too large.

  >>> entry, data = packed_files({'config.json': b'{}', 'a/b.txt': b'text'})
  >>> entry.sizes, unpacked_files(entry, data)['config.json']
  ({'a/b.txt': 4, 'config.json': 2}, b'{}')
  """
  sizes = {name: len(files[name]) for name in sorted(files)}
  _check(sizes)
  data = packing.pack_text(b''.join(files[name] for name in sizes))
  return SideFiles(len(data), zlib.crc32(data), sizes), data


def unpacked_files(entry: SideFiles, data: bytes) -> dict[str, bytes]:
  """Returns the files of a stream.

  Raises:
    ValueError: the stream is damaged.
  """
  if (found := zlib.crc32(data)) != entry.checksum:
    raise ValueError(f'side files: found CRC-32 {found:08x}, expected {entry.checksum:08x}')
  total = sum(entry.sizes.values())
  content = packing.unpack_text(data, total)
  if len(content) != total:
    raise ValueError(f'side files: found {len(content)} bytes, expected {total}')
  files, begin = {}, 0
  for name, size in entry.sizes.items():
    files[name] = content[begin : begin + size]
    begin += size
  return files


def to_json(entry: SideFiles) -> list[Any]:
  """Returns the JSON of an index's entry."""
  return list(entry)


def from_json(node: Any) -> SideFiles:
  """Returns the entry of JSON.

  Raises:
    ValueError: the JSON is no such entry, or a name or a size is not allowed.
  """
  match node:
    case [int(packed), int(checksum), dict(sizes)] if sizes:
      numbers = [packed, checksum, *sizes.values()]
      if all(type(n) is int and n >= 0 for n in numbers):
        _check(sizes)
        return SideFiles(packed, checksum, sizes)
  raise ValueError(f'found side files {str(node)[:80]!r}, expected bytes, CRC-32, sizes by name')


def _check(sizes: Mapping[str, int]) -> None:
  for name in sizes:
    if not is_name(name):
      raise ValueError(f'found a side file {name[:80]!r}, expected a relative path, parts by /')
  if [*sizes] != sorted(sizes):
    raise ValueError(f'found side files {[*sizes][:10]}, expected them sorted by name')
  # no file is a folder of another; 'A' and 'a' are one file on some systems
  folded = {name.casefold() for name in sizes}
  for name in _folders(folded):
    if name in folded:
      raise ValueError(
        f'found a side file {name[:80]!r} that is a folder too, expected one of both'
      )
  if len(folded) < len(sizes):
    raise ValueError('found names of side files that differ in case alone, expected one of each')
  if (total := sum(sizes.values())) > MAX_BYTES:
    raise ValueError(f'found side files of {total} bytes, expected at most {MAX_BYTES}')


def _folders(names: Iterable[str]) -> set[str]:
  """Returns the folders of paths, and the folders of these."""
  folders: set[str] = set()
  for name in names:
    parts = name.split('/')
    folders.update('/'.join(parts[:depth]) for depth in range(1, len(parts)))
  return folders
