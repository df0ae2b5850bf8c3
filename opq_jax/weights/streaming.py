"""From weights on disk to an `.opq` file, leaf by leaf: trees that are larger than memory.

    1  every compressed leaf is read, and its `LeafStatistics` are kept: 32 KiB and its scales
    2  `opq_jax.allocate` solves from the statistics
    3  every leaf is read once more, coded in pieces, and its payload written

With `sparsity` and `bits` the second step reads every compressed leaf twice more.  No more than
one leaf is in memory at a time: twice while its statistics are computed (the second is JAX's), and
while it is coded once, beside its codes of a byte a weight.  The file is, byte for byte, the one
that `opq_jax.save` writes of the same weights.
"""

import collections
import contextlib
import ctypes
import dataclasses
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int8, Shaped

from opq_jax.allocation import allocator as allocations
from opq_jax.allocation.allocator import Allocation, LeafAllocation, is_compressible
from opq_jax.allocation.statistics import LeafStatistics, leaf_statistics
from opq_jax.compression import codes as compression
from opq_jax.compression.codes import LeafState
from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.file import index as file_index
from opq_jax.file import rate as file_rates
from opq_jax.file import reader, writer
from opq_jax.report import sizes
from opq_jax.report.sizes import ChannelAxis, CompressedLeaf, SizeReport, UncompressedLeaf
from opq_jax.weights.stored_leaves import StoredLeaf

_PIECE = 1 << 20  # weights that are coded at a time
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_AHEAD = 8  # blocks of uncompressed leaves that are packed while others are written

_kinds_of = jax.jit(compression.kinds_of)


@dataclasses.dataclass(frozen=True)
class StreamedFile:
  """The result of `compress_stored`.

  Attributes:
    allocation: of the leaves, by name.
    report: the sizes of the file that was written.
  """

  allocation: Allocation
  report: SizeReport


def compress_stored(
  tree: PyTree,
  output: str | os.PathLike[str],
  *,
  compressible: Callable[[str, Any], bool] = is_compressible,
  channel_axis: ChannelAxis = -1,
  metadata: Mapping[str, str] | None = None,
  contexts: bool = True,
  stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
  **targets: Any,
) -> StreamedFile:
  """Prunes, quantizes and writes a tree that need not fit into memory.

  Args:
    tree: with a `StoredLeaf` at every leaf, as `opq_jax.weights.stored_leaves.open_weights` gives
    it. output: where the `.opq` file goes.  It appears whole or not at all.
    compressible, channel_axis: as for `opq_jax.allocate`.
    metadata, contexts: as for `opq_jax.save`.
    stage: what its stages run in, by name.
    **targets: the targets and `objective` of `opq_jax.allocate`.  For `file_rate` the
      tree is coded a few times.

  Returns:
    The allocation and the sizes; the file is `opq_jax.save(output, params, state, metadata)` with
    the state of `opq_jax.allocate(params, ...)`, byte for byte.

  Raises:
    ValueError: what `opq_jax.allocate` and `opq_jax.save` refuse; the file that was there stays.
    OSError: something cannot be read or written; likewise.

  >>> import tempfile, safetensors.numpy
  >>> from opq_jax.weights.stored_leaves import open_weights
  >>> kernel = np.random.default_rng(0).laplace(size=(256, 64)).astype(np.float32)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   safetensors.numpy.save_file({'w': kernel}, f'{folder}/net.safetensors')
  ...   leaves = open_weights(f'{folder}/net.safetensors')
  ...   report = compress_stored(leaves, f'{folder}/net.opq', compression_rate=16.0).report
  ...   print(report.file == os.stat(f'{folder}/net.opq').st_size, round(report.entropy_rate))
  True 16
  """
  file_rate = targets.pop('file_rate', None)
  asked = [targets.get(name) for name in allocations.TARGETS]
  if file_rate is None:
    allocations.check_targets(*asked)
  else:
    allocations.check_file_rate(file_rate, *asked)
  metadata = writer.checked_metadata(metadata)
  _return_large_blocks()
  tree = writer.plain_tree(tree)
  file_index.check_names(tree)
  leaves = trees.named_leaves(tree)
  chosen = allocations.choose(leaves, compressible)
  axes = {name: allocations.axis_of(name, leaves[name], channel_axis) for name in chosen}
  with stage('statistics'):
    stats = {name: _statistics(leaves[name], axes[name]) for name in chosen}
  source = _Source(tree, leaves, stats, axes)

  def coded(**targets: Any) -> _Coded:
    """The tree coded for these targets, in the place of what was coded before."""
    kept.close()
    with stage('allocate'):
      allocation = source.allocation(**targets)
    with stage('encode'):
      writer = kept.enter_context(_Writer(output, contexts))
      return source.coded(allocation, writer, metadata)

  with contextlib.ExitStack() as kept:
    if file_rate is None:
      found = coded(**targets)
    else:
      last: dict[float, _Coded] = {}

      def size_of(bits: float) -> int:
        last.clear()
        last[bits] = coded(bits_per_weight=bits, **targets)
        return last[bits].writer.size

      original = sum(leaf.nbytes for leaf in leaves.values())
      weights = sum(leaf.size for leaf in leaves.values())
      bits = file_rates.bits_of_file(size_of, original, file_rate, weights)
      if bits not in last:
        size_of(bits)
      found = last[bits]
    with stage('write'):
      found.writer.place()
  with reader.OpqFile(output) as file:
    stored = file.sizes()
  located = lambda leaf: dataclasses.replace(leaf, file=stored[leaf.path])
  report = SizeReport(
    tuple(map(located, found.compressed)),
    tuple(map(located, found.uncompressed)),
    os.stat(output).st_size,
  )
  return StreamedFile(found.allocation, report)


