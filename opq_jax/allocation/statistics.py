"""What an allocation needs to know of a leaf's weights: scales, reach, and one histogram.

Everything else in an allocation is computed from these few numbers, so they are all that ever
reads the weights: one pass for the scales, one for the largest magnitudes, one for the histogram.

A leaf that is laid over a mesh is never gathered: every device reads its own shard, and what
crosses between devices is as long as the channels and the histogram are, not as the leaf.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.histograms import BINS, BINS_AN_OCTAVE, FINE_BINS, bin_of, fine_bin_of
from opq_jax.core import trees

_MOST_WEIGHTS = 2**31 - 1
_HERE = 'here'  # the layout of a leaf on one device
_UNKNOWN = 'unknown'  # and of one inside of a trace, which may lie anywhere


@flax.struct.dataclass
class LeafStatistics:
  """Statistics of one leaf of C output channels; float32, whatever the leaf's dtype.

  `opq_jax.allocate` takes a tree of these in the place of the leaves themselves.

  Attributes:
    scale: mean |w| of every channel, the maximum-likelihood scale of a zero-mean Laplace density.
    maximum: largest |w| of every channel.
    leading: largest |w| at every index of the first axis (a row of a table, a layer of a stack);
      None where that is the channels' own axis, the leaf has one axis, or without a histogram.
    histogram: weights by sign (row 0: w >= 0, row 1: w < 0) and magnitude, in BINS bins of 128 an
      octave (`opq_jax.allocation.histograms`); None where only closed forms are asked for.
    largest: the leaf's largest |w|, or what was given in its place; the bins end with its octave.
    shape, dtype: the leaf's own.
    channel_axis: the axis of its output channels.
  """

  scale: Float32[Array, 'channels']
  maximum: Float32[Array, 'channels']
  leading: Float32[Array, 'first'] | None
  histogram: Int32[Array, '2 bins'] | None
  largest: Float32[Array, '']
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  dtype: Any = flax.struct.field(pytree_node=False)
  channel_axis: int = flax.struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """Weights in the leaf."""
    return math.prod(self.shape)

  @property
  def ndim(self) -> int:
    """Dimensions of the leaf."""
    return len(self.shape)

  @property
  def channels(self) -> int:
    """Output channels; a vector is one."""
    return self.shape[self.channel_axis] if self.ndim > 1 else 1

  @property
  def per_channel(self) -> int:
    """Weights a channel."""
    return self.size // max(self.channels, 1)


def leaf_statistics(
  weights: Float[Array | np.ndarray, '...'],
  channel_axis: int = -1,
  *,
  histogram: bool = True,
  largest: Float32[Array, ''] | float | None = None,
) -> LeafStatistics:
  """The statistics of one leaf, in two passes over its weights or, with a histogram, three.

  All that `opq_jax.allocate` reads of a leaf, so that they may be computed elsewhere, leaf by leaf
  or (`merge_statistics`) part by part:

      statistics = jax.tree.map(opq_jax.allocation.leaf_statistics, params)
      opq_jax.allocate(statistics, compression_rate=16.0)     # is allocate(params, ...)

  Args:
    weights: any floating dtype; read as float32, never copied as a whole.  Over a mesh
      (`NamedSharding`) every device reads its own shard.  Inside of a trace, where nobody can know
      how it lies, the histogram is one scatter that XLA cuts up as it sees fit.
    channel_axis: the axis of the output channels.  A vector is one channel.
    histogram: whether to count the histogram.
    largest: with whose octave the bins end; at least the largest |w|, and by default that of
      `weights`.

  Returns:
    A `LeafStatistics` on the leaf's device, or replicated over its mesh.  Maxima and counts do not
    depend on how the leaf lies; a scale is a float32 sum in another order, and so differs in
    rounding.

  Raises:
    ValueError: the leaf has 2^31 weights or more, which counts in int32 cannot hold.

  >>> stats = leaf_statistics(jnp.array([[1.0, -2.0], [3.0, 4.0]]), channel_axis=-1)
  >>> stats.scale.tolist(), stats.maximum.tolist(), stats.per_channel
  ([2.0, 3.0], [3.0, 4.0], 2)
  """
  weights = trees.native(weights)
  if np.size(weights) > _MOST_WEIGHTS:
    raise ValueError(
      f'found a leaf of {np.size(weights)} weights, expected at most {_MOST_WEIGHTS}: its counts '
      'are int32'
    )
  if largest is not None:
    largest = jnp.asarray(largest, jnp.float32)
  return _leaf_statistics(weights, largest, channel_axis, histogram, _layout(weights))


@functools.partial(jax.jit, static_argnames=('channel_axis', 'histogram', 'layout'))
def _leaf_statistics(
  weights: Array,
  largest: Array | None,
  channel_axis: int,
  histogram: bool,
  layout: NamedSharding | str,
) -> LeafStatistics:
  shape, channels = weights.shape, weights.shape[channel_axis] if weights.ndim > 1 else 1
  facts: dict[str, Any] = {'shape': shape, 'dtype': weights.dtype, 'channel_axis': channel_axis}
  if weights.size == 0:
    nothing = jnp.zeros(channels, jnp.float32)
    counts = jnp.zeros((2, BINS), jnp.int32) if histogram else None
    return LeafStatistics(nothing, nothing, None, counts, jnp.zeros((), jnp.float32), **facts)

  has_leading = histogram and weights.ndim > 1 and channel_axis % weights.ndim != 0

  def local(weights: Array, largest: Array | None, shards: _Shards) -> tuple:
    weights, others = _by_channel(weights, channel_axis)
    total = jnp.sum(jnp.abs(weights.astype(jnp.float32)), others)
    if histogram:
      # XLA's CPU backend would store |w| for the maximum beside the histogram's loop
      as_float = weights.astype(jnp.float32)
      maximum = jnp.maximum(jnp.max(as_float, others), -jnp.min(as_float, others))
    else:
      # and is several times slower on two reductions of |w| in one kernel
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
      # XLA would make one maximum over all weights of the two, and read them once more for it
      maximum = lax.optimization_barrier(maximum)
      largest = jnp.max(maximum)
    if not histogram:
      return total, maximum, leading, None, largest

    def count(block: Array) -> Array:
      return bin_of(jnp.abs(block), largest) + jnp.where(block < 0, BINS, 0)

    counts = shards.sum(_count_bins(weights, count, 2 * BINS, layout)).reshape(2, BINS)
    return total, maximum, leading, counts, largest

  total, maximum, leading, counts, largest = _on_shards(
    local, weights, largest, channel_axis, layout
  )
  scale = total / (math.prod(shape) // channels)
  return LeafStatistics(scale, maximum, leading, counts, largest, **facts)


def merge_statistics(parts: Sequence[LeafStatistics], axis: int) -> LeafStatistics:
  """The statistics of `jnp.concatenate(leaves, axis)`, from those of the leaves.

  What merges how:

    maxima, shapes       exactly
    histograms           exactly: the bins of two parts are the same, up to whole octaves
    scales               up to float32 rounding, since a sum in parts is another order

  Args:
    parts: of the pieces of one leaf, in their order; cut in two directions, merge twice.
    axis: along which the leaf was cut.

  Raises:
    ValueError: the pieces do not fit together.

  >>> w = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> whole = leaf_statistics(w)
  >>> merged = merge_statistics([leaf_statistics(w[:48]), leaf_statistics(w[48:])], axis=0)
  >>> bool((merged.histogram == whole.histogram).all()), merged.shape
  (True, (64, 32))
  """
  first = parts[0]
  axis = axis % max(first.ndim, 1)
  rest = lambda part: (*part.shape[:axis], *part.shape[axis + 1 :])
  has_histogram = first.histogram is not None
  for part in parts[1:]:
    found = rest(part), part.dtype, part.channel_axis, part.histogram is not None
    expected = rest(first), first.dtype, first.channel_axis, has_histogram
    if found != expected:
      raise ValueError(
        f'found statistics of shape {part.shape}, dtype {part.dtype}, channel_axis '
        f'{part.channel_axis} beside {first.shape}, {first.dtype}, {first.channel_axis}; expected '
        f'pieces of one leaf that differ in axis {axis} alone, all with histograms or none'
      )
  shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
  if first.ndim > 1 and axis == first.channel_axis % first.ndim:
    scale = jnp.concatenate([part.scale for part in parts])
    maximum = jnp.concatenate([part.maximum for part in parts])
  else:
    total = max(sum(part.per_channel for part in parts), 1)
    scale = jnp.stack([part.scale * (part.per_channel / total) for part in parts]).sum(axis=0)
    maximum = jnp.stack([part.maximum for part in parts]).max(axis=0)
  leading = [part.leading for part in parts if part.leading is not None]
  if leading:
    merged = jnp.concatenate(leading) if axis == 0 else jnp.stack(leading).max(axis=0)
  largest = jnp.stack([jnp.asarray(part.largest) for part in parts]).max()
  histogram = None
  counts = [(part.histogram, part.largest) for part in parts]
  if has_histogram:
    histogram = jnp.stack([_widened(h, end, largest) for h, end in counts if h is not None]).sum(0)
  return dataclasses.replace(
    first,
    scale=scale,
    maximum=maximum,
    leading=merged if leading else None,
    histogram=histogram,
    largest=largest,
    shape=shape,
  )


def _widened(
  histogram: Int32[Array, '2 bins'], largest: Float32[Array, ''], to: Float32[Array, '']
) -> Int32[Array, '2 bins']:
  """The counts in the bins that end with the octave of `to`; lower bins count in the first."""
  # the last bin of the old ones, among the new
  last = bin_of(jnp.asarray(largest, jnp.float32), to) | (BINS_AN_OCTAVE - 1)
  index = jnp.maximum(jnp.arange(BINS) - (BINS - 1) + last, 0)
  # zeros are in the first bin of both
  index = jnp.where(jnp.arange(BINS) == 0, 0, index)
  return jnp.zeros((2, BINS), jnp.int32).at[:, index].add(jnp.asarray(histogram))


def per_channel_count(
  weights: Float[Array | np.ndarray, '...'], threshold: Float32[Array, ''], channel_axis: int
) -> Float32[Array, 'channels']:
  """How many weights of every channel survive |w| > threshold, as float32."""
  return _per_channel_count(weights, threshold, channel_axis, _layout(weights))


@functools.partial(jax.jit, static_argnames=('channel_axis', 'layout'))
def _per_channel_count(
  weights: Array, threshold: Array, channel_axis: int, layout: NamedSharding | str
) -> Array:
  def local(weights: Array, threshold: Array, shards: _Shards) -> Array:
    weights, others = _by_channel(weights, channel_axis)

    def whole(weights: Array) -> Array:
      survives = jnp.abs(weights.astype(jnp.float32)) > threshold
      return jnp.sum(survives, others, dtype=jnp.int32)

    def rows(weights: Array) -> Array:
      if others[-1] != weights.ndim - 2:
        return whole(weights)
      table = weights.reshape(-1, weights.shape[-1])

      def add(i: Array, counts: Array) -> Array:
        return counts + (jnp.abs(table[i].astype(jnp.float32)) > threshold).astype(jnp.int32)

      return lax.fori_loop(0, len(table), add, jnp.zeros(table.shape[1], jnp.int32))

    if layout == _UNKNOWN:
      counts = whole(weights)
    else:
      # as in `_count_bins`, whose doc says why
      counts = lax.platform_dependent(weights, cpu=rows, default=whole)
    return shards.channel_sum(counts.reshape(-1))

  return _on_shards(local, weights, threshold, channel_axis, layout).astype(jnp.float32)


def fine_histogram(
  weights: Float[Array | np.ndarray, '...'], largest: Float32[Array, ''], bin_: Int32[Array, '']
) -> Int32[Array, 'bins']:
  """Counts of one bin of a leaf's histogram, both signs together, in FINE_BINS finer bins."""
  return _fine_histogram(weights, (largest, bin_), _layout(weights))


