"""The `.opq` format, and its header and index: where every leaf lies, as text and back.

The file is a valid safetensors file of four tensors, few because each costs 70 bytes of header:

    grids         F32 [compressed leaves, 3]: threshold, first value and step of each
    index         U8, LZMA of JSON: the tree, below
    codes         U8: a payload of `opq_jax.coding.payload` for every compressed leaf, of two kinds
    uncompressed  U8: the bytes of the other leaves, end to end, each at a multiple of its item
                  size; cut into blocks of 1 MiB, each block LZMA

    {"tree": {"params": {"conv": {"bias": "float32[16]", "kernel": "float32[3,3,3,16] 9 141"}}},
     "blocks": [bytes, CRC-32, ...], "metadata": {"the user's": "own"}}

A leaf is one string: dtype, shape, and where it is compressed its levels and the bytes of its
payload.  Named fields may follow, sorted by name, each a space and `name=value` without spaces:

    escapes=COUNT,BYTES   so many weights are stored as they are, in the last BYTES of the payload,
                          a section of `opq_jax.coding.escapes`; the bytes before it code the array
                          with 0 in their places

A reader refuses every other name: slices of a leaf, a leaf that equals another one, a palette, a
scale an output channel and a rotation will be fields too, once they are defined.  A compressed leaf
is of floats of whole bytes that know 0.

An object is a dict (":3" is the key 3, "::a" the key ":a"), null is None, and a list that begins
with "list" or "tuple" is that.  Leaves follow each other in the order of JAX.

Every byte is under a checksum: the header must be the one that its own sizes imply and holds the
CRC-32 of grids and index, the index holds those of the blocks, every payload ends in one of its
codes, and a section of escaped weights in its own.  LZMA takes 14 to 19 % off float32 biases and
BatchNorm statistics, whose exponents repeat; at 2 bits per weight they are a fifth of the file of a
MobileNet-V2.

The value of cell k is first + k step in float32, where k step never rounds, and the values of all
levels rise.  In the leaf's dtype it is the nearest number in its own cell (`opq_jax.file.grids`).

The header says version 2 where a leaf has a field, or first + k step rounds for a k below its
levels.  All other files are of version 1, in which neither may be.
"""

import dataclasses
import json
import lzma
import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from opq_jax.core.limits import MAX_LEVELS

Node = Any
"""A tree of dicts, lists, tuples and None alone, which no JAX is needed to walk."""

VERSIONS = ('1', '2')

TENSORS = ('grids', 'index', 'codes', 'uncompressed')
BLOCK = 1 << 20  # bytes of uncompressed leaves that are packed, checked and read together
MAX_HEADER = 1 << 12  # bytes; a header has some 350
MAX_INDEX = 1 << 22  # bytes of JSON, enough for 80,000 leaves
MAX_NAMES = 1 << 24  # characters of all path names, which a key above many leaves multiplies
MAX_DEPTH = 100  # containers in containers, well within Python's own bound

_SCALARS: tuple[type[np.generic], ...] = (
  *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
  *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
  *(t for t in vars(ml_dtypes).values() if isinstance(t, type) and issubclass(t, np.generic)),
)
DTYPES = {np.dtype(scalar).name: np.dtype(scalar) for scalar in _SCALARS}

_LEAF = re.compile(
  r'(?P<dtype>\w+)\[(?P<shape>(\d{1,18}(,\d{1,18})*)?)\]'
  r'( (?P<levels>\d{1,3}) (?P<stored>\d{1,18}))?(?P<fields>( [a-z_]+=[^ ]+)*)',
  re.ASCII,
)
_ESCAPES = re.compile(r'(\d{1,18}),(\d{1,18})', re.ASCII)


