"""Codes of the weights of a leaf by its compression state, checked, for a file to hold."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int8, Shaped

from opq_jax.compression import CompressionState, LeafState, slice_of
from opq_jax.compression import encode as encode_weights
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.core.trees import slice_name
from opq_jax.file import checks, leaf_entries
from opq_jax.file.coded_leaves import CodedSlice, escaped_values
from opq_jax.file.container import VERSIONS
from opq_jax.file.grids import Grid


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
    yield CodedSlice(codes, escaped_values(codes, weights), grid)


def checked_grid(name: str, record: LeafState) -> Grid:
  """Returns the grid of a leaf's state.

  Raises:
    ValueError: a file cannot hold the levels, the grid or the codebook of the state.
  """
  levels, codebook = int(record.levels), np.asarray(record.codebook)
  if not 0 <= levels <= MAX_LEVELS:
    raise ValueError(f'{name}: found {levels} levels, expected 0 to {MAX_LEVELS}')
  grid = _grid_of(record)
  checks.check_grid(name, grid, VERSIONS[-1])
  # the file has no codebook, only its grid: a reader must get the same bits, -0 told from 0
  if codebook.tobytes() != grid.codebook().tobytes():
    raise ValueError(
      f'{name}: found another codebook than the affine one of first value {grid.first}, step '
      f'{grid.step} and {levels} levels, expected that one'
    )
  return grid


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
  checks.check_cells(name, codes, _grid_of(record))
  return codes


def _grid_of(record: LeafState) -> Grid:
  return Grid(
    threshold=np.float32(record.threshold),
    first=np.asarray(record.codebook)[1],
    step=np.float32(record.step),
    levels=int(record.levels),
    dtype=np.dtype(record.dtype),
  )
