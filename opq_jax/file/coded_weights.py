"""Codes of the weights of a leaf by its compression state, checked, for a file to hold."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int8, Shaped

from opq_jax.coding import output_scales
from opq_jax.compression import CompressionState, LeafState, slice_of
from opq_jax.compression import encode as encode_weights
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.core.trees import slice_name
from opq_jax.file import checks, leaf_entries
from opq_jax.file.coded_leaves import CodedSlice, escaped_values
from opq_jax.file.container import VERSIONS
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids


def coded_slices(
  name: str, array: Shaped[np.ndarray, '...'], record: LeafState
) -> Iterator[CodedSlice]:
  """Returns the slices of a compressed leaf in C order, or the leaf, coded and checked.

  Raises:
    ValueError: as `checked_grids` and `checked_codes`.
  """
  if record.slices:
    # on the host, where slices are views
    record = jax.device_get(record)
  for index in np.ndindex(record.slice_shape):
    own_name, own, weights = slice_name(name, index), slice_of(record, index), array[index]
    grids = checked_grids(own_name, own, weights.shape)
    codes = checked_codes(own_name, weights, own)
    yield CodedSlice(codes, escaped_values(codes, weights), grids)


def checked_grids(name: str, record: LeafState, shape: tuple[int, ...]) -> OutputGrids:
  """Returns the grids of the outputs of a leaf without slices, of this shape.

  Raises:
    ValueError: a file cannot hold the levels, the grid, the codebook or the output scales of the
      state.
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
  try:
    grids = OutputGrids.of(grid, record.output_scales, shape)
    if grids.scales is not None:
      output_scales.codes_of(grids.scales)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  grids.check_grids(name)
  return grids


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
  OutputGrids.of(_grid_of(record), record.output_scales, array.shape).check_cells(name, codes)
  return codes


def _grid_of(record: LeafState) -> Grid:
  return Grid(
    threshold=np.float32(record.threshold),
    first=np.asarray(record.codebook)[1],
    step=np.float32(record.step),
    levels=int(record.levels),
    dtype=np.dtype(record.dtype),
  )
