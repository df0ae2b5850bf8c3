r"""Scales of outputs for palettes: of a few values, large outputs and small ones need their own.

Without palettes one step suits all outputs of a leaf, for a large output only takes more cells.  A
palette has no more cells: its step is too coarse for small outputs, or its end clips large ones.
So an output j gets the scale s_j of the symmetric uniform grid of L levels a sign that suits it,

    s_j  =  argmin_s  sum_{w in j} (w - s clip(round(w / s), -L, L))^2 ,

where scales lower the objective by more than the same bits do in longer indices.  With G_i what
they take of the error of leaf i, and B_i the bits that they take, that is

    F_i'(D_i) G_i  >  lambda B_i ,      lambda = 2 ln 2 sum_k F_k' D_k / sum_k n_k

since a bit more for each index makes all errors four times smaller.  (Our derivation.)
"""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from opq_jax.allocation.objectives import energy_power
from opq_jax.allocation.output_scales import may_have_scales, nearest_scales
from opq_jax.core import axes
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.limits import levels_of_palette

_SCALE_BITS = 32  # of a scale in the memory of a runtime
_MOST_INPUTS = 4096  # of an output that are looked at
_PARTS = np.linspace(0.2, 1.0, 33, dtype=np.float32)  # of the step that reaches the largest weight
_OF_LEAF = np.geomspace(0.02, 1.0, 49, dtype=np.float32)  # the same, where outputs have one step


class _Gain(NamedTuple):
  """What scales are worth to a leaf; sums over its slices.

  Attributes:
    scales: of its outputs.
    common, own: squared error with one step for all outputs, and with scales.
    energy: sum of all squares.
    size, outputs: of the leaf.
    look: what a leaf and its transpose have in common, and hardly any others.
  """

  scales: Float32[np.ndarray, '...']
  common: float
  own: float
  energy: float
  size: int
  outputs: int
  look: tuple[Any, ...]


def palette_scales(
  leaves: Mapping[str, Any],
  axes_of_leaves: Mapping[str, tuple[ChannelAxes, int]],
  palette_bits: int,
  objective: Any,
  omegas: Mapping[str, Any],
) -> dict[str, Float32[np.ndarray, '...'] | None]:
  """Returns the scales of the outputs of leaves, as they broadcast over them; None without.

  Args:
    leaves: weights by path, or what reads them: objects with `read()`.
    axes_of_leaves: the axis of the output channels of each leaf, and how many axes count slices.
    palette_bits, objective: as in `opq_jax.allocate`.
    omegas: weights of leaves in the objective, or of their slices; 1 of all others.

  >>> kernel = np.random.default_rng(0).normal(size=(512, 4)) * np.array([1.0, 1.0, 4.0, 4.0])
  >>> axes_of = {'kernel': (-1, 0)}
  >>> leaves, objective = {'kernel': kernel.astype(np.float32)}, 'balanced_error'
  >>> scales = palette_scales(leaves, axes_of, 4, objective, {})['kernel']
  >>> bool((scales[0, 2:] / scales[0, :2] > 3).all())
  True
  """
  gains, levels, power = {}, levels_of_palette(palette_bits), energy_power(objective)
  for name, (axis, slices) in axes_of_leaves.items():
    # a vector is one output
    if len(leaves[name].shape) - slices > 1 and may_have_scales(leaves[name]):
      gain = _gain_of(leaves[name], axis, slices, levels)
      if math.isfinite(gain.energy):  # `allocate` says what is not
        gains[name] = gain

  # a table and a last layer that are one array, transposed, stay equal: they have no scales
  distinct = {(gain.look, gain.scales.shape) for gain in gains.values()}
  shapes = collections.Counter(look for look, _ in distinct)

  def worth(name: str, error: float) -> float:
    """Returns the term of the objective that an error of a leaf adds, linear in the error."""
    gain = gains[name]
    # F = -log(1 - D / S) begins as D / S
    exponent = (0.0 if power is None else power) - 1
    return float(np.mean(omegas.get(name, 1))) * error * max(gain.energy, 1e-30) ** exponent

  size = sum(gain.size for gain in gains.values())
  price = 2 * math.log(2) * sum(worth(name, gains[name].common) for name in gains) / max(size, 1)
  return {
    name: gains[name].scales
    if name in gains
    and shapes[gains[name].look] == 1
    and worth(name, gains[name].common - gains[name].own)
    > price * _SCALE_BITS * gains[name].outputs
    else None
    for name in axes_of_leaves
  }


def _gain_of(leaf: Any, axis: ChannelAxes, slices: int, levels: int) -> _Gain:
  read: Callable[[], Any] = getattr(leaf, 'read', lambda: leaf)
  weights = np.asarray(read())
  outputs = axes.numbers_of(axis, weights.ndim)
  inputs = tuple(i for i in range(slices, weights.ndim) if i not in outputs)
  slice_shape, output_shape = weights.shape[:slices], tuple(weights.shape[i] for i in outputs)
  table = weights.transpose(*range(slices), *inputs, *outputs)
  table = table.reshape(math.prod(slice_shape), -1, math.prod(output_shape))
  stride = -(-table.shape[1] // _MOST_INPUTS)
  found = [_errors(jnp.asarray(part[::stride], jnp.float32), float(levels)) for part in table]
  steps, *sums = (np.stack(x) for x in zip(*jax.device_get(found), strict=True))
  common, own, energy = (stride * float(x.sum()) for x in sums)
  # an output of zeros has no step of its own
  has_step = np.isfinite(steps) & (steps > 0)
  logarithm = np.log(np.where(has_step, steps, 1))
  count = np.maximum(has_step.sum(axis=1, keepdims=True), 1)
  middle = logarithm.sum(axis=1, keepdims=True) / count
  scales = nearest_scales(np.where(has_step, np.exp(logarithm - middle), 1))
  shape = [n if i < slices or i in outputs else 1 for i, n in enumerate(weights.shape)]
  return _Gain(
    scales.reshape(shape),
    common,
    own,
    energy,
    weights.size,
    steps.size,
    (*sorted(weights.shape), float(np.max(np.abs(weights), initial=0))),
  )


@jax.jit
def _errors(
  weights: Float[Array, 'inputs outputs'], levels: Float[Array, '']
) -> tuple[Array, Array, Array, Array]:
  """Returns the best step of every output, errors with one step and with these, and the energy."""
  largest = jnp.max(jnp.abs(weights), axis=0)

  def error(step: Array) -> Array:
    """Returns the squared error of every output on a uniform grid."""
    safe = jnp.where(step > 0, step, 1)[None]
    nearest = jnp.clip(jnp.round(weights / safe), -levels, levels) * safe
    return jnp.sum(jnp.square(weights - nearest), axis=0)

  of_outputs = jax.lax.map(lambda part: error(part * largest / levels), jnp.asarray(_PARTS))
  best = jnp.argmin(of_outputs, axis=0)
  step = jnp.asarray(_PARTS)[best] * largest / levels
  one = jnp.max(largest) / levels
  of_leaf = jax.lax.map(lambda part: jnp.sum(error(part * one[None])), jnp.asarray(_OF_LEAF))
  return step, jnp.min(of_leaf), jnp.sum(jnp.min(of_outputs, axis=0)), jnp.sum(jnp.square(weights))
