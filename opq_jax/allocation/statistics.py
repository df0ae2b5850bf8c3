"""Statistics of one leaf: scales, largest magnitudes, and one histogram.

Every other number of an allocation is computed from these few, so the weights are read only here
(and, at `sparsity` and `bits`, by `opq_jax.allocation.second_look`): one pass for the scales, one
for the largest magnitudes, one for the histogram.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.bins import BINS, bin_of, signed_counts
from opq_jax.allocation.counts import count_bins
from opq_jax.allocation.output_scales import in_units
from opq_jax.allocation.shards import (
  HERE,
  Placement,
  Shards,
  by_channel,
  is_in_host_memory,
  on_host_one_by_one,
  on_shards,
  placement_of,
)
from opq_jax.core import axes, trees
from opq_jax.core.axes import ChannelAxes

_MAX_WEIGHTS = 2**31 - 1  # of a leaf: counts are int32
# weights of a leaf that NumPy reads in far less time than XLA takes to compile a program for its
# shape
_SMALL = 1 << 16


@flax.struct.dataclass
class LeafStatistics:
  """Statistics of one leaf of C output channels; float32, whatever the leaf's dtype.

  `opq_jax.allocate` accepts a tree of these in the place of the leaves themselves.  Of a leaf with
  slices every array has the slices' axes in front, and describes each slice by itself.

  Attributes:
    scale: mean |w| of every channel, the maximum-likelihood scale of a zero-mean Laplace density.
    maximum: largest |w| of every channel.
    leading: largest |w| at every index of the first axis (a row of a table); None where the first
      axis is the channels' own, where there is one axis, and without a histogram.
    histogram: counts by sign (row 0: w >= 0, row 1: w < 0) and magnitude, in BINS bins of 128 an
      octave (`opq_jax.allocation.bins`); None where only closed forms are asked for.
    largest: the leaf's largest |w|, or the number given in its place; the bins end with its octave.
    shape, dtype: the leaf's own.
    channel_axis: the axis of its output channels, or several (`opq_jax.core.axes`).
    slices: leading axes that count slices.
    output_scales: of all outputs, as in `LeafAllocation`: all numbers are those of the weights over
      them.  None where all are 1.
  """

  scale: Float32[Array, '*slices channels']
  maximum: Float32[Array, '*slices channels']
  leading: Float32[Array, '*slices first'] | None
  histogram: Int32[Array, '*slices 2 bins'] | None
  largest: Float32[Array, '*slices']
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  dtype: Any = flax.struct.field(pytree_node=False)
  channel_axis: ChannelAxes = flax.struct.field(pytree_node=False)
  slices: int = flax.struct.field(pytree_node=False, default=0)
  output_scales: Any = None

  @property
  def size(self) -> int:
    """Weights in the leaf."""
    return math.prod(self.shape)

  @property
  def ndim(self) -> int:
    """Dimensions of the leaf."""
    return len(self.shape)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Shape of the slices' axes; () without slices."""
    return tuple(self.shape[: self.slices])

  @property
  def channels(self) -> int:
    """Output channels of a slice; a vector is one."""
    return axes.count(self.shape[self.slices :], axes.in_slice(self.channel_axis, self.slices))

  @property
  def per_channel(self) -> int:
    """Weights per channel of a slice."""
    return math.prod(self.shape[self.slices :]) // max(self.channels, 1)

  def of_slice(self, index: tuple[int, ...]) -> 'LeafStatistics':
    """Returns the statistics of one slice; of a leaf without slices, `()`, its own."""
    if not self.slices:
      return self
    return LeafStatistics(
      scale=self.scale[index],
      maximum=self.maximum[index],
      leading=None if self.leading is None else self.leading[index],
      histogram=None if self.histogram is None else self.histogram[index],
      largest=self.largest[index],
      shape=self.shape[self.slices :],
      dtype=self.dtype,
      channel_axis=axes.in_slice(self.channel_axis, self.slices),
      output_scales=None if self.output_scales is None else self.output_scales[index],
    )


