"""Codes of one leaf, computed in pieces of one size: one compiled program, little memory."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Shaped

from opq_jax import compression
from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.compression import LeafState, slice_of
from opq_jax.compression.records import ON_GRID, kinds_of
from opq_jax.core import axes
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.trees import slice_name
from opq_jax.file import coded_weights, written_leaves
from opq_jax.file.coded_leaves import CodedSlice, escaped_values
from opq_jax.file.output_grids import OutputGrids
from opq_jax.report import leaf_sizes

_PIECE = 1 << 20  # weights coded at a time (4 MiB of float32): large enough to hide JAX's overhead

_kinds_of = jax.jit(kinds_of)


class CodedPart(NamedTuple):
  """A slice of a leaf, or the leaf, and its codes.

  Attributes:
    coded: its codes, its escaped weights and its grid.
    largest: see `opq_jax.report.leaf_sizes.largest_on_grid`.
  """

  coded: CodedSlice
  largest: Float32[np.ndarray, ' channels']


def coded_parts(
  name: str, array: Shaped[np.ndarray, '...'], allocated: LeafAllocation, axis: ChannelAxes
) -> Iterator[CodedPart]:
  """Codes a leaf like `opq_jax.encode(params, opq_jax.init_state(params, allocation))`.

  Args:
    name: the leaf's name, for error messages.
    array: its weights.
    allocated: its allocation.
    axis: the axis of its output channels.

  Returns:
    Its slices in C order, or itself.

  Raises:
    ValueError: the leaf is not of finite floats, or a grid is too fine for its dtype.
  """
  array = written_leaves.host_array(name, array)
  record = _without_kinds(name, array.dtype, allocated)
  axis = axes.in_slice(axis, allocated.slices)
  for index in np.ndindex(allocated.slice_shape):
    state = slice_of(record, index)
    has_palette = allocated.palette_bits is not None
    yield _coded_part(slice_name(name, index), array[index], state, axis, has_palette)


def plain_state(
  name: str, array: Shaped[np.ndarray, '...'], allocated: LeafAllocation
) -> LeafState:
  """Returns the state that `opq_jax.init_state(params, allocation)` has of a leaf, on the host."""
  record, kinds = _without_kinds(name, array.dtype, allocated), np.empty(array.shape, np.uint8)
  for index in np.ndindex(allocated.slice_shape):
    state = slice_of(record, index)
    grids = coded_weights.checked_grids(slice_name(name, index), state, array[index].shape)
    of_slice = kinds[index].reshape(-1)
    for piece in _pieces(array[index], state, grids, allocated.palette_bits is not None):
      of_slice[piece.start : piece.stop] = piece.state.kinds[: piece.stop - piece.start]
  own: Any = kinds
  return dataclasses.replace(record, kinds=own)


def _without_kinds(name: str, dtype: np.dtype, allocated: LeafAllocation) -> LeafState:
  """Returns the state of a leaf but for its kinds, which are those of no weight."""
  # the grid of a leaf does not depend on its weights: the state of an empty leaf has it
  empty, scales = (*allocated.slice_shape, 0), allocated.output_scales
  one = None if scales is None else np.ones(len(empty) * (1,), np.float32)
  own = dataclasses.replace(allocated, shape=empty, channel_axis=0, output_scales=one)
  tree = {name: np.zeros(empty, dtype)}
  record: LeafState = jax.device_get(
    compression.init_state(tree, Allocation({name: own})).tree[name]
  )
  if scales is not None:
    record = dataclasses.replace(record, output_scales=np.asarray(scales))
  return record


class _Piece(NamedTuple):
  """Weights of a leaf next to each other, padded with zeros to a size that others have too.

  Attributes:
    start, stop: their places in C order.
    weights: with the padding.
    state: of these weights.
  """

  start: int
  stop: int
  weights: Shaped[np.ndarray, ' size']
  state: LeafState


def _pieces(
  array: Shaped[np.ndarray, '...'], record: LeafState, grids: OutputGrids, has_palette: bool
) -> Iterator[_Piece]:
  """Cuts a slice of a leaf, or the leaf, into pieces; the kinds of its state are not read."""
  flat = array.reshape(-1)
  # of a small leaf the next power of two: few sizes, few programs
  size = min(_PIECE, 1 << max(flat.size - 1, 0).bit_length())
  for start in range(0, flat.size, size):
    piece = flat[start : start + size]
    # padded with zeros, which every threshold prunes
    padded = np.pad(piece, (0, size - piece.size))
    scales = grids.of_weights(array.shape, start, start + piece.size)
    if scales is not None:
      scales = np.pad(scales, (0, size - piece.size), constant_values=1)
    kinds = _kinds_of(padded, record.threshold, record.step, record.levels, scales)
    if has_palette:  # nothing escapes
      kinds = np.minimum(kinds, np.uint8(ON_GRID))
    state = dataclasses.replace(record, kinds=kinds, output_scales=scales)
    yield _Piece(start, start + piece.size, padded, state)


def _coded_part(
  name: str,
  array: Shaped[np.ndarray, '...'],
  record: LeafState,
  axis: ChannelAxes,
  has_palette: bool,
) -> CodedPart:
  """Codes a slice of a leaf, or the leaf; the kinds of its state are not read."""
  codes = np.empty(array.size, np.int8)
  grids = coded_weights.checked_grids(name, record, array.shape)
  for piece in _pieces(array, record, grids, has_palette):
    found = coded_weights.checked_codes(name, piece.weights, piece.state)
    codes[piece.start : piece.stop] = found[: piece.stop - piece.start]
  shaped = codes.reshape(array.shape)
  largest = leaf_sizes.largest_on_grid(grids.in_units(array), shaped, axis)
  return CodedPart(CodedSlice(shaped, escaped_values(shaped, array), grids), largest)