class _Coded(NamedTuple):
  """A tree that is coded, and not yet in its place; the rows know nothing of bytes in the file."""

  allocation: Allocation
  writer: '_Writer'
  compressed: list[CompressedLeaf]
  uncompressed: list[UncompressedLeaf]


@dataclasses.dataclass(frozen=True)
class _Source:
  """A tree on disk, and what is known of the leaves to compress, by name."""

  tree: PyTree
  leaves: dict[str, StoredLeaf]
  stats: dict[str, LeafStatistics]
  axes: dict[str, int]

  def like_tree(self, leaves: list[Any]) -> PyTree:
    """The tree of what its leaves have."""
    return jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

  def allocation(self, **targets: Any) -> Allocation:
    """`opq_jax.allocate` of the leaves' statistics."""
    return allocations.allocate(
      self.like_tree([self.stats.get(name, leaf) for name, leaf in self.leaves.items()]),
      compressible=lambda name, _: name in self.stats,
      read=lambda name: self.leaves[name].read(),
      **targets,
    )

  def coded(self, allocation: Allocation, writer: '_Writer', metadata: dict[str, str]) -> '_Coded':
    """All leaves, given to the writer."""
    asked = trees.records(self.tree, allocation.tree, LeafAllocation)
    found = _Coded(allocation, writer, [], [])
    for (name, leaf), wanted in zip(self.leaves.items(), asked, strict=True):
      if wanted is None:
        writer.add(name, leaf.read())
        row = UncompressedLeaf(name, leaf.shape, leaf.dtype.name, leaf.nbytes, 0)
        found.uncompressed.append(row)
        continue
      axis = self.axes[name]
      record, codes, escaped, reach = _coded(name, leaf.read(), wanted, axis)
      writer.add_codes(name, record, codes, escaped)
      found.compressed.append(sizes.compressed_leaf(name, record, codes, reach, axis, 0))
    writer.finish(self.like_tree, metadata)
    return found


def _return_large_blocks() -> None:
  """Has the C library give blocks of a leaf's size back to the system once they are free.

  Else glibc keeps those of up to 32 MiB for later, in every thread's arena: with leaves of that
  size the process grew by half in 80 of them.  Other C libraries are left as they are.
  """
  if platform.libc_ver()[0] == 'glibc':
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def _statistics(leaf: StoredLeaf, axis: int) -> LeafStatistics:
  # fetched before the next leaf is read, since JAX computes in the background
  return jax.device_get(leaf_statistics(leaf.read(), axis))