@dataclasses.dataclass(frozen=True)
class LeafEntry:
  """What the index says of one leaf.

  Attributes:
    dtype, shape: the leaf's own.
    levels: cells a sign; None where the leaf is not compressed.
    stored: the bytes of its payload; uncompressed, its own bytes.
    escapes: how many of its weights are escaped.
    escape_bytes: the bytes of these, at the end of the payload.
    begin: where these begin among all payloads, or among the bytes of all uncompressed leaves.
    row: its row of `grids`.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  levels: int | None
  stored: int
  escapes: int = 0
  escape_bytes: int = 0
  begin: int = 0
  row: int = 0


def header(sizes: tuple[int, ...], checksum: int, version: str) -> bytes:
  """safetensors' header: its length as 8 bytes, JSON, and spaces up to a multiple of 8."""
  about = {'format': 'opq', 'version': version, 'crc32': f'{checksum:08x}'}
  header: dict[str, Any] = {'__metadata__': about}
  begin = 0
  for name, size in zip(TENSORS, sizes, strict=True):
    dtype, shape, end = 'U8', [size], begin + size
    if name == 'grids':
      dtype, shape, end = 'F32', [size, 3], begin + 12 * size
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}
    begin = end
  text = json.dumps(header, separators=(',', ':')).encode('ascii')
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def pack(data: bytes | bytearray, period: int = 1) -> bytes:
  return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_lzma(period))


def unpack(data: bytes, most: int, period: int = 1) -> bytes:
  """What was packed, if that is no more than `most` bytes: nothing small unpacks to fill memory."""
  decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma(period))
  try:
    unpacked = decompressor.decompress(data, most + 1)
  except lzma.LZMAError as error:
    raise ValueError(f'found damaged LZMA data: {error}') from error
  if len(unpacked) > most or not decompressor.eof or decompressor.unused_data:
    raise ValueError(f'found LZMA data that do not end within {most} bytes')
  return unpacked


def _lzma(period: int) -> list[dict[str, int]]:
  """LZMA that knows nothing of a byte but its place in a period: 4 suits the bytes of float32."""
  place = period.bit_length() - 1
  return [{'id': lzma.FILTER_LZMA1, 'dict_size': BLOCK, 'lc': 0, 'lp': place, 'pb': 0}]


def named_leaves(tree: Node) -> dict[str, Any]:
  """Returns the leaves of a plain tree by path name, in the order in which JAX flattens them.

  The counterpart of `opq_jax.core.trees.named_leaves` without JAX: dicts go by their sorted keys.

  Raises:
    ValueError: two leaves have the same name, or keys of one dict have no order.

  >>> named_leaves({'b': [3, None, 4], 'a': 2})
  {'a': 2, 'b/0': 3, 'b/2': 4}
  """
  named: dict[str, Any] = {}

  def walk(node: Node, path: tuple[str, ...]) -> None:
    if isinstance(node, dict):
      try:
        children = sorted(node.items(), key=lambda item: item[0])
      except TypeError as error:
        raise ValueError(f'{"/".join(path)}: found keys without an order: {error}') from error
    elif isinstance(node, list | tuple):
      children = list(enumerate(node))
    else:
      if node is not None:
        if (name := '/'.join(path)) in named:
          raise ValueError(f'{name}: found two leaves of this path, expected every path once')
        named[name] = node
      return
    for key, child in children:
      walk(child, (*path, str(key)))

  walk(tree, ())
  return named


def check_names(tree: Node) -> None:
  """Finds out what the path names of all leaves would take before anybody makes them.

  Raises:
    ValueError: the names have more than `MAX_NAMES` characters together, or containers lie deeper
      than `MAX_DEPTH`.

  >>> check_names({'a': [1, {'b': None}]})
  """

  def characters(node: Any, length: int, depth: int) -> int:
    if depth > MAX_DEPTH:
      raise ValueError(f'found a tree deeper than {MAX_DEPTH} containers, expected at most these')
    items: Any = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list | tuple):
      items = enumerate(node)
    elif not isinstance(node, dict):
      return 0 if node is None else length
    return sum(characters(child, length + 1 + len(str(key)), depth + 1) for key, child in items)

  if (found := characters(tree, 0, 0)) > MAX_NAMES:
    raise ValueError(f'found path names of {found} characters, expected at most {MAX_NAMES}')


def spec(dtype: np.dtype, shape: tuple[int, ...]) -> str:
  """The notation of an uncompressed leaf, with which that of every leaf begins."""
  return f'{dtype.name}[{",".join(map(str, shape))}]'


