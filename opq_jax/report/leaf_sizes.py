"""The sizes of one compressed leaf, from its codes and its grid."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int8, Shaped

from opq_jax.coding import output_scales
from opq_jax.coding.payload import entropy
from opq_jax.core import axes
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.file.coded_leaves import CodedLeaf
from opq_jax.file.output_grids import OutputGrids
from opq_jax.report.records import CompressedLeaf

_PIECE = 1 << 18  # weights converted to float32 at a time (1 MiB): a leaf may be half of the memory


def largest_on_grid(
  weights: Shaped[np.ndarray, '...'], codes: Int8[np.ndarray, '...'], axis: ChannelAxes
) -> Float32[np.ndarray, ' channels']:
  """Returns the largest |w| on the grid in every output channel, 0 for a channel without any.

  Args:
    weights: a leaf, over its output scales; a vector is one channel.
    codes: its codes, of the same shape.
    axis: the axis, or axes, of the output channels.

  >>> weights, codes = np.array([[3.0, 1.0], [9.0, 2.0]]), np.array([[5, 0], [-128, 3]], np.int8)
  >>> largest_on_grid(weights, codes, axis=1).tolist()
  [3.0, 2.0]
  """
  shape = 1, 1, weights.size
  if weights.ndim > 1:
    codes, _ = axes.joined(codes, axis)
    weights, own = axes.joined(weights, axis)
    before, after = weights.shape[:own], weights.shape[own + 1 :]
    shape = math.prod(before), weights.shape[own], math.prod(after)
  weights, codes = weights.reshape(shape), codes.reshape(shape)
  before, channels, after = weights.shape
  largest = np.zeros(channels, np.float32)
  # pieces of whole runs along the last axis: several rows of channels, or part of one
  columns = max(1, _PIECE // max(after, 1))
  rows = max(1, columns // max(channels, 1))
  for row, column in itertools.product(range(0, before, rows), range(0, channels, columns)):
    part = np.s_[row : row + rows, column : column + columns]
    is_on_grid = (codes[part] != 0) & (codes[part] != ESCAPE)
    maxima = np.max(np.abs(weights[part].astype(np.float32)), (0, 2), where=is_on_grid, initial=0)
    np.maximum(largest[part[1]], maxima, out=largest[part[1]])
  return largest


def compressed_leaf(
  path: str,
  grids: OutputGrids,
  codes: Int8[np.ndarray, '...'],
  largest: Float32[np.ndarray, ' channels'],
  axis: ChannelAxes,
  stored: int,
  dtype: np.dtype,
  *,
  is_rotated: bool = False,
) -> CompressedLeaf:
  """Returns the four sizes of one leaf (docs/method/index.md).

  Args:
    path: the leaf's name.
    grids: threshold, step, levels and dtype, and the scales of its outputs.
    codes: its codes, in its shape.
    largest: `largest_on_grid` of its weights; ignored for channels without weights on the grid.
    axis: the axis, or axes, of the output channels.
    stored: bytes of the leaf in the file.
    dtype: of the leaf; of a rotated one, another than that of its escaped values.
    is_rotated: whether the codes are those of rotated inputs.
  """
  grid, scales = grids.grid, grids.scales
  own = axes.numbers_of(axis, codes.ndim) if codes.ndim > 1 else ()
  other_axes = tuple(i for i in range(codes.ndim) if i not in own)
  survivors = np.ravel(np.count_nonzero(codes, axis=other_axes))
  escapes = np.ravel(np.count_nonzero(codes == ESCAPE, axis=other_axes))
  reach = largest - float(grid.threshold)
  bits = 1 + np.log2(np.clip(reach / float(grid.step), 1, MAX_LEVELS))
  kept, escaped = int(survivors.sum()), int(escapes.sum())
  # if weights escape, 'escaped' is one more symbol of a survivor
  symbols = 2 * grid.levels + (escaped > 0)
  width = math.ceil(math.log2(symbols)) if symbols else 0
  values = escaped * np.dtype(grid.dtype).itemsize
  # a byte each, or as they are coded
  wide, coded = (0, 0) if scales is None else (scales.size, len(output_scales.encode(scales)))
  row_axes = tuple(range(1, codes.ndim))
  dead_rows = int(np.count_nonzero(~codes.any(axis=row_axes))) if codes.ndim > 1 else 0
  return CompressedLeaf(
    path=path,
    shape=codes.shape,
    dtype=dtype.name,
    weights=codes.size,
    survivors=kept,
    escaped=escaped,
    levels=grid.levels,
    dead_channels=int(np.count_nonzero(survivors == 0)),
    dead_rows=dead_rows,
    original=codes.size * dtype.itemsize,
    nominal=float(np.sum((survivors - escapes) * bits)) / 8 + values,
    packed=-(-(kept * width) // 8) + -(-codes.size // 8) + 4 * grid.levels + values + wide,
    entropy=codes.size * entropy(codes) / 8 + values + coded,
    file=stored,
    is_rotated=is_rotated,
  )


def sizes_of_coded(
  path: str,
  coded: CodedLeaf,
  weights: Shaped[np.ndarray, '...'],
  axis: ChannelAxes,
  stored: int,
) -> CompressedLeaf:
  """Returns the sizes of a leaf as a file codes it, all slices together.

  Args:
    path: the leaf's name.
    coded: its codes.
    weights: on which ranges are measured, rotated where those of the codes are.
    axis: the axis, or axes, of the output channels, of the whole leaf.
    stored: bytes of the leaf in the file.
  """
  slices = len(coded.slice_shape)
  axis, rows = axes.in_slice(axis, slices), []
  for index, part in zip(np.ndindex(coded.slice_shape), coded.parts, strict=True):
    largest = largest_on_grid(part.grids.in_units(weights[index]), part.codes, axis)
    facts = path, part.grids, part.codes, largest, axis, stored, part.dtype
    rows.append(compressed_leaf(*facts, is_rotated=part.rotation is not None))
  return sum_of_slices(path, weights.shape, rows, stored) if slices else rows[0]


def sum_of_slices(
  path: str, shape: tuple[int, ...], slices: Sequence[CompressedLeaf], stored: int
) -> CompressedLeaf:
  """Returns the sizes of a leaf from those of its slices.

  Args:
    path: the leaf's name.
    shape: of the whole leaf.
    slices: the sizes of all slices.
    stored: bytes of the leaf in the file.
  """
  total = lambda field: sum(getattr(row, field) for row in slices)
  summed = ('weights', 'survivors', 'escaped', 'dead_channels', 'dead_rows', 'original')
  return CompressedLeaf(
    path=path,
    shape=shape,
    dtype=slices[0].dtype,
    levels=max(row.levels for row in slices),
    **{field: total(field) for field in (*summed, 'nominal', 'packed', 'entropy')},
    file=stored,
    slices=len(slices),
    is_rotated=slices[0].is_rotated,
  )
