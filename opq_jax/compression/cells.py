"""Cells of a grid, and the value of a cell in the leaf's dtype.

Cells are counted from 0 here: cell k of code k + 1.  All arithmetic is in float32 and exact on
every platform (`opq_jax.compression.records.LeafState`).  The value of a cell is the nearest number
of the leaf's dtype that lies in the cell itself: bfloat16, with 8 significant bits, is coarser than
a cell far from 0, and a value rounded out of its cell would change when it is encoded again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from opq_jax.compression.records import LeafState, over_weights


def cell_of(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """Returns the cell of |w| as a whole float32 number; meaningless where w is pruned."""
  return jnp.clip(_unbounded_cell(magnitude, leaf), 0, _last(magnitude.ndim, leaf))


def is_below_first(magnitude: Float32[Array, '...'], leaf: LeafState) -> Bool[Array, '...']:
  """Returns whether |w| lies below the first cell, which begins at the threshold."""
  return _unbounded_cell(magnitude, leaf) < 0


def thresholds(leaf: LeafState, ndim: int) -> Float32[Array, '...']:
  """Returns the threshold of every weight, of a leaf of `ndim` axes; it broadcasts over them."""
  return _of_outputs(leaf.threshold, ndim, leaf)


def steps_beyond_first(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """Returns the place of |w| on the line of the values: 0 at the first value, 1 at the second."""
  first, step = (_of_outputs(x, magnitude.ndim, leaf) for x in (leaf.codebook[..., 1], leaf.step))
  return (magnitude - first) / step


def settled(cell: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """Returns the cell that the value of a cell lies in, once it is of the leaf's dtype.

  It is another cell where the cell has no number of the dtype.  An encoder that may choose any cell
  chooses the settled one: encoding its value again gives the same code.
  """
  if _is_wide(leaf.dtype):
    return cell
  return cell_of(value_of(cell, leaf).astype(jnp.float32), leaf)


def value_of(cell: Float32[Array, '...'], leaf: LeafState) -> Float[Array, '...']:
  """Returns the value of a cell, in the leaf's dtype: of its numbers in the cell the nearest.

  Where a cell has no number of the dtype, the value is the nearest in another cell.  No weight of
  that dtype is in such a cell.
  """
  # exact (see LeafState), so this equals codebook[code] without reading the codebook per weight
  first, step = (_of_outputs(x, cell.ndim, leaf) for x in (leaf.codebook[..., 1], leaf.step))
  value = first + step * cell
  if _is_wide(leaf.dtype):
    return value.astype(leaf.dtype)
  # at most the largest number, since infinity lies in no cell
  largest = jnp.finfo(leaf.dtype).max.astype(leaf.dtype)
  rounded = jnp.minimum(value, largest.astype(jnp.float32)).astype(leaf.dtype)
  rounded_cell = _unbounded_cell(rounded.astype(jnp.float32), leaf)
  # positive numbers of a dtype are in the order of their bits: the next one is one away
  bits = jax.lax.bitcast_convert_type(rounded, _unsigned(leaf.dtype))
  one, most = bits.dtype.type(1), jax.lax.bitcast_convert_type(largest, bits.dtype)
  bits = jnp.where(rounded_cell < cell, jnp.minimum(bits + one, most), bits)
  # beyond the last cell magnitudes still count as its own: no need to move these
  is_beyond = (rounded_cell > cell) & (cell < _last(cell.ndim, leaf))
  bits = jnp.where(is_beyond, jnp.maximum(bits, one) - one, bits)
  return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def value_table(leaf: LeafState) -> Float[Array, '*slices 256']:
  """Returns the value of every code, in the leaf's dtype; a negative code counts from the end.

  Of a leaf without output scales.  The entry of an escape is meaningless.
  """
  codes = jnp.arange(256, dtype=jnp.uint8).astype(jnp.int8)
  return values_of_codes(codes.reshape(*[1] * leaf.slices, -1), leaf)


def values_of_codes(codes: Array, leaf: LeafState) -> Float[Array, '...']:
  """Returns the values of codes, in the leaf's dtype; meaningless where a code is an escape."""
  cell = jnp.clip(jnp.abs(codes.astype(jnp.float32)) - 1, 0, _last(codes.ndim, leaf))
  values = value_of(cell, leaf)
  values = jnp.where(codes < 0, -values, values)
  return jnp.where(codes == 0, jnp.zeros_like(values), values)


def _is_wide(dtype: Any) -> bool:
  """Returns whether a dtype holds every float32: no value is rounded."""
  return bool(jnp.finfo(dtype).nmant >= 23)


def _unbounded_cell(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  # times the reciprocal, since XLA divides by a scalar in either way, and the two differ at edges
  threshold, step = (_of_outputs(x, magnitude.ndim, leaf) for x in (leaf.threshold, leaf.step))
  return jnp.floor((magnitude - threshold) * (1 / step))


def _of_outputs(numbers: Array, ndim: int, leaf: LeafState) -> Float32[Array, '...']:
  """Returns a number of each slice, times the scales of its outputs, over all weights."""
  numbers = over_weights(numbers, ndim)
  return numbers if leaf.output_scales is None else numbers * leaf.output_scales


def _last(ndim: int, leaf: LeafState) -> Float32[Array, '...']:
  levels = over_weights(leaf.levels, ndim)
  return jnp.maximum(levels.astype(jnp.float32) - 1, 0)


def _unsigned(dtype: Any) -> Any:
  return {1: jnp.uint8, 2: jnp.uint16}[jnp.dtype(dtype).itemsize]
