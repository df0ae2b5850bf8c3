"""The statistics of all leaves in a few arrays, whose sizes are the same for many networks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation.histograms import BINS
from opq_jax.allocation.lattices import Lattice
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.core import trees


class Layout(NamedTuple):
  """Where the channels of all leaves lie in joined arrays.

  What is compiled depends on the sizes of these arrays alone.  On the host there are a few sizes
  for all networks: behind a leaf's channels are as many of zeros as fill its last block, and behind
  the leaves are some more of zeros, as if they were the network's.  Where values are traced there
  is no room between: each trace is compiled for itself.

  Attributes:
    place: of every channel.
    leaf: which leaf each place belongs to.
    sizes: weights of every leaf; one a channel in those that are not the network's.
    block: how many places in a row are of one leaf.
    is_traced: whether there is no room between.
  """

  place: np.ndarray | slice
  leaf: np.ndarray
  sizes: np.ndarray
  block: int
  is_traced: bool

  def channels(self, parts: Sequence[Any], dtype: Any) -> Any:
    """What every leaf has of its channels, joined; 0 in between."""
    if self.is_traced:
      return jnp.concatenate(parts).astype(dtype)
    joined = np.zeros(len(self.leaf), dtype)
    joined[self.place] = np.concatenate(parts)
    return joined

  def leaves(self, parts: Sequence[Any], dtype: Any, fill: float = 0) -> Any:
    """What there is one of for every leaf, stacked."""
    if self.is_traced:
      return jnp.stack(parts).astype(dtype)
    more = len(self.sizes) - len(parts)
    first = np.asarray(parts[0])
    return np.stack([*parts, *[np.full_like(first, fill)] * more]).astype(dtype)


class JoinedStatistics(NamedTuple):
  """The statistics of all leaves, joined as a `Layout` says; in the units of the weights.

  Attributes:
    scale, maximum: see `LeafStatistics`, of all channels.
    histogram: of every leaf, or None.
    ends: with whose octaves the bins of every leaf's histogram end.
    share: of all weights, of every channel.
    leaf: which leaf a channel belongs to.
    sizes: weights of every leaf.
    value_bits, mantissa: bits of each leaf's dtype, and of its mantissa.
    numbers: the |w| of all weights in a bin, in leaves of which that is known to be one; else NaN.
    lattices: of every leaf with few distinct magnitudes, as a `Lattice` of arrays.
    power: of its energy S_i, in what the relative error of a leaf counts; None where the objective
      is not linear in the errors.
    omegas: what that is multiplied by, of every leaf.
  """

  scale: Float[Array, 'channels']
  maximum: Float[Array, 'channels']
  histogram: Int32[Array, 'leaves 2 bins'] | None
  ends: Float[Array, 'leaves']
  share: Float[Array, 'channels']
  leaf: Int32[Array | np.ndarray, 'channels']
  sizes: Float[Array | np.ndarray, 'leaves']
  value_bits: Float[Array, 'leaves']
  mantissa: Float[Array, 'leaves']
  numbers: Float[Array, 'leaves bins']
  lattices: Lattice
  power: Float[Array | np.ndarray, ''] | None
  omegas: Float[Array, 'leaves']

  @property
  def leaves(self) -> int:
    return len(self.sizes)

  def largest(self) -> Float[Array, 'leaves']:
    """The largest |w| of every leaf."""
    return jax.ops.segment_max(self.maximum, self.leaf, self.leaves, indices_are_sorted=True)


def layout_of(stats: list[LeafStatistics], is_traced: bool) -> Layout:
  """Where the channels of these leaves are to lie; without room between, if anything is traced."""
  counts, sizes = [s.channels for s in stats], [s.size for s in stats]
  if is_traced:
    leaf = np.repeat(np.arange(len(stats), dtype=np.int32), counts)
    return Layout(slice(None), leaf, np.array(sizes), math.gcd(*counts), True)
  # sums over longer blocks are quicker, if they are not of zeros
  places = lambda block: sum(-(-count // block) * block for count in counts)
  block = 64 if places(64) <= places(8) * 9 / 8 else 8
  leaves = _rounded_up(len(stats), 8)
  blocks = [-(-count // block) for count in counts] + [1] * (leaves - len(stats))
  sizes += [block] * (leaves - len(stats))
  blocks[-1] += _rounded_up(sum(blocks), 512 // block) - sum(blocks)
  starts = np.cumsum([0, *blocks]) * block
  place = [start + np.arange(count) for start, count in zip(starts, counts, strict=False)]
  leaf = np.repeat(np.arange(leaves, dtype=np.int32), np.array(blocks) * block)
  return Layout(np.concatenate(place), leaf, np.array(sizes), block, False)


def _rounded_up(count: int, least: int) -> int:
  """The first of 8, 12, 16, 24, 32, 48, … that is no less, nor less than `least`."""
  power = 1 << (max(count, least) - 1).bit_length()
  return power * 3 // 4 if max(count, least) <= power * 3 // 4 else power


def join(
  stats: list[LeafStatistics],
  power: float | None,
  omegas: list[Array] | None,
  numbers: list[np.ndarray | None],
  lattices: list[Lattice],
  layout: Layout,
) -> JoinedStatistics:
  """The statistics of all leaves as the layout says; 1 in the place of `omegas` that are None."""
  dtype = jnp.result_type(float)
  total = sum(s.size for s in stats)
  share = layout.channels([np.full(s.channels, s.per_channel / total) for s in stats], dtype)
  if not layout.is_traced:
    # leaves that are not the network's have logarithms too
    share[layout.leaf >= len(stats)] = 1 / total
  histograms = [s.histogram for s in stats if s.histogram is not None]
  return JoinedStatistics(
    scale=layout.channels([s.scale for s in stats], dtype),
    maximum=layout.channels([s.maximum for s in stats], dtype),
    histogram=layout.leaves(histograms, jnp.int32) if histograms else None,
    ends=layout.leaves([s.largest for s in stats], dtype),
    share=share,
    leaf=layout.leaf,
    sizes=layout.sizes.astype(dtype),
    value_bits=layout.leaves([np.asarray(8.0 * s.dtype.itemsize) for s in stats], dtype),
    mantissa=layout.leaves(
      [np.asarray(float(min(jnp.finfo(s.dtype).nmant, 23))) for s in stats], dtype
    ),
    numbers=layout.leaves(
      [np.full(BINS, np.nan, np.float32) if n is None else n for n in numbers], dtype
    ),
    lattices=Lattice(
      *(
        layout.leaves(list(map(np.asarray, column)), dtype)
        for column in zip(*lattices, strict=True)
      )
    ),
    power=None if power is None else np.asarray(power, dtype),
    omegas=layout.leaves(trees.on_host(omegas or [np.ones(())] * len(stats)), dtype, fill=1),
  )