def compressed_spec(
  dtype: np.dtype, shape: tuple[int, ...], levels: int, stored: int, escapes: int, escape_bytes: int
) -> str:
  """The notation of a compressed leaf (see `LeafEntry`)."""
  fields = f' escapes={escapes},{escape_bytes}' if escapes else ''
  return f'{spec(dtype, shape)} {levels} {stored}{fields}'


def can_be_compressed(dtype: np.dtype) -> bool:
  """Whether a compressed leaf may have this dtype: a float of whole bytes that knows 0."""
  if dtype.kind == 'c':  # whose `finfo` is that of its parts
    return False
  try:
    info = ml_dtypes.finfo(dtype)
  except ValueError:  # not of floats
    return False
  return bool(info.bits == 8 * dtype.itemsize and info.nmant > 0)


def to_json(node: Node) -> Any:
  """A plain tree of strings in the notation of the index."""
  if isinstance(node, list | tuple):
    return [type(node).__name__, *map(to_json, node)]
  if isinstance(node, dict):
    marked = lambda key: f':{key}' if type(key) is int or key.startswith(':') else key
    return {marked(key): to_json(child) for key, child in node.items()}
  return node


def from_json(node: Any) -> Node:
  """The plain tree, with a `LeafEntry` at every leaf, that the index notes."""
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


def parsed_index(text: bytes) -> tuple[Node, list[tuple[int, int]], dict[str, str]]:
  """The tree of `LeafEntry`s, size and checksum of every block, and the metadata of the user."""
  match json.loads(text, object_pairs_hook=_unique):
    case {'blocks': list(numbers), 'metadata': dict(metadata), 'tree': node}:
      if all(type(n) is int and n >= 0 for n in numbers) and all(
        type(text) is str for text in metadata.values()
      ):
        blocks = list(zip(numbers[::2], numbers[1::2], strict=True))
        tree = from_json(node)
        check_names(tree)
        return tree, blocks, metadata
  raise ValueError(f'found {text[:80]!r}, expected blocks, metadata and tree')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError(f'found keys {[key for key, _ in pairs][:10]}, expected every key once')
  return found


def _parsed_key(text: str) -> str | int:
  if text.startswith('::') or not text.startswith(':'):
    return text.removeprefix(':')
  if f':{int(text[1:])}' != text:
    raise ValueError(f'found key {text!r}, expected a plain number after the colon')
  return int(text[1:])


def _parsed_leaf(text: str) -> LeafEntry:
  match = _LEAF.fullmatch(text)
  if match is None or match['dtype'] not in DTYPES:
    raise ValueError(f'found leaf {text[:80]!r}, expected dtype and shape, or levels and bytes too')
  dtype = DTYPES[match['dtype']]
  shape = tuple(int(n) for n in match['shape'].split(',') if n)
  if len(shape) > 64 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 62:
    raise ValueError(f'found leaf {text[:80]!r}, expected a shape that an array can have')
  fields = _parsed_fields(match['fields'])
  if match['levels'] is None:
    if fields:
      raise ValueError(f'found leaf {text[:80]!r}, expected fields of compressed leaves only')
    return LeafEntry(dtype, shape, None, math.prod(shape) * dtype.itemsize)
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
  """The fields of an entry by name; with no name that this reader does not know."""
  pairs = [field.split('=', 1) for field in text.split()]
  names = [name for name, _ in pairs]
  for name in names:
    if name != 'escapes':
      raise ValueError(f'found field {name}, which a newer opq_jax wrote, expected escapes')
  if names != sorted(set(names)):
    raise ValueError(f'found fields {names}, expected every name once, in order')
  return dict(pairs)


def placed(leaves: dict[str, LeafEntry]) -> tuple[dict[str, LeafEntry], int, int, int]:
  """The leaves, each in its place; how many are compressed, bytes of codes, bytes of the others."""
  placed, rows, codes_size, raw_size = {}, 0, 0, 0
  for name, leaf in leaves.items():
    if leaf.levels is None:
      begin = raw_size + -raw_size % leaf.dtype.itemsize
      placed[name] = dataclasses.replace(leaf, begin=begin)
      raw_size = begin + leaf.stored
    else:
      placed[name] = dataclasses.replace(leaf, begin=codes_size, row=rows)
      codes_size += leaf.stored
      rows += 1
  return placed, rows, codes_size, raw_size
