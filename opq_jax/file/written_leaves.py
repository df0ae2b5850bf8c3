"""Compressed leaves as a file holds them: their slices, coded, checked and written."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int8, Shaped

from opq_jax.coding import axis_orders, encode_codes, escapes
from opq_jax.compression import CompressionState, LeafState, slice_of
from opq_jax.compression import encode as encode_weights
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.core.trees import slice_name
from opq_jax.file import checks, leaf_entries
from opq_jax.file.coded_leaves import moved_codes
from opq_jax.file.container import VERSIONS
from opq_jax.file.grids import Grid


class CodedSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, before its codes are written.

  Attributes:
    codes: of all weights, -128 where one is escaped.
    escaped: the escaped weights, in C order.
    record: its state, of which the kinds are not read.
    grid: its row of `grids`.
  """

  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  record: LeafState
  grid: list[np.float32]


class WrittenSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, as a file holds it.

  Attributes:
    payload: its bytes in `codes`.
    entry: its numbers in the index.
    version: the least version of the format that holds it.
  """

  payload: bytes
  entry: leaf_entries.SliceEntry
  version: str


class WrittenLeaf(NamedTuple):
  """A compressed leaf as a file holds it, without its payloads.

  Attributes:
    spec: its notation in the index.
    grids: the rows of its slices.
    version: the least version of the format that holds it.
  """

  spec: str
  grids: list[list[np.float32]]
  version: str


def coded_slices(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Iterator[CodedSlice]:
  """Returns the slices of a compressed leaf in C order, or the leaf, coded and checked.

  Raises:
    ValueError: as `checked_grid` and `checked_codes`.
  """
  if record.slices:
    # on the host, where slices are views
    record = jax.device_get(record)
  for index in np.ndindex(record.slice_shape):
    own_name, own, weights = slice_name(name, index), slice_of(record, index), array[index]
    grid = checked_grid(own_name, own)
    codes = checked_codes(own_name, weights, own)
    yield CodedSlice(codes, escaped_values(codes, weights), own, grid)


def write_leaf(
  coded: Iterable[CodedSlice],
  shape: tuple[int, ...],
  slices: int,
  write: Callable[[bytes], Any],
  *,
  contexts: bool,
  axes: tuple[int, ...] = (),
) -> WrittenLeaf:
  """Writes the payloads of a compressed leaf, one after the other.

  Args:
    coded: its slices in C order, or itself.
    shape: of the whole leaf.
    slices: leading axes that count slices.
    write: takes each payload.
    contexts: as for `opq_jax.coding.encode_codes`.
    axes: the order in which the payloads have the axes, from `axes_of`.
  """
  entries, grids, version = [], [], '2' if slices or axes else '1'
  for codes, escaped, record, grid in coded:
    written = written_slice(codes, escaped, record, contexts=contexts, axes=axes)
    write(written.payload)
    entries.append(written.entry)
    grids.append(grid)
    version = max(version, written.version)
    dtype = np.dtype(record.dtype)
  spec = leaf_entries.compressed_spec(dtype, shape, entries, slices, axes)
  return WrittenLeaf(spec, grids, version)


def axes_of(coded: Iterable[CodedSlice]) -> tuple[int, ...]:
  """Returns the order of axes in which the codes of a leaf follow the trellis.

  () where they stay as they are (`opq_jax.coding.axis_orders`).  One order for all slices: that of
  the first slice that has another one than its own.
  """
  for part in coded:
    codes = np.where(part.codes == ESCAPE, np.int8(0), part.codes)
    axes = axis_orders.of_trellis(codes)
    if axes != tuple(range(codes.ndim)):
      return axes
  return ()


def escaped_values(
  codes: Int8[np.ndarray, '...'], array: Shaped[np.ndarray, '...']
) -> Shaped[np.ndarray, ' m']:
  """Returns the escaped weights of an array, in C order."""
  return array[codes == ESCAPE]


def written_slice(
  codes: Int8[np.ndarray, '...'],
  values: Shaped[np.ndarray, ' m'],
  record: LeafState,
  *,
  contexts: bool,
  axes: tuple[int, ...] = (),
) -> WrittenSlice:
  """Returns a slice of a compressed leaf, or the leaf, as a file holds it.

  Args:
    codes: of all weights, -128 where one is escaped.
    values: the escaped weights, in C order.
    record: its state, of which the kinds are not read.
    contexts: as for `opq_jax.coding.encode_codes`.
    axes: as for `write_leaf`.
  """
  section = b''
  if axes:
    codes, values = moved_codes(codes, values, axes)
  if values.size:
    positions = np.flatnonzero(codes == ESCAPE)
    section = escapes.encode(positions, values)
    codes = codes.copy()
    codes.reshape(-1)[positions] = 0
  payload = encode_codes(codes, contexts=contexts) + section
  entry = leaf_entries.SliceEntry(int(record.levels), len(payload), values.size, len(section))
  rounds = grid_of(record).level_values().rounds
  return WrittenSlice(payload, entry, '2' if section or rounds else '1')


def host_array(name: str, leaf: Any) -> Shaped[np.ndarray, '...']:
  """Returns a leaf on the host, in the byte order of this machine.

  Raises:
    ValueError: it is no array of numbers.
  """
  try:
    array = np.asarray(leaf)
  except TypeError as error:  # keys of random numbers, tracers
    raise ValueError(f'{name}: found {type(leaf).__name__}, expected an array: {error}') from error
  # a name says nothing of the byte order, and the dtype of the table is native
  dtype = leaf_entries.DTYPES.get(array.dtype.name)
  if dtype is None:
    raise ValueError(
      f'{name}: found {type(leaf).__name__} of dtype {array.dtype}, expected an array of numbers'
    )
  return array.astype(dtype, copy=False)


def checked_grid(name: str, record: LeafState) -> list[np.float32]:
  """Returns the row of `grids` of a compressed leaf: threshold, first value and step.

  Raises:
    ValueError: a file cannot hold the levels, the grid or the codebook of the state.
  """
  levels, codebook = int(record.levels), np.asarray(record.codebook)
  if not 0 <= levels <= MAX_LEVELS:
    raise ValueError(f'{name}: found {levels} levels, expected 0 to {MAX_LEVELS}')
  grid = grid_of(record)
  checks.check_grid(name, grid, VERSIONS[-1])
  # the file has no codebook, only its grid: a reader must get the same bits, -0 told from 0
  if codebook.tobytes() != grid.codebook().tobytes():
    raise ValueError(
      f'{name}: found another codebook than the affine one of first value {grid.first}, step '
      f'{grid.step} and {levels} levels, expected that one'
    )
  return [grid.threshold, grid.first, grid.step]


def grid_of(record: LeafState) -> Grid:
  """Returns the grid of a leaf's state."""
  return Grid(
    threshold=np.float32(record.threshold),
    first=np.asarray(record.codebook)[1],
    step=np.float32(record.step),
    levels=int(record.levels),
    dtype=np.dtype(record.dtype),
  )


def checked_codes(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Int8[np.ndarray, '...']:
  """Returns the codes of a leaf, whose values have these codes again.

  Raises:
    ValueError: the dtype cannot be compressed, a weight is not finite, or the value of a code lies
      in another cell.
  """
  if not leaf_entries.can_be_compressed(array.dtype):
    raise ValueError(f'{name}: found dtype {array.dtype}, expected floats of whole bytes')
  if bad := array.size - int(np.count_nonzero(np.isfinite(array))):
    raise ValueError(f'{name}: found {bad} weights that are NaN or infinite, expected none')
  try:
    codes = np.asarray(encode_weights(array, CompressionState(record)))
    checks.check_levels(np.where(codes == ESCAPE, np.int8(0), codes), int(record.levels))
  except ValueError as error:
    # `encode` was given a tree that is one leaf, whose path name is empty
    raise ValueError(f'{name}: {str(error).removeprefix(": ")}') from error
  checks.check_cells(name, codes, grid_of(record))
  return codes
