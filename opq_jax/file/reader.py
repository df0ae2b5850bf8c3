"""Reads `.opq` files: one leaf at a time, checked, in bounded time and memory.

`opq_jax.file.index` describes the format.  Values and codes come as NumPy arrays and need no JAX;
it is imported where a compression state is asked for.
"""

import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int8, Shaped

from opq_jax.coding import decode_codes, escapes
from opq_jax.core.limits import ESCAPE
from opq_jax.file import checks
from opq_jax.file import index as file_index
from opq_jax.file.grids import Grid
from opq_jax.file.index import LeafEntry

if TYPE_CHECKING:
  from opq_jax.compression import CompressionState, LeafState
  from opq_jax.core.trees import PyTree

# decoded bytes that a file may claim unless the caller admits more: both bounds must be passed
_ADMITTED_BYTES = 1 << 30
_ADMITTED_RATIO = 1000  # of the bytes of the file; real networks stay below 200


def load(
  path: str | os.PathLike[str] | bytes,
  like: 'PyTree | None' = None,
  *,
  most_bytes: int | None = None,
) -> 'tuple[PyTree, CompressionState]':
  """Returns the compressed network of a file, on the host: `OpqFile(path, most_bytes).load(like)`.

  Args:
    path: of the file; or its bytes.
    like: as for `OpqFile.load`.
    most_bytes: as for `OpqFile`.

  Returns:
    `(params, state)`.

  Raises:
    ValueError: as `OpqFile` and `OpqFile.load`.
  """
  with OpqFile(path, most_bytes) as file:
    return file.load(like)


class _CodedLeaf(NamedTuple):
  """A compressed leaf as the file codes it, checked.

  Attributes:
    codes: of all weights, -128 where one is escaped.
    escaped: the escaped weights, in C order.
    grid: the value of every code.
  """

  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  grid: Grid

  def values(self) -> Shaped[np.ndarray, '...']:
    """Returns the weights in the leaf's dtype."""
    values = self.grid.values(self.codes)
    values[self.codes == ESCAPE] = self.escaped
    return values

  def state(self) -> 'LeafState':
    """Returns the state that compresses the weights to these codes."""
    from opq_jax.compression import LeafState
    from opq_jax.compression.records import kinds_of_codes

    arrays: dict[str, Any] = {
      'kinds': kinds_of_codes(self.codes),
      'codebook': self.grid.codebook(),
      'threshold': np.array(self.grid.threshold),
      'step': np.array(self.grid.step),
      'levels': np.array(self.grid.levels, np.int32),
    }
    return LeafState(**arrays, dtype=self.grid.dtype)


