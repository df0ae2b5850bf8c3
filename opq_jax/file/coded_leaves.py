"""The codes of one compressed leaf of a file, and what they say.

Values and codes are NumPy's; JAX is imported where a compression state is asked for.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from opq_jax.coding import decode_codes, escapes, output_scales
from opq_jax.core.array_types import Float32, Int8, Shaped
from opq_jax.core.limits import ESCAPE
from opq_jax.file import checks
from opq_jax.file.grids import Grid
from opq_jax.file.leaf_entries import SliceEntry
from opq_jax.file.output_grids import OutputGrids

if TYPE_CHECKING:
  from opq_jax.compression import LeafState


class CodedSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, as a file codes it.

  Attributes:
    codes: of all weights, -128 where one is escaped.
    escaped: the escaped weights, in C order.
    grids: the value of every code, of each output.
  """

  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  grids: OutputGrids

  def values(self) -> Shaped[np.ndarray, '...']:
    """Returns the weights in the leaf's dtype."""
    values = self.grids.values(self.codes)
    values[self.codes == ESCAPE] = self.escaped
    return values

  def moved(self, axes: tuple[int, ...]) -> 'CodedSlice':
    """Returns the slice with its axes in another order."""
    return CodedSlice(*moved_codes(self.codes, self.escaped, axes), self.grids.moved(axes))


def moved_codes(
  codes: Int8[np.ndarray, '...'], escaped: Shaped[np.ndarray, ' m'], axes: tuple[int, ...]
) -> tuple[Int8[np.ndarray, '...'], Shaped[np.ndarray, ' m']]:
  """Returns codes with their axes in another order, and the escaped weights in that C order."""
  moved = np.ascontiguousarray(codes.transpose(axes))
  if escaped.size:
    places = np.nonzero(codes == ESCAPE)
    order = np.argsort(np.ravel_multi_index([places[axis] for axis in axes], moved.shape))
    escaped = escaped[order]
  return moved, escaped


def escaped_values(
  codes: Int8[np.ndarray, '...'], array: Shaped[np.ndarray, '...']
) -> Shaped[np.ndarray, ' m']:
  """Returns the escaped weights of an array, in C order."""
  return array[codes == ESCAPE]


class CodedLeaf(NamedTuple):
  """A compressed leaf as a file codes it.

  Attributes:
    parts: its slices in C order, or itself.
    slice_shape: shape of the slices' axes; () without slices.
  """

  parts: list[CodedSlice]
  slice_shape: tuple[int, ...]

  def stacked(self, arrays: list[Any]) -> Any:
    """Returns the arrays of all slices as one; of a leaf without slices, its own."""
    if not self.slice_shape:
      return arrays[0]
    return np.stack(arrays).reshape(*self.slice_shape, *np.shape(arrays[0]))

  def moved(self, axes: tuple[int, ...]) -> 'CodedLeaf':
    """Returns the leaf with the axes of every slice in another order."""
    return CodedLeaf([part.moved(axes) for part in self.parts], self.slice_shape)

  def codes(self) -> Int8[np.ndarray, '...']:
    """Returns the codes of all weights."""
    return self.stacked([part.codes for part in self.parts])

  def values(self) -> Shaped[np.ndarray, '...']:
    """Returns the weights in the leaf's dtype."""
    return self.stacked([part.values() for part in self.parts])

  def output_scales(self) -> Float32[np.ndarray, '...'] | None:
    """Returns the scales of all outputs as they broadcast over the weights; None without any."""
    scales = [part.grids.over_weights(part.codes.ndim) for part in self.parts]
    return None if any(own is None for own in scales) else self.stacked(scales)

  def state(self) -> 'LeafState':
    """Returns the state that compresses the weights to these codes."""
    import jax.numpy as jnp

    from opq_jax.compression import LeafState
    from opq_jax.compression.records import kinds_of_codes

    grids = [part.grids.grid for part in self.parts]
    scales = self.output_scales()
    arrays: dict[str, Any] = {
      'kinds': kinds_of_codes(self.codes()),
      'codebook': self.stacked([grid.codebook() for grid in grids]),
      'threshold': self.stacked([np.array(grid.threshold) for grid in grids]),
      'step': self.stacked([np.array(grid.step) for grid in grids]),
      'levels': self.stacked([np.array(grid.levels, np.int32) for grid in grids]),
    }
    return LeafState(
      **{name: jnp.asarray(array) for name, array in arrays.items()},
      dtype=grids[0].dtype,
      slices=len(self.slice_shape),
      output_scales=None if scales is None else jnp.asarray(scales),
    )


def coded_slice(
  name: str,
  data: bytes,
  shape: tuple[int, ...],
  part: SliceEntry,
  grid: Grid,
  scale_axis: int | None = None,
) -> CodedSlice:
  """Decodes and checks a slice of a compressed leaf, or the leaf.

  Args:
    name: for messages.
    data: the payload.
    shape: of the array that it codes.
    part: its numbers in the index.
    grid: its row of `grids`.
    scale_axis: the axis of that array whose outputs have scales; None without scales.

  Raises:
    ValueError: it is damaged.
  """
  try:
    begin, end = part.scale_bytes, part.stored - part.escape_bytes
    # the shape is only a claim, which the payload bounds before memory is taken for it
    codes = decode_codes(data[begin:end], shape)
    scales = None if scale_axis is None else output_scales.decode(data[:begin], shape[scale_axis])
    checks.check_levels(codes, part.levels)
    positions, escaped = escapes.decode(data[end:], codes.size, part.escapes, grid.dtype)
    flat = codes.reshape(-1)
    if bad := int(np.count_nonzero(flat[positions])):
      raise ValueError(f'found {bad} escaped weights that have codes as well, expected none')
    if bad := escaped.size - int(np.count_nonzero(np.isfinite(escaped))):
      raise ValueError(f'found {bad} escaped weights that are NaN or infinite, expected none')
    flat[positions] = ESCAPE
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  grids = OutputGrids(grid, scales, scale_axis or 0)
  grids.check_grids(name)
  grids.check_cells(name, codes)
  return CodedSlice(codes, escaped, grids)
