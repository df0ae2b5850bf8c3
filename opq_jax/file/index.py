"""The `.opq` format, and its index: the tree of a file as text, and back.

An `.opq` file is a valid safetensors file of four tensors, few because each costs 70 bytes of
header:

    grids         F32 [rows, 3]: threshold, first value and step of each compressed leaf, or of
                  each slice of it
    index         U8: packed JSON, below
    codes         U8: the payloads of the compressed leaves, end to end
    uncompressed  U8: the bytes of the other leaves in C order, end to end, each at a multiple of
                  its item size; cut into blocks of 2**20 bytes, and every block packed

and, where it carries other files (`opq_jax.file.side_files`), a fifth:

    files         U8: these files end to end, sorted by name, packed together

All numbers are little-endian.  `opq_jax.file.container` describes the header,
`opq_jax.file.packing` how index and blocks are packed, `opq_jax.coding.payload` the payloads,
`opq_jax.file.grids` the values of codes.  Leaves follow each other in the order of JAX: dicts by
their sorted keys.

The index is one JSON object, ASCII, without spaces and with every key once:

    {"blocks": [bytes, CRC-32, bytes, CRC-32, ...],       of every packed block
     "files": [bytes, CRC-32, {"config.json": 452}],      packed, and the sizes of carried files
     "metadata": {"the user's": "own strings"},
     "tree": {"params": {"conv": {"bias": "float32[16]", "kernel": "float32[3,3,3,16] 9 141"}}}}

In the tree an object is a dict (":3" is the key 3, "::a" the key ":a"), null is None, and an array
that begins with "list" or "tuple" is a list or a tuple of its other items.  A leaf is one string:

    dtype[shape]                  of an uncompressed leaf: float32[3,3,16], int64[] of a scalar
    dtype[shape] LEVELS BYTES     of a compressed leaf: cells a sign, bytes of its payload
    ... name=value name=value     fields of a compressed leaf may follow, sorted by name:

    axes=1,0                      the payload codes the leaf with its axes in this order, counted
                                  from 0; of a leaf with slices, each slice
    escapes=COUNT,BYTES           COUNT weights are stored as they are, in the last BYTES of the
                                  payload, a section of `opq_jax.coding.escapes`; the bytes before
                                  it code the array with 0 in their places
    rotated=AXIS                  the codes are those of the leaf with its inputs along this axis,
                                  counted as in axes, rotated (`opq_jax.coding.rotations`)
    scales=AXIS,BYTES             outputs along this axis, counted as in axes, have scales, in the
                                  first BYTES of the payload, a section of
                                  `opq_jax.coding.output_scales`
    slices=N                      the first N axes count slices, each an array of its own with a row
                                  of grids and a payload, end to end in C order.  LEVELS, BYTES,
                                  the pair COUNT,BYTES of escapes (0,0 of a slice without any) and
                                  the BYTES of scales are those of the first slice, and those of the
                                  others follow, each after a comma:
                                  float32[2,8,8] 9,7 99,80 escapes=1,20,0,0 slices=1

    dtype[shape] same=N           a leaf that is the N-th of the tree again, counted from 0: an
    dtype[shape] transposed=N     earlier leaf, or the transpose of a compressed one.  It has no
                                  payload, no row of grids and no uncompressed bytes; a transpose
                                  has no slices

A reader refuses every other field: a palette will be one too, once it is defined.  Names of dtypes
are those of NumPy and ml_dtypes, of which the format has the ones in `leaf_entries.DTYPES`.  A
compressed leaf is of floats of 1, 2, 4 or 8 whole bytes that know 0.

Every byte is under a checksum: the header must be the one that its own sizes imply and holds the
CRC-32 of grids and index, the index holds those of the blocks and of the carried files, every
payload ends in one of its codes, and a section of escaped weights in its own.

The header says version 2 where a leaf has a field, or where a value first + k step, k < levels, is
not exact in float32, and version 3 where it carries other files.  All other files are of version 1,
in which neither may be.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from opq_jax.core.plain_trees import Node, check_names
from opq_jax.file import side_files
from opq_jax.file.leaf_entries import LeafEntry, parsed_leaf

MAX_INDEX = 1 << 22
"""Bytes of JSON, enough for 80,000 leaves."""


class Index(NamedTuple):
  """A parsed index.

  Attributes:
    tree: a plain tree with a `LeafEntry` at every leaf.
    blocks: bytes and CRC-32 of every packed block.
    metadata: of the user.
    side_files: the carried files, None where there are none.
  """

  tree: Node
  blocks: list[tuple[int, int]]
  metadata: dict[str, str]
  side_files: side_files.SideFiles | None


class Placed(NamedTuple):
  """Leaves, each in its place.

  Attributes:
    leaves: by path name, with `begin`.
    rows: slices of compressed leaves with a payload, and such leaves without slices.
    codes_size: bytes of all payloads.
    uncompressed_size: bytes of all uncompressed leaves, unpacked.
  """

  leaves: dict[str, LeafEntry]
  rows: int
  codes_size: int
  uncompressed_size: int


def to_json(node: Node) -> Any:
  """Returns the JSON of a plain tree of strings."""
  if isinstance(node, list | tuple):
    return [type(node).__name__, *map(to_json, node)]
  if isinstance(node, dict):
    marked = lambda key: f':{key}' if type(key) is int or key.startswith(':') else key
    return {marked(key): to_json(child) for key, child in node.items()}
  return node


def from_json(node: Any) -> Node:
  """Returns the plain tree of JSON, with a `LeafEntry` at every leaf.

  Raises:
    ValueError: a container, a key or a leaf is not in the notation of the index.
  """
  match node:
    case None:
      return None
    case str():
      return parsed_leaf(node)
    case ['list', *children]:
      return [from_json(child) for child in children]
    case ['tuple', *children]:
      return tuple(from_json(child) for child in children)
    case dict():
      return {_parsed_key(key): from_json(child) for key, child in node.items()}
  raise ValueError(f'found {str(node)[:80]!r} in the tree, expected a container or a leaf')


def parsed_index(text: bytes) -> Index:
  """Parses the JSON of an index.

  Raises:
    ValueError: the text is no index, or its names are longer or deeper than a reader takes.
  """
  # bytes would be taken in other encodings too
  content = json.loads(text.decode('ascii'), object_pairs_hook=_unique)
  match content:
    case {'blocks': list(numbers), 'metadata': dict(metadata), 'tree': node, **others}:
      # a key that a newer version may define says what bytes mean
      if (
        others.keys() <= {'files'}
        and all(type(n) is int and n >= 0 for n in numbers)
        and all(type(text) is str for text in metadata.values())
      ):
        blocks = list(zip(numbers[::2], numbers[1::2], strict=True))
        tree = from_json(node)
        check_names(tree)
        carried = side_files.from_json(others['files']) if others else None
        return Index(tree, blocks, metadata, carried)
  raise ValueError(f'found {text[:80]!r}, expected blocks, metadata, tree, and files at most')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  # of two equal keys Python keeps the last and other parsers the first: two readers, two networks
  content = dict(pairs)
  if len(content) != len(pairs):
    raise ValueError(f'found keys {[key for key, _ in pairs][:10]}, expected every key once')
  return content


def _parsed_key(text: str) -> str | int:
  if text.startswith('::') or not text.startswith(':'):
    return text.removeprefix(':')
  # `int` takes signs, spaces, underscores and leading zeros too: two keys could mean one number
  if f':{int(text[1:])}' != text:
    raise ValueError(f'found key {text!r}, expected a plain number after the colon')
  return int(text[1:])


def placed(leaves: dict[str, LeafEntry]) -> Placed:
  """Places the leaves end to end, uncompressed ones at multiples of their item size.

  Raises:
    ValueError: a leaf is not as the earlier one that it is said to be.
  """
  with_places: dict[str, LeafEntry] = {}
  rows = codes_size = uncompressed_size = 0
  names = list(leaves)
  for number, (name, leaf) in enumerate(leaves.items()):
    if leaf.tied_to is not None:
      # an earlier leaf only: no leaf can be itself again by a detour
      first = with_places[names[leaf.tied_to]] if leaf.tied_to < number else None
      with_places[name] = _tied_entry(name, leaf, first)
      continue
    if leaf.table is None:
      # aligned, so that the bytes of float32 numbers keep their period of 4 for `packing`
      begin = uncompressed_size + -uncompressed_size % leaf.dtype.itemsize
      uncompressed_size = begin + leaf.stored
    else:
      begin, rows = codes_size, rows + leaf.rows
      codes_size += leaf.stored
    with_places[name] = dataclasses.replace(leaf, begin=begin)
  return Placed(with_places, rows, codes_size, uncompressed_size)


def _tied_entry(name: str, leaf: LeafEntry, first: LeafEntry | None) -> LeafEntry:
  """Returns the entry of a leaf that is an earlier one again, with the numbers of that one."""
  shape = leaf.shape[::-1] if leaf.is_transposed else leaf.shape
  if first is None or first.tied_to is not None or first.shape != shape:
    raise ValueError(
      f'{name}: found number {leaf.tied_to}, expected that of an earlier leaf of shape {shape} '
      'that is stored itself'
    )
  # transposing two axes alone: the reader has one rule for each field
  if leaf.is_transposed and (len(leaf.shape) != 2 or first.slices or first.table is None):
    raise ValueError(
      f'{name}: found transposed, expected it of a compressed leaf of two axes without slices'
    )
  if first.dtype != leaf.dtype:
    raise ValueError(f'{name}: found dtype {leaf.dtype}, expected {first.dtype}, of the leaf it is')
  axes, scale_axis, rotated_axis = first.axes, first.scale_axis, first.rotated_axis
  if leaf.is_transposed:
    axes = () if axes else (1, 0)
    scale_axis = None if scale_axis is None else 1 - scale_axis
    rotated_axis = None if rotated_axis is None else 1 - rotated_axis
  return dataclasses.replace(
    first,
    shape=leaf.shape,
    axes=axes,
    scale_axis=scale_axis,
    rotated_axis=rotated_axis,
    tied_to=leaf.tied_to,
    is_transposed=leaf.is_transposed,
  )