def leaf_statistics(
  weights: Float[Array | np.ndarray, '...'],
  channel_axis: ChannelAxes = -1,
  *,
  slices: int = 0,
  histogram: bool = True,
  largest: Float32[Array, '*slices'] | float | None = None,
  output_scales: Float32[Array | np.ndarray, '...'] | None = None,
) -> LeafStatistics:
  """Computes the statistics of one leaf, in two passes over its weights (three with a histogram).

  They are all that `opq_jax.allocate` reads of a leaf, so they may be computed elsewhere, leaf by
  leaf or (`merge_statistics`) part by part:

      statistics = jax.tree.map(opq_jax.allocation.leaf_statistics, params)
      opq_jax.allocate(statistics, compression_rate=16.0)     # is allocate(params, ...)

  Args:
    weights: any floating dtype; read as float32, never copied as a whole.  Over a mesh
      (`NamedSharding`) every device reads its own shard.  In a trace, where the placement is
      unknown, the histogram is one scatter, which XLA partitions as it sees fit.
    channel_axis: the axis of the output channels, or a tuple of several: (1, 2) of a projection
      onto heads, [inputs, heads, features].  A vector is one channel.
    slices: leading axes that count slices, each with statistics of its own: those that it has as a
      leaf by itself, bit for bit on one device.
    histogram: whether to count the histogram.
    largest: magnitude with whose octave the bins end, at least the largest |w|; one, or one of
      every slice.  By default the largest |w| of the slice.
    output_scales: of all outputs, which weights are divided by first: a float32 copy of the leaf.

  Returns:
    A `LeafStatistics` on the leaf's device (of slices and of small leaves in the host's memory: in
    NumPy's arrays), or replicated over its mesh.  Maxima and counts do not depend on the placement;
    a scale is a float32 sum, and its order and rounding do.

  Raises:
    ValueError: a slice has 2^31 weights or more, which int32 counts cannot hold; or `slices` or
      `channel_axis` are no axes of the leaf.

  >>> stats = leaf_statistics(jnp.array([[1.0, -2.0], [3.0, 4.0]]), channel_axis=-1)
  >>> stats.scale.tolist(), stats.maximum.tolist(), stats.per_channel
  ([2.0, 3.0], [3.0, 4.0], 2)
  """
  weights = trees.native(weights)
  if output_scales is not None:
    units = leaf_statistics(
      in_units(weights, output_scales),
      channel_axis,
      slices=slices,
      histogram=histogram,
      largest=largest,
    )
    return dataclasses.replace(units, dtype=weights.dtype, output_scales=output_scales)
  shape = np.shape(weights)
  check_slices(shape, channel_axis, slices)
  if math.prod(shape[slices:]) > _MAX_WEIGHTS:
    raise ValueError(
      f'found {"a slice" if slices else "a leaf"} of {math.prod(shape[slices:])} weights, expected '
      f'at most {_MAX_WEIGHTS}: its counts are int32'
    )
  if largest is not None:
    largest = jnp.broadcast_to(jnp.asarray(largest, jnp.float32), shape[:slices])
  if not slices and 0 < math.prod(shape) <= _SMALL and is_in_host_memory(weights):
    return _small_leaf_statistics(np.asarray(weights), largest, channel_axis, histogram)
  placement = placement_of(weights)
  if placement != HERE or not slices or math.prod(shape) == 0:
    return _leaf_statistics(weights, largest, channel_axis, histogram, placement, slices)
  # one slice after the other: their numbers are those of the same leaves apart, and no more than
  # one slice is copied at a time
  axis = axes.in_slice(channel_axis, slices)

  def of_slice(index: tuple[int, ...]) -> LeafStatistics:
    of_index = None if largest is None else largest[index]
    return leaf_statistics(weights[index], axis, histogram=histogram, largest=of_index)

  stacked = on_host_one_by_one(of_slice, shape[:slices])
  return dataclasses.replace(stacked, shape=shape, channel_axis=channel_axis, slices=slices)


def check_slices(shape: tuple[int, ...], channel_axis: ChannelAxes, slices: int) -> None:
  """Checks that leading axes can count slices.

  Raises:
    ValueError: no axis is left for a slice, or the output channels' axis counts slices.
  """
  if not 0 <= slices < max(len(shape), 1):
    raise ValueError(
      f'found {slices} axes of slices, expected 0 or more, and fewer than the axes of shape {shape}'
    )
  given = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
  if slices and not all(-len(shape) + slices <= axis < 0 or slices <= axis for axis in given):
    raise ValueError(
      f'found channel_axis {channel_axis}, expected an axis of the slices: the first {slices} axes '
      f'of shape {shape} count them'
    )


