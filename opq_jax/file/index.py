"""The `.opq` format, and its index: the tree of a file as text, and back.

An `.opq` file is a valid safetensors file of four tensors, few because each costs 70 bytes of
header:

    grids         F32 [compressed leaves, 3]: threshold, first value and step of each
    index         U8: packed JSON, below
    codes         U8: the payloads of the compressed leaves, end to end
    uncompressed  U8: the bytes of the other leaves in C order, end to end, each at a multiple of
                  its item size; cut into blocks of 2**20 bytes, and every block packed

All numbers are little-endian.  `opq_jax.file.front` describes the header, `opq_jax.file.packing`
how index and blocks are packed, `opq_jax.coding.payload` the payloads, `opq_jax.file.grids` the
values of codes.  Leaves follow each other in the order of JAX: dicts by their sorted keys.

The index is one JSON object, ASCII, without spaces and with every key once:

    {"blocks": [bytes, CRC-32, bytes, CRC-32, ...],       of every packed block
     "metadata": {"the user's": "own strings"},
     "tree": {"params": {"conv": {"bias": "float32[16]", "kernel": "float32[3,3,3,16] 9 141"}}}}

In the tree an object is a dict (":3" is the key 3, "::a" the key ":a"), null is None, and an array
that begins with "list" or "tuple" is a list or a tuple of its other items.  A leaf is one string:

    dtype[shape]                  of an uncompressed leaf: float32[3,3,16], int64[] of a scalar
    dtype[shape] LEVELS BYTES     of a compressed leaf: cells a sign, bytes of its payload
    ... name=value name=value     fields of a compressed leaf may follow, sorted by name:

    escapes=COUNT,BYTES           COUNT weights are stored as they are, in the last BYTES of the
                                  payload, a section of `opq_jax.coding.escapes`; the bytes before
                                  it code the array with 0 in their places

    dtype[shape] same=N           a leaf that is the N-th of the tree again, counted from 0: an
    dtype[shape] transposed=N     earlier compressed leaf, in its own shape or transposed.  It has
                                  no payload and no row of grids

A reader refuses every other field: slices of a leaf, a palette, a scale an output channel and a
rotation will be fields too, once they are defined.  Names of dtypes are those of NumPy and
ml_dtypes.  A compressed leaf is of floats of 1, 2, 4 or 8 whole bytes that know 0.

Every byte is under a checksum: the header must be the one that its own sizes imply and holds the
CRC-32 of grids and index, the index holds those of the blocks, every payload ends in one of its
codes, and a section of escaped weights in its own.

The header says version 2 where a leaf has a field, or where a value first + k step, k < levels, is
not exact in float32.  All other files are of version 1, in which neither may be.
"""

import dataclasses
import json
import math
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from opq_jax.core.limits import MAX_LEVELS
from opq_jax.file.plain_trees import Node, check_names

MAX_INDEX = 1 << 22
"""Bytes of JSON, enough for 80,000 leaves."""


_SCALARS: tuple[type[np.generic], ...] = (
  *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
  *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
  *(t for t in vars(ml_dtypes).values() if isinstance(t, type) and issubclass(t, np.generic)),
)
"""Types of numbers that NumPy and ml_dtypes know."""

DTYPES = {np.dtype(scalar).name: np.dtype(scalar) for scalar in _SCALARS}
"""The dtypes that a leaf may have, by name."""

# numbers of at most 18 digits fit int64; ASCII, because `\d` would take the digits of all scripts
_LEAF = re.compile(
  r'(?P<dtype>\w+)\[(?P<shape>(\d{1,18}(,\d{1,18})*)?)\]'
  r'( (?P<levels>\d{1,3}) (?P<stored>\d{1,18}))?(?P<fields>( [a-z_]+=[^ ]+)*)',
  re.ASCII,
)
_NUMBER = re.compile(r'\d{1,18}', re.ASCII)
_TIES = ('same', 'transposed')  # fields of a leaf that is an earlier one again
_ESCAPES = re.compile(r'(\d{1,18}),(\d{1,18})', re.ASCII)


