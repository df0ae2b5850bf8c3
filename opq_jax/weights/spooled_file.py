"""Writes an `.opq` file whose parts are larger than memory.

The index comes first in a file and is known last.  Payloads and blocks are therefore spooled to
unnamed files on the same disk, and joined behind the index once every leaf is coded.
"""

import collections
import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from opq_jax.core import files
from opq_jax.core.trees import PyTree
from opq_jax.file import front as file_front
from opq_jax.file import leaf_entries, packing, writer, written_leaves
from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.file.repeated_leaves import RepeatedLeaves
from opq_jax.file.side_files import SideFiles

_MAX_PENDING = 8  # blocks of 1 MiB packed by threads or waiting for it: a bound of memory
_COPY = 1 << 20  # bytes copied at a time


class SpooledFile:
  """The parts of an `.opq` file, in the order of its leaves.  A context manager.

  Its bytes are those of `opq_jax.file.serialize` for the same leaves.

  Args:
    output: the place of the file; it stays as it is until `place`.
    contexts: see `opq_jax.save`.
  """

  def __init__(self, output: str | os.PathLike[str], contexts: bool):
    self._output, self._contexts = output, contexts
    self._specs: list[str] = []
    self._grids: list[list[np.float32]] = []
    self._blocks: list[tuple[int, int]] = []
    self._version, self._front, self._side = '1', b'', b''
    self._raw, self._raw_size = bytearray(), 0
    self._repeated = RepeatedLeaves()
    self._pending: collections.deque[Future[bytes]] = collections.deque()
    self._open = contextlib.ExitStack()
    self._codes_file, self._blocks_file = self._spool(), self._spool()
    self._pool = self._open.enter_context(ThreadPoolExecutor())

  def __enter__(self) -> 'SpooledFile':
    return self

  def __exit__(self, *error: Any) -> None:
    self._open.__exit__(*error)

  def add_codes(
    self,
    coded: Iterable[CodedSlice],
    shape: tuple[int, ...],
    slices: int = 0,
    axes: tuple[int, ...] = (),
  ) -> None:
    """Adds a compressed leaf.

    Args:
      coded: its slices in C order, or itself.
      shape: of the whole leaf.
      slices: leading axes that count slices.
      axes: the order in which the payloads have the axes (`written_leaves.axes_of`).
    """

    def write(payload: bytes) -> None:
      with files.errors_of(self._output):
        self._codes_file.write(payload)

    written = written_leaves.write_leaf(
      coded, shape, slices, write, contexts=self._contexts, axes=axes
    )
    self._grids += written.grids
    self._specs.append(written.spec)
    self._version = max(self._version, written.version)

  def add_tied(
    self, dtype: np.dtype, shape: tuple[int, ...], number: int, is_transposed: bool
  ) -> None:
    """Adds a leaf that is an earlier one again, or its transpose.

    Args:
      dtype, shape: the leaf's own.
      number: of the earlier leaf.
      is_transposed: whether the leaf is the transpose.
    """
    self._specs.append(leaf_entries.tied_spec(dtype, shape, number, is_transposed))
    self._version = max(self._version, writer.TIED_VERSION)

  def add(self, name: str, array: Shaped[np.ndarray, '...']) -> None:
    """Adds an uncompressed leaf; a large one that is an earlier one again takes no bytes."""
    array = written_leaves.host_array(name, array)
    if (again := self._repeated.first(len(self._specs), array)) is not None:
      self.add_tied(array.dtype, array.shape, again, False)
      return
    self._specs.append(leaf_entries.spec(array.dtype, array.shape))
    # each leaf begins at a multiple of its item size
    padding = -self._raw_size % array.dtype.itemsize
    as_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    self._raw_size += padding + as_bytes.size
    self._raw += bytes(padding)
    # a block at a time: the buffer holds two blocks at most, however large the leaf is
    for start in range(0, as_bytes.size, packing.BLOCK):
      self._raw += as_bytes[start : start + packing.BLOCK].data
      while len(self._raw) >= packing.BLOCK:
        self._pack(packing.BLOCK)

  def finish(
    self,
    unflatten: Callable[[list[str]], PyTree],
    metadata: dict[str, str],
    side_files: tuple[SideFiles, bytes] | None = None,
  ) -> None:
    """Makes header, grids and index.

    Args:
      unflatten: makes the tree of the file from a list with an entry for each leaf.
      metadata: the user's metadata.
      side_files: as `opq_jax.file.side_files.packed_files` returns them.
    """
    carried, self._side = side_files or (None, b'')
    if self._raw:
      self._pack(len(self._raw))
    while self._pending:
      self._write_block()
    codes_size = self._codes_file.tell()
    self._front = file_front.front_bytes(
      unflatten(self._specs),
      self._grids,
      codes_size,
      self._blocks,
      metadata,
      self._version,
      carried,
    )

  @property
  def size(self) -> int:
    """Bytes of the finished file."""
    parts = self._codes_file.tell() + self._blocks_file.tell()
    return len(self._front) + parts + len(self._side)

  def place(self) -> None:
    """Joins the parts and moves the file to its place.

    Raises:
      OSError: the file cannot be written; the file that was there stays.
    """
    with files.replacing(self._output) as file:
      file.write(self._front)
      for spool in (self._codes_file, self._blocks_file):
        spool.seek(0)
        shutil.copyfileobj(spool, file, _COPY)
      file.write(self._side)

  def _pack(self, size: int) -> None:
    """Has a thread pack the next block of uncompressed bytes."""
    block = bytes(self._raw[:size])
    del self._raw[:size]
    self._pending.append(self._pool.submit(packing.pack, block, packing.FLOAT_PERIOD))
    # blocks are written in order; waiting for the oldest one also keeps a fast reader of leaves
    # from filling memory with blocks
    if len(self._pending) > _MAX_PENDING:
      self._write_block()

  def _write_block(self) -> None:
    packed = self._pending.popleft().result()
    self._blocks.append((len(packed), zlib.crc32(packed)))
    with files.errors_of(self._output):
      self._blocks_file.write(packed)

  def _spool(self) -> BinaryIO:
    file = files.spool(self._output)
    self._open.callback(files.close, file)
    return file