@functools.partial(jax.jit, static_argnames='layout')
def _fine_histogram(
  weights: Array, bin_: tuple[Array, Array], layout: NamedSharding | str
) -> Array:
  def local(weights: Array, bin_: tuple[Array, Array], shards: _Shards) -> Array:
    largest, number = bin_

    def count(block: Array) -> Array:
      magnitude = jnp.abs(block)
      is_inside = bin_of(magnitude, largest) == number
      return jnp.where(is_inside, fine_bin_of(magnitude), FINE_BINS)

    return shards.sum(_count_bins(weights, count, FINE_BINS, layout))

  return _on_shards(local, weights, bin_, -1, layout)


def _layout(weights: Any) -> NamedSharding | str:
  """How a leaf lies, as far as that can be known: what its statistics are compiled for."""
  if isinstance(weights, jax.core.Tracer):
    # a mesh with explicit axes is part of the type, and says it even here
    sharding = jax.typeof(weights).sharding
    is_laid = isinstance(sharding, NamedSharding) and any(sharding.spec)
    return sharding if is_laid else _UNKNOWN
  sharding = getattr(weights, 'sharding', None)
  if sharding is None or len(sharding.device_set) == 1:
    return _HERE
  return sharding if isinstance(sharding, NamedSharding) else _UNKNOWN


