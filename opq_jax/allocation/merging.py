"""Statistics of a leaf from those of its pieces."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from opq_jax.allocation.bins import BINS, BINS_AN_OCTAVE, bin_of
from opq_jax.allocation.shards import on_host_one_by_one
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.core import axes


def merge_statistics(parts: Sequence[LeafStatistics], axis: int) -> LeafStatistics:
  """Returns the statistics of `jnp.concatenate(leaves, axis)`, given those of the leaves.

  Maxima, shapes and histograms merge exactly (the bins of two parts differ by whole octaves).
  Scales merge up to float32 rounding: a sum in parts is another order.

  Args:
    parts: statistics of the pieces of one leaf, in their order; of a leaf cut in two directions,
      merge twice.
    axis: the axis along which the leaf was cut.

  Raises:
    ValueError: the pieces do not fit together.

  >>> import jax
  >>> from opq_jax.allocation.statistics import leaf_statistics
  >>> w = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> whole = leaf_statistics(w)
  >>> merged = merge_statistics([leaf_statistics(w[:48]), leaf_statistics(w[48:])], axis=0)
  >>> bool((merged.histogram == whole.histogram).all()), merged.shape
  (True, (64, 32))
  """
  first = parts[0]
  axis = axis % max(first.ndim, 1)
  _check_pieces(parts, axis)
  if first.slices:
    return _merged_slices(parts, axis)
  shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
  own = axes.numbers_of(first.channel_axis, first.ndim) if first.ndim > 1 else ()
  if axis in own:
    place = own.index(axis)
    shapes = [[part.shape[axis] for axis in own] for part in parts]
    scale, maximum = (
      jnp.concatenate([x.reshape(s) for x, s in zip(arrays, shapes, strict=True)], place).ravel()
      for arrays in ([part.scale for part in parts], [part.maximum for part in parts])
    )
  else:
    total = max(sum(part.per_channel for part in parts), 1)
    scale = jnp.stack([part.scale * (part.per_channel / total) for part in parts]).sum(axis=0)
    maximum = jnp.stack([part.maximum for part in parts]).max(axis=0)
  leading, merged = [part.leading for part in parts if part.leading is not None], None
  if leading:
    merged = jnp.concatenate(leading) if axis == 0 else jnp.stack(leading).max(axis=0)
  largest = jnp.stack([jnp.asarray(part.largest) for part in parts]).max()
  counts = [
    _widened(part.histogram, part.largest, largest) for part in parts if part.histogram is not None
  ]
  return dataclasses.replace(
    first,
    scale=scale,
    maximum=maximum,
    leading=merged,
    histogram=jnp.stack(counts).sum(0) if counts else None,
    largest=largest,
    shape=shape,
  )


def _merged_slices(parts: Sequence[LeafStatistics], axis: int) -> LeafStatistics:
  """Returns the merged statistics of a leaf with slices, on the host."""
  first = parts[0]
  shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
  if axis < first.slices:
    # every slice is whole in one of the pieces
    arrays = jax.tree.map(lambda *each: np.concatenate(each, axis), *_without_facts(parts))
  else:
    arrays = on_host_one_by_one(
      lambda index: _without_facts(
        [merge_statistics([part.of_slice(index) for part in parts], axis - first.slices)]
      )[0],
      first.slice_shape,
    )
  scale, maximum, leading, histogram, largest = arrays
  return LeafStatistics(
    scale,
    maximum,
    leading,
    histogram,
    largest,
    shape,
    first.dtype,
    first.channel_axis,
    first.slices,
  )


def _without_facts(parts: Sequence[LeafStatistics]) -> list[tuple]:
  """Returns the arrays of statistics alone: their shapes differ, and would keep them apart."""
  return [(s.scale, s.maximum, s.leading, s.histogram, s.largest) for s in parts]


def _check_pieces(parts: Sequence[LeafStatistics], axis: int) -> None:
  """Raises ValueError where the pieces differ in more than their length along `axis`."""

  def facts(part: LeafStatistics) -> tuple:
    rest = (*part.shape[:axis], *part.shape[axis + 1 :])
    return rest, part.dtype, part.channel_axis, part.slices, part.histogram is not None

  first = parts[0]
  if any(part.output_scales is not None for part in parts):
    raise ValueError(
      'found statistics of weights over output scales, expected those of the weights: scales are '
      'chosen for a whole leaf'
    )
  for part in parts[1:]:
    if facts(part) != facts(first):
      raise ValueError(
        f'found statistics of shape {part.shape}, dtype {part.dtype}, channel_axis '
        f'{part.channel_axis} beside {first.shape}, {first.dtype}, {first.channel_axis}; expected '
        f'pieces of one leaf that differ in axis {axis} alone, all with histograms or none'
      )


def _widened(
  histogram: Int32[Array, '2 bins'], largest: Float32[Array, ''], to: Float32[Array, '']
) -> Int32[Array, '2 bins']:
  """Returns the counts in bins that end with the octave of `to`; lower bins count in the first."""
  # where the old bins end among the new ones
  last = bin_of(jnp.asarray(largest, jnp.float32), to) | (BINS_AN_OCTAVE - 1)
  index = jnp.maximum(jnp.arange(BINS) - (BINS - 1) + last, 0)
  # the first bin holds the zeros, and stays the first
  index = jnp.where(jnp.arange(BINS) == 0, 0, index)
  return jnp.zeros((2, BINS), jnp.int32).at[:, index].add(jnp.asarray(histogram))
