"""The front of an `.opq` file: everything before the payloads, written and read.

header         that of safetensors (`opq_jax.file.container`)
grids          3 little-endian float32 for each compressed leaf, or each slice of it: threshold,
               first value, step
index          packed JSON (`opq_jax.file.index`)
"""

import itertools
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from opq_jax.core import plain_trees
from opq_jax.core.array_types import Float32
from opq_jax.core.trees import slice_name
from opq_jax.file import checks, container, packing, side_files
from opq_jax.file import index as file_index
from opq_jax.file.grids import Grid
from opq_jax.file.leaf_entries import LeafEntry
from opq_jax.file.side_files import SideFiles

# decoded bytes that a file may claim by default, where it passes both bounds
_ADMITTED_BYTES = 1 << 30
_ADMITTED_RATIO = 1000  # of the bytes of the file


class Block(NamedTuple):
  """A packed block of uncompressed leaves.

  Attributes:
    size: its bytes in the file.
    checksum: their CRC-32.
  """

  size: int
  checksum: int


class Front(NamedTuple):
  """The front of a file, checked.

  Attributes:
    tree: a plain tree with a `LeafEntry` at every leaf.
    leaves: the entries by path name, in the order of JAX, with their places.
    version: of the format.
    grid_rows: threshold, first value and step of every slice of the compressed leaves.
    metadata: of the user.
    codes_begin: where the payloads begin in the file.
    blocks: the packed blocks of uncompressed leaves.
    block_begins: where each begins in the file, and where the last one ends.
    uncompressed_size: bytes of all uncompressed leaves, unpacked.
    side_files: the carried files, None where there are none; they begin where the blocks end.
  """

  tree: plain_trees.Node
  leaves: dict[str, LeafEntry]
  version: str
  grid_rows: dict[str, Float32[np.ndarray, 'slices 3']]
  metadata: dict[str, str]
  codes_begin: int
  blocks: list[Block]
  block_begins: list[int]
  uncompressed_size: int
  side_files: SideFiles | None


def front_bytes(
  tree: plain_trees.Node,
  grids: list[list[np.float32]],
  codes_size: int,
  blocks: Sequence[tuple[int, int]],
  metadata: dict[str, str],
  version: str,
  carried: SideFiles | None = None,
) -> bytes:
  """Returns the front of a file.

  Args:
    tree: a plain tree with the notation of every leaf.
    grids: threshold, first value and step of each compressed leaf, or of each slice.
    codes_size: bytes of all payloads.
    blocks: bytes and checksum of every packed block.
    metadata: of the user.
    version: of the format; the largest that a leaf needs.
    carried: what the index says of side files, if there are any.

  Raises:
    ValueError: the index is larger than a reader would take.
  """
  content: dict[str, Any] = {'blocks': [number for block in blocks for number in block]}
  if carried is not None:
    content['files'], version = side_files.to_json(carried), max(version, side_files.VERSION)
  content |= {'metadata': metadata, 'tree': file_index.to_json(tree)}
  text = json.dumps(content, separators=(',', ':')).encode('ascii')
  if len(text) > file_index.MAX_INDEX:
    raise ValueError(
      f'found an index of {len(text)} bytes, expected at most {file_index.MAX_INDEX}'
    )
  index = packing.pack(text)
  table = np.array(grids, '<f4').tobytes()
  sizes = [len(grids), len(index), codes_size, sum(size for size, _ in blocks)]
  sizes += [] if carried is None else [carried.packed]
  return container.header(sizes, zlib.crc32(index, zlib.crc32(table)), version) + table + index


