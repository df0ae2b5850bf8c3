"""The codes of one compressed leaf of a file, and what they say.

Values and codes are NumPy's; JAX is imported where a compression state is asked for.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from opq_jax.coding import decode_codes, escapes, output_scales, rotations
from opq_jax.core.array_types import Float32, Int8, Shaped
from opq_jax.core.limits import ESCAPE
from opq_jax.file import checks
from opq_jax.file.grids import Grid
from opq_jax.file.leaf_entries import SliceEntry
from opq_jax.file.output_grids import OutputGrids

if TYPE_CHECKING:
  from opq_jax.compression import LeafState


_LARGEST = float(np.finfo(np.float32).max)


class Rotation(NamedTuple):
  """How the weights of a leaf come from those that are coded (`opq_jax.coding.rotations`).

  Attributes:
    axis: of the inputs that are rotated.
    dtype: of the leaf; what is coded is of float32.
  """

  axis: int
  dtype: np.dtype

  def restored(self, values: Float32[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns the weights of a leaf, of the values that are coded, rounded to its dtype."""
    # at most the largest number of the dtype, as on every grid
    largest = np.float32(min(float(ml_dtypes.finfo(self.dtype).max), _LARGEST))
    return np.clip(rotations.restored(values, self.axis), -largest, largest).astype(self.dtype)

  def check(self, values: Shaped[np.ndarray, '...']) -> None:
    """Checks that no sum of the values that are coded overflows.

    Raises:
      ValueError: one might.
    """
    # sums of 2^k values, by 2^(k/2) once: 2^(3k/2) times the largest at most
    inputs, largest = values.shape[self.axis], float(np.max(np.abs(values), initial=0))
    if not largest * inputs**2 <= _LARGEST:
      raise ValueError(
        f'found rotated weights of {largest:g} over {inputs} inputs, expected sums that float32 '
        'holds'
      )

  def moved(self, axes: tuple[int, ...]) -> 'Rotation':
    """Returns the rotation of the leaf with its axes in another order."""
    return self._replace(axis=axes.index(self.axis))


class CodedSlice(NamedTuple):
  """A slice of a compressed leaf, or the leaf, as a file codes it.

  Attributes:
    codes: of all weights, -128 where one is escaped.
    escaped: the escaped weights, in C order.
    grids: the value of every code, of each output.
    rotation: of the weights; None where codes are theirs, as nearly always.
  """

  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  grids: OutputGrids
  rotation: Rotation | None = None

  @property
  def dtype(self) -> np.dtype:
    """The leaf's dtype."""
    return self.grids.grid.dtype if self.rotation is None else self.rotation.dtype

  def coded_values(self) -> Shaped[np.ndarray, '...']:
    """Returns the values of the codes, with escaped weights: of a rotated leaf, rotated ones."""
    values = self.grids.values(self.codes)
    values[self.codes == ESCAPE] = self.escaped
    return values

  def values(self) -> Shaped[np.ndarray, '...']:
    """Returns the weights in the leaf's dtype."""
    values = self.coded_values()
    return values if self.rotation is None else self.rotation.restored(values)

  def moved(self, axes: tuple[int, ...]) -> 'CodedSlice':
    """Returns the slice with its axes in another order."""
    rotation = None if self.rotation is None else self.rotation.moved(axes)
    codes, escaped = moved_codes(self.codes, self.escaped, axes)
    return CodedSlice(codes, escaped, self.grids.moved(axes), rotation)


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

  def coded_values(self) -> Shaped[np.ndarray, '...']:
    """Returns the values of the codes: of a rotated leaf, rotated weights in float32."""
    return self.stacked([part.coded_values() for part in self.parts])

  def output_scales(self) -> Float32[np.ndarray, '...'] | None:
    """Returns the scales of all outputs as they broadcast over the weights; None without any."""
    scales = [part.grids.over_weights(part.codes.ndim) for part in self.parts]
    return None if any(own is None for own in scales) else self.stacked(scales)

  def state(self) -> 'LeafState | None':
    """Returns the state that compresses the weights to these codes; None of a rotated leaf."""
    import jax.numpy as jnp

    from opq_jax.compression import LeafState
    from opq_jax.compression.records import kinds_of_codes

    if self.parts[0].rotation is not None:
      return None
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
      output_scales=None if scales is None else jnp.asarray(scales),
    )


def coded_slice(
  name: str,
  data: bytes,
  shape: tuple[int, ...],
  part: SliceEntry,
  grid: Grid,
  scale_axis: int | None = None,
  rotation: Rotation | None = None,
) -> CodedSlice:
  """Decodes and checks a slice of a compressed leaf, or the leaf.

  Args:
    name: for messages.
    data: the payload.
    shape: of the array that it codes.
    part: its numbers in the index.
    grid: its row of `grids`.
    scale_axis: the axis of that array whose outputs have scales; None without scales.
    rotation: of that array; None where its codes are those of the weights.

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
  coded = CodedSlice(codes, escaped, grids, rotation)
  if rotation is not None:
    try:
      rotation.check(coded.coded_values())
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
  return coded
