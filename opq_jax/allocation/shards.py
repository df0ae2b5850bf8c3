"""Computations over a leaf where it lies: on one device, or shard by shard over a mesh.

A leaf that is laid over a mesh is never gathered.  Every device reads its own shard, and the
devices exchange arrays as long as the channels or the histogram are, never as long as the leaf.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

HERE = 'here'
"""Placement of a leaf on one device."""

UNKNOWN = 'unknown'
"""Placement of a leaf in a trace: it may be laid over any mesh."""

Placement = NamedSharding | str


def placement_of(weights: Any) -> Placement:
  """Returns where a leaf lies, as far as it is known: programs are compiled for a placement."""
  if isinstance(weights, jax.core.Tracer):
    # explicit axes of a mesh are part of the type, and known even in a trace
    sharding = jax.typeof(weights).sharding
    is_laid = isinstance(sharding, NamedSharding) and any(sharding.spec)
    return sharding if is_laid else UNKNOWN
  sharding = getattr(weights, 'sharding', None)
  if sharding is None or len(sharding.device_set) == 1:
    return HERE
  return sharding if isinstance(sharding, NamedSharding) else UNKNOWN


@dataclasses.dataclass(frozen=True)
class Shards:
  """Axes of a mesh that cut a leaf; none on one device.

  Attributes:
    channels: axes that cut the channels.
    others: axes that cut the other dimensions.
    first: axes that cut the first dimension.
  """

  channels: tuple[str, ...] = ()
  others: tuple[str, ...] = ()
  first: tuple[str, ...] = ()

  def sum(self, x: Array) -> Array:
    """Sums over all shards."""
    axes = self.channels + self.others
    return lax.psum(x, axes) if axes else x

  def channel_sum(self, x: Array) -> Array:
    """Returns the sums of all channels, on every device."""
    return self._gathered(lax.psum(x, self.others) if self.others else x)

  def channel_max(self, x: Array) -> Array:
    """Returns the maxima of all channels, on every device."""
    return self._gathered(lax.pmax(x, self.others) if self.others else x)

  def leading_max(self, x: Array) -> Array:
    """Returns the maxima at all indices of the first dimension, on every device."""
    rest = tuple(name for name in self.channels + self.others if name not in self.first)
    x = lax.pmax(x, rest) if rest else x
    return lax.all_gather(x, self.first, tiled=True) if self.first else x

  def _gathered(self, x: Array) -> Array:
    """Gathers one number per channel, the only thing that is ever gathered."""
    return lax.all_gather(x, self.channels, tiled=True) if self.channels else x


def on_shards(
  local: Callable[..., Any],
  weights: Array,
  argument: Any,
  channel_axis: int,
  placement: Placement,
) -> Any:
  """Returns `local(weights, argument, shards)`, run on every device of the leaf's mesh.

  Args:
    local: computes the same result on every device, with the collectives of `Shards`.
    weights: the leaf.
    argument: the same on all devices.
    channel_axis: the axis of the output channels.
    placement: of the leaf.
  """
  if isinstance(placement, str):
    return local(weights, argument, Shards())
  named = [
    () if names is None else names if isinstance(names, tuple) else (names,)
    for names in (*placement.spec, *[None] * (weights.ndim - len(placement.spec)))
  ]
  # a vector is one channel, so no axis cuts its channels
  axis = channel_axis % weights.ndim if weights.ndim > 1 else -1
  others = tuple(name for i, names in enumerate(named) if i != axis for name in names)
  shards = Shards(named[axis] if axis >= 0 else (), others, named[0])
  mapped = jax.shard_map(
    lambda weights, argument: local(weights, argument, shards),
    mesh=placement.mesh,
    in_specs=(placement.spec, P()),
    out_specs=P(),
    check_vma=False,  # the check cannot see that gathered arrays are the same on all devices
  )
  return mapped(weights, argument)


def by_channel(weights: Array, channel_axis: int) -> tuple[Array, tuple[int, ...]]:
  """Returns the weights with at least two axes, and the axes that are not the channels'."""
  if weights.ndim < 2:
    weights, channel_axis = weights.reshape(-1, 1), 1
  others = tuple(i for i in range(weights.ndim) if i != channel_axis % weights.ndim)
  return weights, others