def _coded(
  name: str, array: Shaped[np.ndarray, '...'], asked: LeafAllocation, axis: int
) -> tuple[
  LeafState,
  Int8[np.ndarray, '...'],
  Shaped[np.ndarray, ' m'],
  Float32[np.ndarray, ' channels'],
]:
  """A leaf's state without its kinds, its codes, its escaped weights, and how far channels reach.

  Codes are made in pieces of one size, compiled once.
  """
  array = writer.host_array(name, array)
  none = dataclasses.replace(asked, shape=(0,), channel_axis=0)
  tree = {name: np.zeros(0, array.dtype)}
  record = compression.init_state(tree, Allocation({name: none})).tree[name]
  flat, codes = array.reshape(-1), np.empty(array.size, np.int8)
  size = min(_PIECE, 1 << max(flat.size - 1, 0).bit_length())
  for start in range(0, flat.size, size):
    piece = flat[start : start + size]
    # a zero is pruned at every threshold
    padded = np.pad(piece, (0, size - piece.size))
    kinds = _kinds_of(padded, record.threshold, record.step, record.levels)
    whole = dataclasses.replace(record, kinds=np.asarray(kinds))
    codes[start : start + size] = writer.checked_codes(name, padded, whole)[: piece.size]
  shaped = codes.reshape(array.shape)
  reach = sizes.largest_on_grid(array, shaped, axis)
  return record, shaped, writer.escaped_values(shaped, array), reach


class _Writer:
  """The parts of a file as they come, kept on disk beside its place until the index is known.

  Args:
    output: the place.
    contexts: of the codes.
  """

  def __init__(self, output: str | os.PathLike[str], contexts: bool):
    self._output, self._contexts = output, contexts
    self._specs: list[str] = []
    self._grids: list[list[np.float32]] = []
    self._blocks: list[tuple[int, int]] = []
    self._version, self._front = '1', b''
    self._raw, self._raw_size = bytearray(), 0
    self._packing: collections.deque[Future[bytes]] = collections.deque()
    self._open = contextlib.ExitStack()
    self._codes_file, self._blocks_file = self._spool(), self._spool()
    self._pool = self._open.enter_context(ThreadPoolExecutor())

  def __enter__(self) -> '_Writer':
    return self

  def __exit__(self, *error: Any) -> None:
    self._open.__exit__(*error)

  def add_codes(
    self,
    name: str,
    record: LeafState,
    codes: Int8[np.ndarray, '...'],
    escaped: Shaped[np.ndarray, ' m'],
  ) -> None:
    """Writes a compressed leaf."""
    written = writer.written_leaf(codes, escaped, record, contexts=self._contexts)
    with files.errors_of(self._output):
      self._codes_file.write(written.payload)
    self._grids.append(writer.checked_grid(name, record))
    self._specs.append(written.spec)
    self._version = max(self._version, written.version)

  def add(self, name: str, array: Shaped[np.ndarray, '...']) -> None:
    """Writes an uncompressed leaf."""
    array = writer.host_array(name, array)
    self._specs.append(file_index.spec(array.dtype, array.shape))
    padding = -self._raw_size % array.dtype.itemsize
    as_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    self._raw_size += padding + as_bytes.size
    self._raw += bytes(padding)
    for start in range(0, as_bytes.size, file_index.BLOCK):
      self._raw += as_bytes[start : start + file_index.BLOCK].data
      while len(self._raw) >= file_index.BLOCK:
        self._pack(file_index.BLOCK)

  def finish(self, like_tree: Callable[[list[str]], PyTree], metadata: dict[str, str]) -> None:
    """Makes what comes first in the file; `like_tree` makes the tree of what its leaves have."""
    if self._raw:
      self._pack(len(self._raw))
    while self._packing:
      self._write_block()
    codes_size = self._codes_file.tell()
    noted = like_tree(self._specs)
    rest = self._grids, codes_size, self._blocks, metadata, self._version
    self._front = writer.front(noted, *rest)

  @property
  def size(self) -> int:
    """Bytes of the file, once it is finished."""
    return len(self._front) + self._codes_file.tell() + self._blocks_file.tell()

  def place(self) -> None:
    """Puts the file together in its place."""
    with files.replacing(self._output) as file:
      file.write(self._front)
      for spool in (self._codes_file, self._blocks_file):
        spool.seek(0)
        shutil.copyfileobj(spool, file, 1 << 20)

  def _pack(self, size: int) -> None:
    block = bytes(self._raw[:size])
    del self._raw[:size]
    self._packing.append(self._pool.submit(file_index.pack, block, period=4))
    if len(self._packing) > _AHEAD:
      self._write_block()

  def _write_block(self) -> None:
    packed = self._packing.popleft().result()
    self._blocks.append((len(packed), zlib.crc32(packed)))
    with files.errors_of(self._output):
      self._blocks_file.write(packed)

  def _spool(self) -> BinaryIO:
    file = files.spool(self._output)
    self._open.callback(files.close, file)
    return file