def read_front(file: BinaryIO, label: str, most_bytes: int | None) -> Front:
  """Reads and checks the front of a file, in time and memory that its own size bounds.

  Args:
    file: open, with a position that may be set.
    label: the name of the file in messages.
    most_bytes: bytes that the leaves may have, decoded; None for the default of `OpqFile`.

  Raises:
    ValueError: the file is none of a known version, damaged, or claims too many bytes.
  """
  version, (rows, *sizes), checksum, begin = container.read_header(file, label)
  # all sizes together are the file's own (`container.read_header`): no read takes more memory
  table = read_bytes(file, label, begin, container.GRID_BYTES * rows)
  packed_index = read_bytes(file, label, begin + len(table), sizes[0])
  codes_begin = begin + len(table) + sizes[0]
  blocks_begin, file_size = codes_begin + sizes[1], codes_begin + sum(sizes[1:])
  if (found := zlib.crc32(packed_index, zlib.crc32(table))) != checksum:
    raise ValueError(f'{label}: found CRC-32 {found:08x} of the index, not {checksum:08x}')
  # JSON of 4 MB may be nested deeper than Python's stack: a RecursionError
  try:
    index = file_index.parsed_index(packing.unpack(packed_index, file_index.MAX_INDEX))
    placed = file_index.placed(plain_trees.named_leaves(index.tree))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{label}: found an index that cannot be: {error}') from error
  blocks = [Block(*block) for block in index.blocks]
  block_begins = list(itertools.accumulate((b.size for b in blocks), initial=blocks_begin))
  for what, count, expected in (
    # the tree implies all sizes that the header states: nothing in a file is left over
    ('rows of grids', placed.rows, rows),
    ('bytes of codes', placed.codes_size, sizes[1]),
    ('blocks', len(blocks), -(-placed.uncompressed_size // packing.BLOCK)),
    ('bytes of blocks', block_begins[-1] - blocks_begin, sizes[2]),
    (
      'bytes of side files',
      index.side_files and index.side_files.packed,
      sizes[3] if len(sizes) > 3 else None,
    ),
  ):
    if count != expected:
      raise ValueError(f'{label}: found an index of {count} {what}, expected {expected}')
  _check_claim(label, placed.leaves, file_size, most_bytes)
  grid_rows = _read_grids(label, version, table, placed.leaves)
  return Front(
    index.tree,
    placed.leaves,
    version,
    grid_rows,
    index.metadata,
    codes_begin,
    blocks,
    block_begins,
    placed.uncompressed_size,
    index.side_files,
  )


def read_bytes(file: BinaryIO, label: str, begin: int, size: int) -> bytes:
  """Returns bytes of a file.

  Raises:
    ValueError: the file ends before.
  """
  file.seek(begin)
  data = file.read(size)
  if len(data) != size:
    raise ValueError(f'{label}: found {len(data)} bytes at {begin}, expected {size}')
  return data


def _check_claim(
  label: str, leaves: dict[str, LeafEntry], file_size: int, most_bytes: int | None
) -> None:
  """Checks that decoded leaves take no more memory than is admitted."""
  if most_bytes is None:
    most_bytes = max(_ADMITTED_BYTES, _ADMITTED_RATIO * file_size)
  # Python's integers: the products of hostile shapes do not wrap around
  claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
  if claimed > most_bytes:
    raise ValueError(
      f'{label}: found leaves of {claimed} bytes in {file_size}, expected at most {most_bytes}; a '
      'greater most_bytes admits them'
    )


def _read_grids(
  label: str, version: str, table: bytes, leaves: dict[str, LeafEntry]
) -> dict[str, Float32[np.ndarray, 'slices 3']]:
  """Returns the rows of all compressed leaves; those of leaves without slices are checked."""
  rows, begin = np.frombuffer(table, '<f4').astype(np.float32).reshape(-1, 3), 0
  own: dict[str, Float32[np.ndarray, 'slices 3']] = {}
  names = list(leaves)
  for name, leaf in leaves.items():
    fields = {
      'slices': leaf.slices,
      'axes': leaf.axes,
      'rotated': leaf.rotated_axis is not None,
      'scales': leaf.scale_axis is not None,
      'escapes': leaf.has_escapes,
    }
    if version == '1' and (leaf.tied_to is not None or any(fields.values())):
      field = next((field for field, is_used in fields.items() if is_used), '')
      if leaf.tied_to is not None:
        field = 'a leaf that is an earlier one again'
      raise ValueError(f'{label}: {name}: found {field}, expected none in version 1')
    if leaf.table is None:
      continue
    if leaf.tied_to is not None:
      own[name] = own[names[leaf.tied_to]]
      continue
    own[name] = rows[begin : begin + leaf.rows]
    begin += leaf.rows
    if not leaf.slices:
      grids_of(f'{label}: {name}', leaf, own[name], version)
  return own


def grids_of(
  name: str, leaf: LeafEntry, rows: Float32[np.ndarray, 'slices 3'], version: str
) -> tuple[Grid, ...]:
  """Returns the grids of a compressed leaf in the C order of its slices, checked.

  Raises:
    ValueError: one of them has no cells or values (`opq_jax.file.checks.check_grid`).
  """
  grids = []
  each = zip(np.ndindex(leaf.slice_shape), rows, leaf.parts(), strict=True)
  for index, (threshold, first, step), part in each:
    grid = Grid(threshold, first, step, part.levels, leaf.grid_dtype)
    checks.check_grid(slice_name(name, index), grid, version)
    grids.append(grid)
  return tuple(grids)