def _small_leaf_statistics(
  weights: np.ndarray, largest: Any, channel_axis: ChannelAxes, histogram: bool
) -> LeafStatistics:
  """Computes in NumPy what `_leaf_statistics` does for a leaf without slices on one device."""
  fields: dict[str, Any] = {'shape': weights.shape, 'channel_axis': channel_axis}
  fields['dtype'] = jax.dtypes.canonicalize_dtype(weights.dtype)  # as in a trace
  with np.errstate(over='ignore', invalid='ignore'):  # infinite and NaN are the caller's to refuse
    as_float, others = by_channel(weights.astype(np.float32), channel_axis)
    magnitude = np.abs(as_float)
    # XLA takes denormal numbers for zeros
    magnitude = np.where(magnitude < np.finfo(np.float32).tiny, 0, magnitude)
    fields |= {'scale': magnitude.mean(others), 'maximum': magnitude.max(others)}
  largest = np.asarray(fields['maximum'].max() if largest is None else largest)
  fields |= {'largest': largest, 'leading': None, 'histogram': None}
  if histogram:
    fields['histogram'] = signed_counts(as_float, largest)
    if weights.ndim > 1 and 0 not in axes.numbers_of(channel_axis, weights.ndim):
      fields['leading'] = magnitude.max(tuple(range(1, magnitude.ndim)))
  return LeafStatistics(**fields)


@functools.partial(jax.jit, static_argnames=('channel_axis', 'histogram', 'placement', 'slices'))
def _leaf_statistics(
  weights: Array,
  largest: Array | None,
  channel_axis: ChannelAxes,
  histogram: bool,
  placement: Placement,
  slices: int = 0,
) -> LeafStatistics:
  shape, ndim = weights.shape, weights.ndim - slices
  facts: dict[str, Any] = {'shape': shape, 'dtype': weights.dtype, 'channel_axis': channel_axis}
  facts['slices'] = slices
  channel_axis = axes.in_slice(channel_axis, slices)
  channels = axes.count(shape[slices:], channel_axis)
  if weights.size == 0:
    first = shape[:slices]
    nothing = jnp.zeros((*first, channels), jnp.float32)
    counts = jnp.zeros((*first, 2, BINS), jnp.int32) if histogram else None
    return LeafStatistics(nothing, nothing, None, counts, jnp.zeros(first, jnp.float32), **facts)

  has_leading = histogram and ndim > 1 and 0 not in axes.numbers_of(channel_axis, ndim)

  def local(weights: Array, largest: Array | None, shards: Shards) -> tuple:
    weights, others = by_channel(weights, channel_axis)
    total = jnp.sum(jnp.abs(weights.astype(jnp.float32)), others)
    if histogram:
      # max and min instead of the maximum of |w|: XLA's CPU backend would store |w| for the
      # maximum beside the histogram's loop
      as_float = weights.astype(jnp.float32)
      maximum = jnp.maximum(jnp.max(as_float, others), -jnp.min(as_float, others))
    else:
      # two kernels: that backend is several times slower on two reductions of |w| in one
      again, total = lax.optimization_barrier((weights, total))
      maximum = jnp.max(jnp.abs(again.astype(jnp.float32)), others)
    total, maximum = shards.channel_sum(total), shards.channel_max(maximum)
    leading = None
    if has_leading:
      as_float = lax.optimization_barrier(weights).astype(jnp.float32)
      after = tuple(range(1, weights.ndim))
      leading = jnp.maximum(jnp.max(as_float, after), -jnp.min(as_float, after))
      leading = shards.leading_max(leading)
    if largest is None:
      # XLA would merge the two maxima into one over all weights, and read the leaf once more
      maximum = lax.optimization_barrier(maximum)
      largest = jnp.max(maximum)
    if not histogram:
      return total, maximum, leading, None, largest

    def index(block: Array) -> Array:
      return bin_of(jnp.abs(block), largest) + jnp.where(block < 0, BINS, 0)

    counts = shards.sum(count_bins(weights, index, 2 * BINS, placement)).reshape(2, BINS)
    return total, maximum, leading, counts, largest

  total, maximum, leading, counts, largest = on_shards(
    local, weights, largest, facts['channel_axis'], placement, slices
  )
  scale = total / (math.prod(shape[slices:]) // channels)
  return LeafStatistics(scale, maximum, leading, counts, largest, **facts)
