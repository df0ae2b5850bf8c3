"""Reads `.opq` files: one leaf at a time, checked, in bounded time and memory.

`opq_jax.file.index` describes the format.  Values and codes come as NumPy arrays and need no JAX;
it is imported where a compression state is asked for: `load`, `leaf_state`.
"""

import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from opq_jax.coding.axis_orders import inverse
from opq_jax.core import messages, plain_trees
from opq_jax.core.array_types import Float32, Int8, Shaped
from opq_jax.core.trees import slice_name
from opq_jax.file import packing, side_files
from opq_jax.file.coded_leaves import CodedLeaf, Rotation, coded_slice
from opq_jax.file.container import GRID_BYTES
from opq_jax.file.front import grids_of, read_bytes, read_front
from opq_jax.file.grids import Grid
from opq_jax.file.leaf_entries import LeafEntry
from opq_jax.file.telling import told_of

if TYPE_CHECKING:
  from opq_jax.compression import CompressionState, LeafState
  from opq_jax.core.trees import PyTree


def load(
  path: str | os.PathLike[str] | bytes,
  like: 'PyTree | None' = None,
  *,
  most_bytes: int | None = None,
  told: Callable[[int, int], object] | None = None,
) -> 'tuple[PyTree, CompressionState]':
  """Returns the compressed network of a file, on the host: `OpqFile(path, most_bytes).load(like)`.

  Args:
    path: of the file; or its bytes.
    like: as for `OpqFile.load`.
    most_bytes: as for `OpqFile`.
    told: as for `OpqFile.load`.

  Returns:
    `(params, state)`.

  Raises:
    ValueError: as `OpqFile` and `OpqFile.load`.
  """
  with OpqFile(path, most_bytes) as file:
    return file.load(like, told=told)


