"""Computations over a leaf where it lies: on one device, or shard by shard over a mesh.

A leaf that is laid over a mesh is never gathered.  Every device reads its own shard, and the
devices exchange arrays as long as the channels or the histogram are, never as long as the leaf.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from opq_jax.core import axes
from opq_jax.core.axes import ChannelAxes

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


def is_in_host_memory(weights: Any) -> bool:
  """Returns whether NumPy can read a leaf without a copy: it lies on one CPU of this process."""
  if isinstance(weights, jax.core.Tracer) or placement_of(weights) != HERE:
    return False
  if not isinstance(weights, jax.Array):
    return True
  return weights.is_fully_addressable and {d.platform for d in weights.devices()} == {'cpu'}


@dataclasses.dataclass(frozen=True)
class Shards:
  """Axes of a mesh that cut a leaf; none on one device.

  Attributes:
    channel_axes: for each axis of the output channels, the mesh's axes that cut it.
    others: axes that cut the other dimensions.
    first: axes that cut the first dimension.
    shape: of a shard's output channels.
  """

  channel_axes: tuple[tuple[str, ...], ...] = ()
  others: tuple[str, ...] = ()
  first: tuple[str, ...] = ()
  shape: tuple[int, ...] = ()

  @property
  def channels(self) -> tuple[str, ...]:
    """Axes of the mesh that cut the channels."""
    return tuple(name for names in self.channel_axes for name in names)

  def sum(self, x: Array) -> Array:
    """Sums over all shards."""
    axes = self.channels + self.others
    return lax.psum(x, axes) if axes else x

  def max(self, x: Array) -> Array:
    """Returns the maximum over all shards."""
    axes = self.channels + self.others
    return lax.pmax(x, axes) if axes else x

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
    if not self.channels:
      return x
    # axis by axis: of channels on several axes a shard has no run
    x = x.reshape(self.shape)
    for place, names in enumerate(self.channel_axes):
      x = lax.all_gather(x, names, axis=place, tiled=True) if names else x
    return x.reshape(-1)


def on_shards(
  local: Callable[..., Any],
  weights: Array,
  argument: Any,
  channel_axis: ChannelAxes,
  placement: Placement,
  slices: int = 0,
) -> Any:
  """Returns `local(weights, argument, shards)`, run on every device of the leaf's mesh.

  Args:
    local: computes the same result on every device, with the collectives of `Shards`.
    weights: the leaf.
    argument: the same on all devices.
    channel_axis: the axis of the output channels, or several.
    placement: of the leaf.
    slices: leading axes that count slices.  Then `local` is called with one slice and its part of
      `argument`, whose arrays have the slices' axes in front, as those of the result have.
  """
  if isinstance(placement, str):
    of_slice = lambda weights, argument: local(weights, argument, Shards())
    # a loop over an axis that a mesh may cut would gather the leaf in every iteration
    return _of_slices(of_slice, weights, argument, slices, at_once=placement == UNKNOWN)
  named = [
    () if names is None else names if isinstance(names, tuple) else (names,)
    for names in (*placement.spec, *[None] * (weights.ndim - len(placement.spec)))
  ]
  inner, ndim = named[slices:], weights.ndim - slices
  # a vector is one channel, so no axis cuts its channels
  own = axes.numbers_of(axes.in_slice(channel_axis, slices), ndim) if ndim > 1 else ()
  others = tuple(name for i, names in enumerate(inner) if i not in own for name in names)

  def on_shard(weights: Array, argument: Any) -> Any:
    shape = tuple(weights.shape[slices + axis] for axis in own)
    shards = Shards(tuple(inner[axis] for axis in own), others, inner[0], shape)
    of_slice = lambda weights, argument: local(weights, argument, shards)
    found = _of_slices(of_slice, weights, argument, slices, at_once=False)
    for place, names in enumerate(named[:slices]):
      if names:
        gather = functools.partial(lax.all_gather, axis_name=names, axis=place, tiled=True)
        found = jax.tree.map(gather, found)
    return found

  mapped = jax.shard_map(
    on_shard,
    mesh=placement.mesh,
    in_specs=(placement.spec, P(*placement.spec[:slices])),
    out_specs=P(),
    check_vma=False,  # the check cannot see that gathered arrays are the same on all devices
  )
  return mapped(weights, argument)


def _of_slices(
  function: Callable[..., Any], weights: Array, argument: Any, slices: int, *, at_once: bool
) -> Any:
  """Returns the results of all slices, computed at once or one after the other."""
  if at_once:
    for _ in range(slices):
      function = jax.vmap(function)
    return function(weights, argument)
  if not slices:
    return function(weights, argument)
  in_a_row = lambda x: x.reshape(-1, *x.shape[slices:])
  found = lax.map(lambda each: function(*each), jax.tree.map(in_a_row, (weights, argument)))
  return jax.tree.map(lambda x: x.reshape(*weights.shape[:slices], *x.shape[1:]), found)


def on_host_one_by_one(function: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
  """Returns `function(index)` of all slices, stacked on the host.

  One compiled program serves all slices, and is the one of the same leaves apart.

  Args:
    function: returns arrays; called for one slice after the other.
    shape: of the slices' axes.
  """
  # fetched at once: JAX computes in the background, and would keep copies of many slices
  parts = [jax.device_get(function(index)) for index in np.ndindex(shape)]
  stack = lambda *arrays: np.stack(arrays).reshape(*shape, *np.shape(arrays[0]))
  return jax.tree.map(stack, *parts)


def by_channel(weights: Any, channel_axis: ChannelAxes) -> tuple[Any, tuple[int, ...]]:
  """Returns the weights with one axis of channels and others, and the others."""
  if weights.ndim < 2:
    weights, channel_axis = weights.reshape(-1, 1), 1
  weights, own = axes.joined(weights, channel_axis)
  return weights, tuple(i for i in range(weights.ndim) if i != own)
