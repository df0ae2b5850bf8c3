"""The statistics of all leaves in a few arrays, whose sizes are the same for many networks.

XLA compiles a program for the sizes of its arrays.  With one array per leaf every network would
need programs of its own; with joined arrays of a few rounded sizes, most share them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from opq_jax.allocation.bins import BINS
from opq_jax.allocation.lattices import Lattice
from opq_jax.allocation.statistics import LeafStatistics
from opq_jax.core import trees

_BLOCKS = 8, 64  # channels: lengths of a block; sums over longer blocks are faster
_MAX_PADDING = 9 / 8  # of the places with short blocks, at which long blocks are still used
# least sizes of the joined arrays: compiling takes seconds, and solving for so few milliseconds,
# so small networks share one program, of short blocks
_MIN_LEAVES, _MIN_CHANNELS = 8, 2048
_FLOAT_MANTISSA = 23  # bits of a float32's mantissa; weights are read as float32


class Layout(NamedTuple):
  """Places of the channels of all leaves in joined arrays.

  On the host, a leaf's channels are padded with zeros up to a whole number of blocks, and the
  leaves with leaves of zeros, up to a few sizes for all networks.  Where values are traced there is
  no padding: each trace is compiled for itself.

  Attributes:
    place: index of every channel.
    leaf: leaf of every place.
    sizes: weights of every leaf; in a padding leaf, one per channel.
    block: length of the runs of places that belong to one leaf.
    is_traced: whether there is no padding.
  """

  place: np.ndarray | slice
  leaf: np.ndarray
  sizes: np.ndarray
  block: int
  is_traced: bool

  def channels(self, parts: Sequence[Any], dtype: Any) -> Any:
    """Joins arrays of one number per channel; padding is 0."""
    if self.is_traced:
      return jnp.concatenate(parts).astype(dtype)
    joined = np.zeros(len(self.leaf), dtype)
    joined[self.place] = np.concatenate(parts)
    return joined

  def leaves(self, parts: Sequence[Any], dtype: Any, fill: float = 0) -> Any:
    """Stacks one array per leaf; padding leaves have `fill`."""
    if self.is_traced:
      return jnp.stack(parts).astype(dtype)
    more = len(self.sizes) - len(parts)
    first = np.asarray(parts[0])
    return np.stack([*parts, *[np.full_like(first, fill)] * more]).astype(dtype)


class JoinedStatistics(NamedTuple):
  """The statistics of all leaves, joined as a `Layout` says; in the units of the weights.

  Attributes:
    scale, maximum: of all channels, as in `LeafStatistics`.
    histogram: of every leaf, or None.
    ends: magnitude with whose octave the bins of every leaf end.
    share: of all weights, for every channel.
    leaf: leaf of every channel.
    sizes: weights of every leaf.
    value_bits: bits of each leaf's dtype.
    mantissa: bits of its mantissa.
    numbers: the one |w| that all weights of a bin have, in leaves where it is known; else NaN.
    lattices: of every leaf with few distinct magnitudes, as a `Lattice` of arrays.
    power: p of F_i = omega_i (D_i / S_i) S_i^p; None where the objective is not linear in D_i.
    omegas: omega_i; where the objective is not linear, the weights of its terms.
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
    """Leaves, with padding."""
    return len(self.sizes)

  def largest(self) -> Float[Array, 'leaves']:
    """Returns the largest |w| of every leaf."""
    return jax.ops.segment_max(self.maximum, self.leaf, self.leaves, indices_are_sorted=True)


def layout_of(stats: Sequence[LeafStatistics], is_traced: bool) -> Layout:
  """Returns a layout of the channels of these leaves; without padding if anything is traced."""
  counts, sizes = [s.channels for s in stats], [s.size for s in stats]
  if is_traced:
    leaf = np.repeat(np.arange(len(stats), dtype=np.int32), counts)
    # a block must divide the channels of every leaf, since sums are taken block by block
    return Layout(slice(None), leaf, np.array(sizes), math.gcd(*counts), True)
  short, long = _BLOCKS
  places = lambda block: sum(-(-count // block) * block for count in counts)
  is_small = places(short) <= _MIN_CHANNELS
  block = long if not is_small and places(long) <= places(short) * _MAX_PADDING else short
  leaves = _rounded_up(len(stats), _MIN_LEAVES)
  blocks = [-(-count // block) for count in counts] + [1] * (leaves - len(stats))
  # padding leaves have weights too, because bits are divided by sizes
  sizes += [block] * (leaves - len(stats))
  # padding up to the whole size goes to the last leaf, as channels of scale 0
  blocks[-1] += _rounded_up(sum(blocks), _MIN_CHANNELS // block) - sum(blocks)
  starts = np.cumsum([0, *blocks]) * block
  place = [start + np.arange(count) for start, count in zip(starts, counts, strict=False)]
  leaf = np.repeat(np.arange(leaves, dtype=np.int32), np.array(blocks) * block)
  return Layout(np.concatenate(place), leaf, np.array(sizes), block, False)


def _rounded_up(count: int, least: int) -> int:
  """Returns the first of 8, 12, 16, 24, 32, 48, … that is at least `count` and `least`.

  Two sizes an octave: above `least` less than a third is padding, and few programs are compiled.
  """
  power = 1 << (max(count, least) - 1).bit_length()
  return power * 3 // 4 if max(count, least) <= power * 3 // 4 else power


def join(
  stats: Sequence[LeafStatistics],
  power: float | None,
  omegas: Sequence[Array] | None,
  numbers: Sequence[np.ndarray | None],
  lattices: Sequence[Lattice],
  layout: Layout,
) -> JoinedStatistics:
  """Joins the statistics of all leaves.

  Args:
    stats: of the leaves.
    power: as in `JoinedStatistics`.
    omegas: as in `JoinedStatistics`; None for 1.
    numbers: of each leaf, from `opq_jax.allocation.lattices.numbers_of`.
    lattices: of each leaf.
    layout: of the joined arrays.
  """
  dtype = jnp.result_type(float)
  total = sum(s.size for s in stats)
  share = layout.channels([np.full(s.channels, s.per_channel / total) for s in stats], dtype)
  if not layout.is_traced:
    # padding leaves need a finite logarithm of their share
    share[layout.leaf >= len(stats)] = 1 / total
  histograms = [s.histogram for s in stats if s.histogram is not None]
  mantissas = [min(jnp.finfo(s.dtype).nmant, _FLOAT_MANTISSA) for s in stats]
  unknown = np.full(BINS, np.nan, np.float32)
  columns = [list(map(np.asarray, column)) for column in zip(*lattices, strict=True)]
  return JoinedStatistics(
    scale=layout.channels([s.scale for s in stats], dtype),
    maximum=layout.channels([s.maximum for s in stats], dtype),
    histogram=layout.leaves(histograms, jnp.int32) if histograms else None,
    ends=layout.leaves([s.largest for s in stats], dtype),
    share=share,
    leaf=layout.leaf,
    sizes=layout.sizes.astype(dtype),
    value_bits=layout.leaves([np.asarray(8.0 * s.dtype.itemsize) for s in stats], dtype),
    mantissa=layout.leaves([np.asarray(float(m)) for m in mantissas], dtype),
    numbers=layout.leaves([unknown if n is None else n for n in numbers], dtype),
    lattices=Lattice(*(layout.leaves(column, dtype) for column in columns)),
    power=None if power is None else np.asarray(power, dtype),
    omegas=layout.leaves(trees.on_host(omegas or [np.ones(())] * len(stats)), dtype, fill=1),
  )