class OpqFile(Mapping[str, Shaped[np.ndarray, '...']]):
  """Opens an `.opq` file, a mapping whose leaves are decoded when they are asked for.

  Keys are path names, in the order of JAX; items are host arrays: the values of compressed leaves,
  the others bit for bit.  Opening reads and checks the header, the grids and the index.  A leaf is
  read and checked each time it is asked for, also by several threads at once.  The file is a
  context manager.

  Args:
    path: of the file; or its bytes.
    most_bytes: bytes that its leaves may have, decoded.  A run of zeros takes next to nothing, so
      3 MB may well hold 2**40 of them; by default a file is refused that claims more than 1 GiB and
      more than 1000 times its own size.

  Raises:
    ValueError: this is no whole and undamaged `.opq` file of a version up to 3.  Checking takes
      bounded time and memory, whatever is in the file; nothing in it is executed.

  >>> import jax, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> params = {'kernel': kernel, 'bias': np.zeros(32, np.float32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> data = opq_jax.file.serialize(params, state, {'source': 'an example'})
  >>> with OpqFile(data) as file:
  ...   print(list(file), file['bias'].shape, file.codes('kernel').dtype, file.metadata)
  ['bias', 'kernel'] (32,) int8 {'source': 'an example'}
  """

  def __init__(self, path: str | os.PathLike[str] | bytes, most_bytes: int | None = None):
    self._label = 'the file' if isinstance(path, bytes) else os.fspath(path)
    self._file = io.BytesIO(path) if isinstance(path, bytes) else open(path, 'rb')  # noqa: SIM115
    if not self._file.seekable():
      self._file.close()
      raise ValueError(f'{self._label}: found a pipe, expected a file, or its bytes')
    self._reading = threading.Lock()
    self._last_block = -1, b''  # number and unpacked bytes
    try:
      self._front = read_front(self._file, self._label, most_bytes)
    except BaseException:  # an interrupt as well: nobody else has the file to close it
      self._file.close()
      raise

  def __getitem__(self, name: str) -> Shaped[np.ndarray, '...']:
    leaf = self._leaf(name)
    if leaf.table is None:
      return self._uncompressed(name, leaf)
    return self._coded(name, leaf).values()

  def __iter__(self) -> Iterator[str]:
    return iter(self._front.leaves)

  def __len__(self) -> int:
    return len(self._front.leaves)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def metadata(self) -> dict[str, str]:
    """The strings that were saved with the network."""
    return self._front.metadata

  @property
  def side_files(self) -> dict[str, int]:
    """The sizes in bytes of the files that were saved with the network, by name."""
    carried = self._front.side_files
    return {} if carried is None else dict(carried.sizes)

  def read_side_files(self) -> dict[str, bytes]:
    """Returns the files that were saved with the network, by name.

    Raises:
      ValueError: they are damaged.
    """
    carried = self._front.side_files
    if carried is None:
      return {}
    data = self._read(self._front.block_begins[-1], carried.packed)
    try:
      return side_files.unpacked_files(carried, data)
    except ValueError as error:
      raise ValueError(f'{self._label}: {error}') from error

  def side_bytes(self) -> int:
    """Returns the bytes of the file that the side files take together."""
    return 0 if self._front.side_files is None else self._front.side_files.packed

  def close(self) -> None:
    """Closes the file; nothing can be read from it afterwards."""
    self._file.close()

  def codes(self, name: str) -> Int8[np.ndarray, '...']:
    """Returns the codes of a compressed leaf, -128 where a weight is escaped.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged, or not compressed.
    """
    return self.coded_leaf(name).codes()

  def coded_leaf(self, name: str) -> CodedLeaf:
    """Returns a compressed leaf as it is coded: codes, values and grids, decoded once for all.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged, or not compressed.
    """
    leaf = self._leaf(name)
    if leaf.table is None:
      raise ValueError(f'{name}: found a leaf that is not compressed, expected one that has codes')
    return self._coded(name, leaf)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a leaf; decodes nothing.

    Raises:
      KeyError: the file has no such leaf.
    """
    return self._leaf(name).shape

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype of a leaf; decodes nothing.

    Raises:
      KeyError: the file has no such leaf.
    """
    return self._leaf(name).dtype

  def slices(self, name: str) -> int:
    """Returns how many leading axes of a leaf count slices, 0 for none.

    Raises:
      KeyError: the file has no such leaf.
    """
    return self._leaf(name).slices

  def grid(self, name: str) -> Grid | None:
    """Returns the grid of a compressed leaf, None where it is not compressed; decodes nothing.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf has slices, each with a grid of its own: see `grids`.
    """
    if self._leaf(name).slices:
      raise ValueError(f'{name}: found slices, expected a leaf of one grid; grids(name) has all')
    return next(iter(self.grids(name)), None)

  def grids(self, name: str) -> tuple[Grid, ...]:
    """Returns the grids of the slices of a compressed leaf in C order; decodes nothing.

    One of a leaf without slices, and none of a leaf that is not compressed.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the grid of a slice is damaged.
    """
    leaf, front = self._leaf(name), self._front
    return grids_of(name, leaf, front.grid_rows[name], front.version) if leaf.rows else ()

  def output_scales(self, name: str) -> Float32[np.ndarray, '...'] | None:
    """Returns the scales of the outputs of a compressed leaf, None where all are 1.

    With an axis of length 1 for each other axis but those of slices, so that they broadcast over
    the weights.  The grid of an output is that of the leaf, or of the slice, times its scale.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged.
    """
    leaf = self._leaf(name)
    return None if leaf.scale_axis is None else self._coded(name, leaf).output_scales()

  def rotated_axis(self, name: str) -> int | None:
    """Returns the axis whose inputs are rotated in the codes of a leaf; decodes nothing.

    None where the codes are those of the weights.  Axes of slices are counted too.  The weights of
    a rotated leaf are not on its grid: it has no state, and cannot be finetuned as it is.

    Raises:
      KeyError: the file has no such leaf.
    """
    leaf = self._leaf(name)
    return None if leaf.rotated_axis is None else leaf.slices + leaf.rotated_axis

  def coded_values(self, name: str) -> Shaped[np.ndarray, '...']:
    """Returns the values of the codes of a compressed leaf, with escaped weights.

    The weights themselves, but for a rotated leaf: then its rotated weights, in float32.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged, or not compressed.
    """
    return self.coded_leaf(name).coded_values()

  def payload_sizes(self, name: str) -> tuple[int, ...]:
    """Returns the bytes of the payloads of a compressed leaf, one of every slice as in `grids`.

    Raises:
      KeyError: the file has no such leaf.
    """
    return tuple(part.stored for part in self._leaf(name).parts())

  def axes(self, name: str) -> tuple[int, ...]:
    """Returns the order in which the payloads have the axes of a leaf, or of each slice.

    () where the axes stay as they are.

    Raises:
      KeyError: the file has no such leaf.
    """
    return self._leaf(name).axes

  def tied_to(self, name: str) -> str | None:
    """Returns the earlier leaf that a leaf is again, or the transpose of; else None.

    Raises:
      KeyError: the file has no such leaf.
    """
    number = self._leaf(name).tied_to
    return None if number is None else list(self._front.leaves)[number]

  def leaf_state(self, name: str) -> 'LeafState | None':
    """Returns kinds and codebook of a leaf, None where it is not compressed, or is rotated.

    Raises:
      KeyError: the file has no such leaf.
      ValueError: the leaf is damaged.
    """
    leaf = self._leaf(name)
    if leaf.table is None:
      self._uncompressed(name, leaf)  # checked, as every leaf that is asked for
      return None
    return self._coded(name, leaf).state()

  def sizes(self) -> dict[str, int]:
    """Returns the bytes of the file that each leaf takes, without those of header and index.

    A compressed leaf takes its payload and 12 bytes of `grids`, or those of all its slices, and one
    that is an earlier leaf again takes none.  The packed bytes of all uncompressed leaves are
    shared out in proportion to their own.
    """
    front, begin, sizes = self._front, 0, {}
    packed = front.block_begins[-1] - front.block_begins[0]
    for name, leaf in front.leaves.items():
      if leaf.tied_to is not None:
        sizes[name] = 0
      elif leaf.table is None:
        # differences of rounded running sums: their own sum is the packed bytes, to the byte
        end = packed * (leaf.begin + leaf.stored) // max(front.uncompressed_size, 1)
        begin, sizes[name] = end, end - begin
      else:
        sizes[name] = leaf.stored + GRID_BYTES * leaf.rows
    return sizes

  def params(self) -> 'PyTree':
    """Returns the decoded parameters alone, as `load` returns them; needs no JAX.

    Raises:
      ValueError: a leaf is damaged.
    """
    return plain_trees.replaced(self._front.tree, dict(self))

  def load(
    self, like: 'PyTree | None' = None, *, told: Callable[[int, int], object] | None = None
  ) -> 'tuple[PyTree, CompressionState]':
    """Returns the whole network: decoded parameters, and the state that compresses them.

    Args:
      like: a tree of the same paths and shapes (arrays, or what `jax.eval_shape` returns) whose
        containers the result takes over; leaves keep the dtypes of the file.  A leaf of a
        `NamedSharding` is laid over its mesh, with the kinds of its state.  Without it dicts,
        lists, tuples and None come back as themselves, and every other container as a dict.
      told: called after each leaf with the bytes of all leaves that are decoded, and of all there
        are; `opq_jax.report.progress` shows them.

    Returns:
      `(params, state)`: params of host arrays, exact whatever `jax_enable_x64` says, and a state of
      JAX's arrays.  These `params`, their `apply_compression(params, state)` and that of what was
      saved are bit-identical, and `encode(params, state)` are the codes that were saved.  Rotated
      leaves have no state.

    Warns:
      UserWarning: leaves are rotated, by name.

    Raises:
      ValueError: a leaf is damaged; or `like` has other paths or shapes, all of which are listed.
    """
    import jax

    from opq_jax.compression import CompressionState
    from opq_jax.core import trees
    from opq_jax.file.layout import check_like, laid_out

    structure, order = jax.tree.structure(self._front.tree), list(self._front.leaves)
    likes: dict[str, Any] = {}
    if like is not None:
      likes = trees.named_leaves(like)
      expected = {name: leaf.shape for name, leaf in self._front.leaves.items()}
      check_like(self._label, {name: np.shape(leaf) for name, leaf in likes.items()}, expected)
      structure, order = jax.tree.structure(like), list(likes)
    params: list[Any] = []
    records: list[LeafState | None] = []
    repeated = {self.tied_to(name) for name in order}
    if is_rotated := [name for name in order if self._leaf(name).rotated_axis is not None]:
      messages.warn(
        f'{messages.listed(is_rotated)}: found codes of rotated weights: they come back exact, but '
        'without a state, so they would be saved again as uncompressed floats'
      )
    firsts: dict[str | None, CodedLeaf] = {}  # the leaves that later ones are again
    for name in told_of({name: self._leaf(name).nbytes for name in order}, told):
      leaf, first = self._leaf(name), self.tied_to(name)
      if leaf.table is None:
        value, record = laid_out(self._uncompressed(name, leaf), None, likes.get(name))
        params.append(value)
        records.append(record)
        continue
      if first in firsts:
        coded = firsts[first].moved((1, 0)) if leaf.is_transposed else firsts[first]
      else:
        coded = self._coded(name, leaf)
      if name in repeated:
        firsts[name] = coded
      value, record = laid_out(coded.values(), coded.state(), likes.get(name))
      params.append(value)
      records.append(record)
    return (
      jax.tree.unflatten(structure, params),
      CompressionState(jax.tree.unflatten(structure, records)),
    )

  def _leaf(self, name: str) -> LeafEntry:
    if name not in self._front.leaves:
      raise KeyError(f'{name}: not found in {self._label}')
    return self._front.leaves[name]

  def _coded(self, name: str, leaf: LeafEntry) -> CodedLeaf:
    """Reads and checks a compressed leaf, slice by slice."""
    begin, shape = self._front.codes_begin + leaf.begin, leaf.coded_shape
    axis, coded, rotation = leaf.scale_axis, [], None
    if leaf.rotated_axis is not None:
      rotation = Rotation(leaf.rotated_axis, leaf.dtype)
    if leaf.axes:
      axis = None if axis is None else leaf.axes.index(axis)
      rotation = None if rotation is None else rotation.moved(leaf.axes)
    each = zip(np.ndindex(leaf.slice_shape), leaf.parts(), self.grids(name), strict=True)
    for index, part, grid in each:
      data = self._read(begin, part.stored)
      coded.append(coded_slice(slice_name(name, index), data, shape, part, grid, axis, rotation))
      begin += part.stored
    whole = CodedLeaf(coded, leaf.slice_shape)
    return whole.moved(inverse(leaf.axes)) if leaf.axes else whole

  def _uncompressed(self, name: str, leaf: LeafEntry) -> Shaped[np.ndarray, '...']:
    """Reads and checks an uncompressed leaf."""
    # a bytearray, because arrays of its memory are writable; a leaf may begin and end inside of
    # blocks
    data = bytearray()
    try:
      while len(data) < leaf.stored:
        number, start = divmod(leaf.begin + len(data), packing.BLOCK)
        data += self._block(number)[start : start + leaf.stored - len(data)]
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    return np.frombuffer(data, leaf.dtype).reshape(leaf.shape)

  def _block(self, number: int) -> bytes:
    """One unpacked block; it is kept, because the next leaf is likely to lie in it."""
    last, block = self._last_block  # at once: another thread may replace it
    if last != number:
      stored, checksum = self._front.blocks[number]
      data = self._read(self._front.block_begins[number], stored)
      if (found := zlib.crc32(data)) != checksum:
        raise ValueError(f'found CRC-32 {found:08x}, expected {checksum:08x}')
      size = min(packing.BLOCK, self._front.uncompressed_size - number * packing.BLOCK)
      if len(block := packing.unpack(data, size, packing.FLOAT_PERIOD)) != size:
        raise ValueError(f'found a block of {len(block)} bytes, expected {size}')
      self._last_block = number, block
    return block

  def _read(self, begin: int, size: int) -> bytes:
    with self._reading:  # of several threads, one moves the position and reads there
      return read_bytes(self._file, self._label, begin, size)
