"""Counts over the weights of a leaf: by bin, by part of a bin, and survivors by channel."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from opq_jax.allocation.bins import FINE_BINS, bin_of, fine_bin_of
from opq_jax.allocation.shards import (
  HERE,
  UNKNOWN,
  Placement,
  Shards,
  by_channel,
  on_host_one_by_one,
  on_shards,
  placement_of,
)
from opq_jax.core import axes
from opq_jax.core.axes import ChannelAxes

_BLOCK = 4096  # weights whose bins are computed at a time, 16 KB: they stay in the first cache


def count_bins(
  weights: Array, index: Callable[[Array], Array], bins: int, placement: Placement
) -> Int32[Array, 'bins']:
  """Counts the weights of each `index`, 0 ... bins - 1; larger ones are not counted.

  A CPU counts block after block, so that neither indices nor counts leave the cache.  Other
  devices, and a CPU where the leaf may be laid over several devices, count in one scatter, in the
  leaf's own shape, so that the leaf is not gathered.
  """

  def whole(weights: Array) -> Array:
    counts = jnp.zeros(bins, jnp.int32)
    return counts.at[index(weights.astype(jnp.float32))].add(1, mode='drop')

  def blocks(weights: Array) -> Array:
    flat = weights.reshape(-1)
    full = flat.size // _BLOCK
    if full == 0:
      return whole(flat)

    def add(i: Array, counts: Array) -> Array:
      block = lax.dynamic_slice(flat, (i * _BLOCK,), (_BLOCK,))
      return counts.at[index(block.astype(jnp.float32))].add(1, mode='drop')

    counts = lax.fori_loop(0, full, add, jnp.zeros(bins, jnp.int32))
    rest = flat[full * _BLOCK :]
    return counts + whole(rest) if rest.size else counts

  if placement == UNKNOWN:
    return whole(weights)
  return lax.platform_dependent(weights, cpu=blocks, default=whole)


def fine_histogram(
  weights: Float[Array | np.ndarray, '...'],
  largest: Float32[Array, '*slices'],
  bin_: Int32[Array, '*slices'],
) -> Int32[Array, '*slices bins']:
  """Counts the weights of one bin, both signs together, in FINE_BINS parts of it.

  Args:
    weights: the leaf.
    largest: its largest |w|, with whose octave the bins end; of a leaf with slices, of each.
    bin_: the bin; of a leaf with slices, of each.
  """
  placement, slices = placement_of(weights), np.ndim(bin_)
  if placement != HERE or not slices:
    return _fine_histogram(weights, (largest, bin_), placement, slices)
  return on_host_one_by_one(
    lambda index: _fine_histogram(weights[index], (largest[index], bin_[index]), HERE),
    np.shape(bin_),
  )


@functools.partial(jax.jit, static_argnames=('placement', 'slices'))
def _fine_histogram(
  weights: Array, bin_: tuple[Array, Array], placement: Placement, slices: int = 0
) -> Array:
  def local(weights: Array, bin_: tuple[Array, Array], shards: Shards) -> Array:
    largest, number = bin_

    def index(block: Array) -> Array:
      magnitude = jnp.abs(block)
      is_inside = bin_of(magnitude, largest) == number
      return jnp.where(is_inside, fine_bin_of(magnitude), FINE_BINS)

    return shards.sum(count_bins(weights, index, FINE_BINS, placement))

  return on_shards(local, weights, bin_, -1, placement, slices)


def per_channel_count(
  weights: Float[Array | np.ndarray, '...'],
  threshold: Float32[Array, '*slices'],
  channel_axis: ChannelAxes,
) -> Float32[Array, '*slices channels']:
  """Counts the weights of every channel that survive |w| > threshold, as float32.

  Args:
    weights: the leaf.
    threshold: of the leaf; of a leaf with slices, of each.
    channel_axis: the axis, or axes, of the output channels of the whole leaf.
  """
  placement, slices = placement_of(weights), np.ndim(threshold)
  if placement != HERE or not slices:
    return _per_channel_count(weights, threshold, channel_axis, placement, slices)
  axis = axes.in_slice(channel_axis, slices)
  return on_host_one_by_one(
    lambda index: _per_channel_count(weights[index], threshold[index], axis, HERE),
    np.shape(threshold),
  )


@functools.partial(jax.jit, static_argnames=('channel_axis', 'placement', 'slices'))
def _per_channel_count(
  weights: Array, threshold: Array, channel_axis: ChannelAxes, placement: Placement, slices: int = 0
) -> Array:
  axis = axes.in_slice(channel_axis, slices)

  def local(weights: Array, threshold: Array, shards: Shards) -> Array:
    weights, others = by_channel(weights, axis)

    def whole(weights: Array) -> Array:
      survives = jnp.abs(weights.astype(jnp.float32)) > threshold
      return jnp.sum(survives, others, dtype=jnp.int32)

    def rows(weights: Array) -> Array:
      # the channels must be the last axis for a row to hold one weight of each
      if others[-1] != weights.ndim - 2:
        return whole(weights)
      table = weights.reshape(-1, weights.shape[-1])

      def add(i: Array, counts: Array) -> Array:
        return counts + (jnp.abs(table[i].astype(jnp.float32)) > threshold).astype(jnp.int32)

      return lax.fori_loop(0, len(table), add, jnp.zeros(table.shape[1], jnp.int32))

    if placement == UNKNOWN:
      counts = whole(weights)
    else:
      # row after row on a CPU, for the reason that `count_bins` gives
      counts = lax.platform_dependent(weights, cpu=rows, default=whole)
    return shards.channel_sum(counts.reshape(-1))

  counts = on_shards(local, weights, threshold, channel_axis, placement, slices)
  return counts.astype(jnp.float32)
