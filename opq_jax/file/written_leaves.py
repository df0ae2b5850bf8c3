"""Compressed leaves as a file holds them: the codes of their slices, written."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from opq_jax.coding import axis_orders, encode_codes, escapes, output_scales
from opq_jax.core.limits import ESCAPE
from opq_jax.file import leaf_entries
from opq_jax.file.coded_leaves import CodedSlice


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
  scale_axis = rotated_axis = None
  for part in coded:
    written = written_slice(part, contexts=contexts, axes=axes)
    write(written.payload)
    entries.append(written.entry)
    grids.append(part.grids.grid.row())
    version = max(version, written.version)
    dtype = part.dtype
    if part.rotation is not None:
      rotated_axis = part.rotation.axis
    if part.grids.scales is not None:
      scale_axis = part.grids.axis
  spec = leaf_entries.compressed_spec(dtype, shape, entries, slices, axes, scale_axis, rotated_axis)
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


def written_slice(coded: CodedSlice, *, contexts: bool, axes: tuple[int, ...] = ()) -> WrittenSlice:
  """Returns a slice of a compressed leaf, or the leaf, as a file holds it.

  Args:
    coded: its codes, with -128 where a weight is escaped.
    contexts: as for `opq_jax.coding.encode_codes`.
    axes: as for `write_leaf`.
  """
  section = b''
  codes, values, grids, rotation = coded.moved(axes) if axes else coded
  if values.size:
    positions = np.flatnonzero(codes == ESCAPE)
    section = escapes.encode(positions, values)
    codes = codes.copy()
    codes.reshape(-1)[positions] = 0
  scales = b'' if grids.scales is None else output_scales.encode(grids.scales)
  payload = scales + encode_codes(codes, contexts=contexts) + section
  grid, sizes = grids.grid, (len(section), len(scales))
  entry = leaf_entries.SliceEntry(grid.levels, len(payload), values.size, *sizes)
  is_plain = not (scales or section or rotation or grid.level_values().rounds)
  return WrittenSlice(payload, entry, '1' if is_plain else '2')


def host_array(name: str, leaf: Any) -> Shaped[np.ndarray, '...']:
  """Returns a leaf on the host, in the byte order of this machine.

  Raises:
    ValueError: it is no array of numbers, or of a dtype that the format lacks.
  """
  try:
    array = np.asarray(leaf)
  except TypeError as error:  # keys of random numbers, tracers
    raise ValueError(f'{name}: found {type(leaf).__name__}, expected an array: {error}') from error
  # a name says nothing of the byte order, and the dtype of the table is native
  dtype = leaf_entries.DTYPES.get(array.dtype.name)
  if dtype is None:
    raise ValueError(
      f'{name}: found {type(leaf).__name__} of dtype {array.dtype}, expected an array of numbers '
      f'of a dtype that files hold: {", ".join(leaf_entries.DTYPES)}'
    )
  return array.astype(dtype, copy=False)