@dataclasses.dataclass(frozen=True)
class LeafEntry:
  """One leaf in the index.

  Attributes:
    dtype, shape: the leaf's own.
    levels: cells a sign; None where the leaf is not compressed.
    stored: bytes of its payload; of an uncompressed leaf, its own bytes.
    escapes: how many of its weights are escaped.
    escape_bytes: bytes of the section of escaped weights, at the end of the payload.
    begin: where its bytes begin in `codes`, or in the unpacked bytes of `uncompressed`.
    tied_to: of a leaf that is an earlier one again, the number of that leaf; None of all others.
      Once it is placed, its other numbers are those of that leaf.
    is_transposed: whether it is the transpose of that leaf.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  levels: int | None
  stored: int
  escapes: int = 0
  escape_bytes: int = 0
  begin: int = 0
  tied_to: int | None = None
  is_transposed: bool = False

  @property
  def coded_shape(self) -> tuple[int, ...]:
    """Shape of the array that the payload codes."""
    return self.shape[::-1] if self.is_transposed else self.shape


class Index(NamedTuple):
  """A parsed index.

  Attributes:
    tree: a plain tree with a `LeafEntry` at every leaf.
    blocks: bytes and CRC-32 of every packed block.
    metadata: of the user.
  """

  tree: Node
  blocks: list[tuple[int, int]]
  metadata: dict[str, str]


class Placed(NamedTuple):
  """Leaves, each in its place.

  Attributes:
    leaves: by path name, with `begin`.
    compressed: how many of them have a payload.
    codes_size: bytes of all payloads.
    uncompressed_size: bytes of all uncompressed leaves, unpacked.
  """

  leaves: dict[str, LeafEntry]
  compressed: int
  codes_size: int
  uncompressed_size: int


def spec(dtype: np.dtype, shape: tuple[int, ...]) -> str:
  """Returns the notation of an uncompressed leaf; that of every leaf begins so.

  >>> spec(np.dtype(np.float32), (3, 16))
  'float32[3,16]'
  """
  return f'{dtype.name}[{",".join(map(str, shape))}]'


def compressed_spec(
  dtype: np.dtype, shape: tuple[int, ...], levels: int, stored: int, escapes: int, escape_bytes: int
) -> str:
  """Returns the notation of a compressed leaf (see `LeafEntry`).

  >>> compressed_spec(np.dtype(np.float32), (3, 16), 9, 141, 2, 40)
  'float32[3,16] 9 141 escapes=2,40'
  """
  fields = f' escapes={escapes},{escape_bytes}' if escapes else ''
  return f'{spec(dtype, shape)} {levels} {stored}{fields}'


def tied_spec(dtype: np.dtype, shape: tuple[int, ...], number: int, is_transposed: bool) -> str:
  """Returns the notation of a leaf that is an earlier one again.

  >>> tied_spec(np.dtype(np.float32), (16, 3), 0, True)
  'float32[16,3] transposed=0'
  """
  return f'{spec(dtype, shape)} {_TIES[is_transposed]}={number}'


def can_be_compressed(dtype: np.dtype) -> bool:
  """Returns whether a compressed leaf may have this dtype: floats of whole bytes that know 0."""
  if dtype.kind == 'c':  # whose `finfo` is that of its parts
    return False
  try:
    info = ml_dtypes.finfo(dtype)
  except ValueError:  # not of floats
    return False
  # floats of 4 and 6 bits fill bytes only in part; float8_e8m0fnu has no mantissa, and no zero
  return bool(info.bits == 8 * dtype.itemsize and info.nmant > 0)


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
      return _parsed_leaf(node)
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
  match json.loads(text, object_pairs_hook=_unique):
    case {'blocks': list(numbers), 'metadata': dict(metadata), 'tree': node}:
      if all(type(n) is int and n >= 0 for n in numbers) and all(
        type(text) is str for text in metadata.values()
      ):
        blocks = list(zip(numbers[::2], numbers[1::2], strict=True))
        tree = from_json(node)
        check_names(tree)
        return Index(tree, blocks, metadata)
  raise ValueError(f'found {text[:80]!r}, expected blocks, metadata and tree')


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


def _parsed_leaf(text: str) -> LeafEntry:
  match = _LEAF.fullmatch(text)
  if match is None or match['dtype'] not in DTYPES:
    raise ValueError(f'found leaf {text[:80]!r}, expected dtype and shape, or levels and bytes too')
  dtype = DTYPES[match['dtype']]
  shape = tuple(int(n) for n in match['shape'].split(',') if n)
  # limits of NumPy, which multiplies all axes but those of 0 elements; sizes below fit int64
  if len(shape) > 64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 62:
    raise ValueError(f'found leaf {text[:80]!r}, expected a shape that an array can have')
  fields = _parsed_fields(match['fields'])
  ties = [name for name in fields if name in _TIES]
  if match['levels'] is None:
    if len(fields) > len(ties) or len(ties) > 1:
      raise ValueError(f'found leaf {text[:80]!r}, expected fields of compressed leaves only')
    if ties:
      if _NUMBER.fullmatch(fields[ties[0]]) is None:
        raise ValueError(f'found leaf {text[:80]!r}, expected {ties[0]}=NUMBER')
      number, is_transposed = int(fields[ties[0]]), ties[0] == 'transposed'
      return LeafEntry(dtype, shape, None, 0, tied_to=number, is_transposed=is_transposed)
    return LeafEntry(dtype, shape, None, math.prod(shape) * dtype.itemsize)
  if ties:
    raise ValueError(f'found leaf {text[:80]!r}, expected no payload of a leaf with {ties[0]}')
  levels, stored = int(match['levels']), int(match['stored'])
  if levels > MAX_LEVELS or not can_be_compressed(dtype):
    raise ValueError(
      f'found leaf {text[:80]!r}, expected floats of whole bytes, of at most {MAX_LEVELS} levels'
    )
  escapes = escape_bytes = 0
  if 'escapes' in fields:
    counts = _ESCAPES.fullmatch(fields['escapes'])
    escapes, escape_bytes = map(int, counts.groups()) if counts else (0, 0)
    if not (0 < escapes <= math.prod(shape) and 0 < escape_bytes <= stored):
      raise ValueError(f'found leaf {text[:80]!r}, expected escapes=COUNT,BYTES that it can have')
  return LeafEntry(dtype, shape, levels, stored, escapes, escape_bytes)


def _parsed_fields(text: str) -> dict[str, str]:
  """Returns the fields of an entry by name."""
  pairs = [field.split('=', 1) for field in text.split()]
  names = [name for name, _ in pairs]
  for name in names:
    # a field says what bytes mean: weights read without it would be wrong ones
    if name not in ('escapes', *_TIES):
      raise ValueError(
        f'found field {name}, which a newer opq_jax wrote, expected escapes, same or transposed'
      )
  if names != sorted(set(names)):
    raise ValueError(f'found fields {names}, expected every name once, in order')
  return dict(pairs)


def placed(leaves: dict[str, LeafEntry]) -> Placed:
  """Places the leaves end to end, uncompressed ones at multiples of their item size.

  Raises:
    ValueError: a leaf is not as the earlier one that it is said to be.
  """
  with_places: dict[str, LeafEntry] = {}
  compressed = codes_size = uncompressed_size = 0
  names = list(leaves)
  for number, (name, leaf) in enumerate(leaves.items()):
    if leaf.tied_to is not None:
      # an earlier leaf only: no leaf can be itself again by a detour
      first = with_places[names[leaf.tied_to]] if leaf.tied_to < number else None
      with_places[name] = _tied_entry(name, leaf, first)
      continue
    if leaf.levels is None:
      # aligned, so that the bytes of float32 numbers keep their period of 4 for `packing`
      begin = uncompressed_size + -uncompressed_size % leaf.dtype.itemsize
      uncompressed_size = begin + leaf.stored
    else:
      begin, compressed = codes_size, compressed + 1
      codes_size += leaf.stored
    with_places[name] = dataclasses.replace(leaf, begin=begin)
  return Placed(with_places, compressed, codes_size, uncompressed_size)


def _tied_entry(name: str, leaf: LeafEntry, first: LeafEntry | None) -> LeafEntry:
  """Returns the entry of a leaf that is an earlier one again, with the numbers of that one."""
  is_coded = first is not None and first.levels is not None and first.tied_to is None
  # transposing two axes alone: the reader has one rule for each field
  has_axes = not leaf.is_transposed or len(leaf.shape) == 2
  if first is None or not is_coded or not has_axes or first.shape != leaf.coded_shape:
    raise ValueError(
      f'{name}: found number {leaf.tied_to}, expected that of an earlier compressed leaf of shape '
      f'{leaf.coded_shape}'
    )
  if first.dtype != leaf.dtype:
    raise ValueError(f'{name}: found dtype {leaf.dtype}, expected {first.dtype}, of the leaf it is')
  return dataclasses.replace(
    first, shape=leaf.shape, tied_to=leaf.tied_to, is_transposed=leaf.is_transposed
  )