@dataclasses.dataclass(frozen=True)
class _Shards:
  """Which axes of a mesh cut the channels of a leaf, its other dimensions, and its first."""

  channels: tuple[str, ...] = ()
  others: tuple[str, ...] = ()
  first: tuple[str, ...] = ()

  def sum(self, x: Array) -> Array:
    axes = self.channels + self.others
    return lax.psum(x, axes) if axes else x

  def channel_sum(self, x: Array) -> Array:
    """All channels' sums, on every device."""
    return self._gathered(lax.psum(x, self.others) if self.others else x)

  def channel_max(self, x: Array) -> Array:
    return self._gathered(lax.pmax(x, self.others) if self.others else x)

  def leading_max(self, x: Array) -> Array:
    """The maxima of all indices of the first dimension, on every device."""
    rest = tuple(name for name in self.channels + self.others if name not in self.first)
    x = lax.pmax(x, rest) if rest else x
    return lax.all_gather(x, self.first, tiled=True) if self.first else x

  def _gathered(self, x: Array) -> Array:
    """A number a channel, from the devices that have the channels: all that is ever gathered."""
    return lax.all_gather(x, self.channels, tiled=True) if self.channels else x


def _on_shards(
  local: Callable[..., Any],
  weights: Array,
  argument: Any,
  channel_axis: int,
  layout: NamedSharding | str,
) -> Any:
  """`local(weights, argument, shards)` on every device of the leaf's mesh; the same on all."""
  if isinstance(layout, str):
    return local(weights, argument, _Shards())
  named = [
    () if names is None else names if isinstance(names, tuple) else (names,)
    for names in (*layout.spec, *[None] * (weights.ndim - len(layout.spec)))
  ]
  # a vector is one channel
  at = channel_axis % weights.ndim if weights.ndim > 1 else -1
  others = tuple(name for i, names in enumerate(named) if i != at for name in names)
  shards = _Shards(named[at] if at >= 0 else (), others, named[0])
  mapped = jax.shard_map(
    lambda weights, argument: local(weights, argument, shards),
    mesh=layout.mesh,
    in_specs=(layout.spec, P()),
    out_specs=P(),
    check_vma=False,  # what is gathered by the channels is the same on all, which it cannot see
  )
  return mapped(weights, argument)