class OpqFile(Mapping[str, Shaped[np.ndarray, '...']]):
  """A file whose leaves are decoded one at a time, when they are asked for.

  A mapping from path names, in the order of JAX, to host arrays: the values of compressed leaves,
  the others bit for bit.  Opening reads and checks the header, the grids and the index; a leaf is
  read and checked when it is asked for.  A context manager.

  Args:
    path: of the file; or its bytes.
    most_bytes: that its leaves may have, decoded.  A run of zeros takes next to nothing, so 3 MB
      may well hold 2**40 of them; by default a file is refused that claims more than 1 GiB and
      more than 1000 times its own size.

  Raises:
    ValueError: this is no whole and undamaged `.opq` file of a version up to 2.  The time and the
      memory that it takes to find out are bounded, whatever is in the file; nothing is executed.

  >>> import jax, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> params = {'kernel': kernel, 'bias': np.zeros(32, np.float32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> data = opq_jax.file.serialize(params, state, {'source': 'an example'})
  >>> with OpqFile(data) as file:
  ...   print(list(file), file['bias'].shape, file.codes('kernel').dtype, file.metadata)
  ['bias', 'kernel'] (32,) int8 {'source': 'an example'}
  """

  metadata: dict[str, str]

  def __init__(self, path: str | os.PathLike[str] | bytes, most_bytes: int | None = None):
    self._label = 'the file' if isinstance(path, bytes) else os.fspath(path)
    self._file = io.BytesIO(path) if isinstance(path, bytes) else open(path, 'rb')  # noqa: SIM115
    self._unpacked = -1, b''  # number and bytes of the block that was read last
    try:
      self._read_front(most_bytes)
    except BaseException:
      self._file.close()
      raise

  def __getitem__(self, name: str) -> Shaped[np.ndarray, '...']:
    leaf = self._leaf(name)
    if leaf.levels is None:
      return self._uncompressed(name, leaf)
    return self._coded(name, leaf, leaf.levels).values()

  def __iter__(self) -> Iterator[str]:
    return iter(self._leaves)

  def __len__(self) -> int:
    return len(self._leaves)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file; nothing can be read from it afterwards."""
    self._file.close()

  def codes(self, name: str) -> Int8[np.ndarray, '...']:
    """Returns the codes of a compressed leaf, -128 where a weight is escaped.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged, or not compressed.
    """
    leaf = self._leaf(name)
    if leaf.levels is None:
      raise ValueError(f'{name}: found a leaf that is not compressed, expected one that has codes')
    return self._coded(name, leaf, leaf.levels).codes

  def grid(self, name: str) -> Grid | None:
    """Returns the grid of a compressed leaf, None where it is not compressed; decodes nothing.

    Raises:
      KeyError: the file has no such leaf.
    """
    leaf = self._leaf(name)
    return None if leaf.levels is None else self._grid(leaf, leaf.levels)

  def leaf_state(self, name: str) -> 'LeafState | None':
    """Returns kinds and codebook of a leaf, None where it is not compressed.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged.
    """
    leaf = self._leaf(name)
    if leaf.levels is None:
      self._uncompressed(name, leaf)  # checked, as every leaf that is asked for
      return None
    return self._coded(name, leaf, leaf.levels).state()

  def sizes(self) -> dict[str, int]:
    """Returns the bytes of the file that each leaf takes, without those of header and index.

    A compressed leaf takes its payload and 12 bytes of `grids`.  The packed bytes of all
    uncompressed leaves are shared out in proportion to their own.
    """
    packed, begin, sizes = self._block_begins[-1], 0, {}
    for name, leaf in self._leaves.items():
      if leaf.levels is None:
        end = packed * (leaf.begin + leaf.stored) // max(self._raw_size, 1)
        begin, sizes[name] = end, end - begin
      else:
        sizes[name] = leaf.stored + 12
    return sizes

  def load(self, like: 'PyTree | None' = None) -> 'tuple[PyTree, CompressionState]':
    """Returns the whole network: decoded parameters, and the state that compresses them.

    Args:
      like: a tree of the same paths and shapes (arrays, or what `jax.eval_shape` returns) whose
        containers the result takes over; leaves keep the dtypes of the file.  Without it dicts,
        lists, tuples and None come back as themselves, and every other container as a dict.

    Returns:
      `(params, state)` of host arrays, exact whatever `jax_enable_x64` says: these `params`, their
      `apply_compression(params, state)` and that of what was saved are bit-identical, and
      `encode(params, state)` are the codes that were saved.

    Raises:
      ValueError: a leaf is damaged; or `like` has other paths or shapes, all of which are listed.
    """
    import jax

    from opq_jax.compression import CompressionState
    from opq_jax.core import trees

    structure, order = jax.tree.structure(self._tree), list(self._leaves)
    if like is not None:
      shapes = {name: np.shape(leaf) for name, leaf in trees.named_leaves(like).items()}
      self._check_like(shapes)
      structure, order = jax.tree.structure(like), list(shapes)
    params: list[np.ndarray] = []
    records: list[LeafState | None] = []
    for name in order:
      leaf = self._leaf(name)
      if leaf.levels is None:
        params.append(self._uncompressed(name, leaf))
        records.append(None)
      else:
        coded = self._coded(name, leaf, leaf.levels)
        params.append(coded.values())
        records.append(coded.state())
    return (
      jax.tree.unflatten(structure, params),
      CompressionState(jax.tree.unflatten(structure, records)),
    )

  def _check_like(self, shapes: dict[str, tuple[int, ...]]) -> None:
    expected = {name: leaf.shape for name, leaf in self._leaves.items()}
    lines = [
      f'  {name}: found {shapes.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
      for name in dict.fromkeys([*expected, *shapes])
      if shapes.get(name) != expected.get(name)
    ]
    if lines:
      raise ValueError('\n'.join([f'`like` is another tree than {self._label} holds:', *lines]))

  def _leaf(self, name: str) -> LeafEntry:
    if name not in self._leaves:
      raise KeyError(f'{name}: not found in {self._label}')
    return self._leaves[name]

  def _coded(self, name: str, leaf: LeafEntry, levels: int) -> _CodedLeaf:
    """Reads and checks a compressed leaf."""
    try:
      data = self._read(self._codes_begin + leaf.begin, leaf.stored)
      end = leaf.stored - leaf.escape_bytes
      codes = decode_codes(data[:end], leaf.shape)
      checks.check_levels(codes, levels)
      positions, escaped = escapes.decode(data[end:], codes.size, leaf.escapes, leaf.dtype)
      flat = codes.reshape(-1)
      if bad := int(np.count_nonzero(flat[positions])):
        raise ValueError(f'found {bad} escaped weights that have codes as well, expected none')
      if bad := escaped.size - int(np.count_nonzero(np.isfinite(escaped))):
        raise ValueError(f'found {bad} escaped weights that are NaN or infinite, expected none')
      flat[positions] = ESCAPE
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    grid = self._grid(leaf, levels)
    checks.check_cells(name, codes, grid)
    return _CodedLeaf(codes, escaped, grid)

  def _grid(self, leaf: LeafEntry, levels: int) -> Grid:
    threshold, first, step = self._grids[leaf.row]
    return Grid(threshold, first, step, levels, leaf.dtype)

  def _uncompressed(self, name: str, leaf: LeafEntry) -> Shaped[np.ndarray, '...']:
    """Reads and checks an uncompressed leaf."""
    data = bytearray()
    try:
      while len(data) < leaf.stored:
        number, start = divmod(leaf.begin + len(data), file_index.BLOCK)
        data += self._block(number)[start : start + leaf.stored - len(data)]
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    return np.frombuffer(data, leaf.dtype).reshape(leaf.shape)

  def _block(self, number: int) -> bytes:
    """One block of uncompressed leaves; kept, because the next leaf is likely to lie in it."""
    if self._unpacked[0] != number:
      stored, checksum = self._blocks[number]
      data = self._read(self._blocks_begin + self._block_begins[number], stored)
      if (found := zlib.crc32(data)) != checksum:
        raise ValueError(f'found CRC-32 {found:08x}, expected {checksum:08x}')
      size = min(file_index.BLOCK, self._raw_size - number * file_index.BLOCK)
      if len(block := file_index.unpack(data, size, period=4)) != size:
        raise ValueError(f'found a block of {len(block)} bytes, expected {size}')
      self._unpacked = number, block
    return self._unpacked[1]

  def _read(self, begin: int, size: int) -> bytes:
    self._file.seek(begin)
    data = self._file.read(size)
    if len(data) != size:
      raise ValueError(f'{self._label}: found {len(data)} bytes at {begin}, expected {size}')
    return data

  def _read_front(self, most_bytes: int | None) -> None:
    """Reads and checks all that comes before the codes."""
    version, (rows, *sizes), checksum, begin = self._read_header()
    table, index = self._read(begin, 12 * rows), self._read(begin + 12 * rows, sizes[0])
    self._codes_begin = begin + 12 * rows + sizes[0]
    self._blocks_begin = self._codes_begin + sizes[1]
    self._grids = np.frombuffer(table, '<f4').astype(np.float32).reshape(rows, 3)
    if (found := zlib.crc32(index, zlib.crc32(table))) != checksum:
      raise ValueError(f'{self._label}: found CRC-32 {found:08x} of the index, not {checksum:08x}')
    try:
      self._tree, self._blocks, self.metadata = file_index.parsed_index(
        file_index.unpack(index, file_index.MAX_INDEX)
      )
      leaves = file_index.named_leaves(self._tree)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{self._label}: found an index that cannot be: {error}') from error
    self._block_begins = [0, *itertools.accumulate(size for size, _ in self._blocks)]
    self._leaves, found_rows, codes_size, self._raw_size = file_index.placed(leaves)
    for what, found, expected in (
      ('compressed leaves', found_rows, rows),
      ('bytes of codes', codes_size, sizes[1]),
      ('blocks', len(self._blocks), -(-self._raw_size // file_index.BLOCK)),
      ('bytes of blocks', self._block_begins[-1], sizes[2]),
    ):
      if found != expected:
        raise ValueError(f'{self._label}: found an index of {found} {what}, expected {expected}')
    file_size = self._blocks_begin + sizes[2]
    if most_bytes is None:
      most_bytes = max(_ADMITTED_BYTES, _ADMITTED_RATIO * file_size)
    claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._leaves.values())
    if claimed > most_bytes:
      raise ValueError(
        f'{self._label}: found leaves of {claimed} bytes in {file_size}, expected '
        f'at most {most_bytes}; a greater most_bytes admits them'
      )
    for name, leaf in self._leaves.items():
      if leaf.levels is not None:
        checks.check_grid(f'{self._label}: {name}', self._grid(leaf, leaf.levels), version)
        if leaf.escapes and version == '1':
          raise ValueError(f'{self._label}: {name}: found escapes, expected none in version 1')

  def _read_header(self) -> tuple[str, tuple[int, ...], int, int]:
    """Version, sizes of the tensors (for `grids`, rows), checksum, and where the data begin."""
    size = self._file.seek(0, os.SEEK_END)
    self._file.seek(0)
    length = int.from_bytes(self._file.read(8), 'little')
    text = self._file.read(min(length, file_index.MAX_HEADER))
    try:
      header = json.loads(text)
      about = header['__metadata__']
      if about['format'] != 'opq':
        raise ValueError(f'found format {about["format"]!r}, expected opq')
      version = about['version']
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(f'{self._label}: found no .opq file: {error!r}') from error
    if version not in file_index.VERSIONS:
      raise ValueError(f"{self._label}: found version {version!r}, expected '1' or '2'")
    try:
      sizes = tuple(header[name]['shape'][0] for name in file_index.TENSORS)
      if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f'found sizes {sizes}')
      checksum = int(about['crc32'], 16)
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise ValueError(f'{self._label}: found a damaged header: {error!r}') from error
    expected = file_index.header(sizes, checksum, version)
    if length.to_bytes(8, 'little') + text != expected:
      raise ValueError(f'{self._label}: found header {text!r}, expected {expected[8:]!r}')
    if size != (expected_size := len(expected) + 12 * sizes[0] + sum(sizes[1:])):
      raise ValueError(f'{self._label}: found {size} bytes, expected {expected_size}')
    return version, sizes, checksum, len(expected)