def _by_channel(weights: Array, channel_axis: int) -> tuple[Array, tuple[int, ...]]:
  """The weights with at least two axes, and the axes that are not the channels'."""
  if weights.ndim < 2:
    weights, channel_axis = weights.reshape(-1, 1), 1
  others = tuple(i for i in range(weights.ndim) if i != channel_axis % weights.ndim)
  return weights, others


def _count_bins(
  weights: Array, index: Callable[[Array], Array], bins: int, layout: NamedSharding | str
) -> Int32[Array, 'bins']:
  """How many weights have each `index`, 0 … bins - 1; others are not counted.

  On a CPU block after block, so that neither indices nor counts leave the cache; elsewhere, and
  where the leaf may be laid over several devices, as one scatter, in the leaf's own shape, so that
  it is not gathered.
  """
  block_size = 4096

  def whole(weights: Array) -> Array:
    counts = jnp.zeros(bins, jnp.int32)
    return counts.at[index(weights.astype(jnp.float32))].add(1, mode='drop')

  def blocks(weights: Array) -> Array:
    flat = weights.reshape(-1)
    full = flat.size // block_size
    if full == 0:
      return whole(flat)

    def add(i: Array, counts: Array) -> Array:
      block = lax.dynamic_slice(flat, (i * block_size,), (block_size,))
      return counts.at[index(block.astype(jnp.float32))].add(1, mode='drop')

    counts = lax.fori_loop(0, full, add, jnp.zeros(bins, jnp.int32))
    rest = flat[full * block_size :]
    return counts + whole(rest) if rest.size else counts

  if layout == _UNKNOWN:
    return whole(weights)
  return lax.platform_dependent(weights, cpu=blocks, default=whole)
