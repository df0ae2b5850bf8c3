"""Codes of one leaf that take the bits asked, whatever the encoder."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from opq_jax import compression
from opq_jax.allocation import Allocation, LeafAllocation, allocate, leaf_statistics
from opq_jax.compression import CompressionState, LeafState, init_state
from opq_jax.core import messages
from opq_jax.encoders.allocation_search import quietly
from opq_jax.encoders.encoder import LeafEncoder, Moments
from opq_jax.encoders.factors import Factored
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.encoders.trellis_leaves import entropy_bits

_PILOT = 1 << 17
"""Weights on which a grid is tried, where a leaf has twice as many or more."""

_TRIALS = 3  # of grids, each by a line through the two before it
_CLOSE = 0.003  # relative error of the bits at which a grid is taken
_LEAST = 0.02  # bits per weight: below, a search would end at a leaf without codes


class CodedLeafAtBits(NamedTuple):
  """Codes of a leaf.

  Attributes:
    values: decoded.
    state: grid and mask.
    bits: entropy of the codes and bits of escaped values, per weight.
    ratio: bits of rounded codes on the grid, over those asked: the first guess for a leaf alike.
  """

  values: Array
  state: LeafState
  bits: float
  ratio: float


def code_at_bits(
  name: str,
  weights: Array,
  dtype: Any,
  bits: float,
  encoder: LeafEncoder,
  moments: Moments,
  damping: float,
  ratio: float = 1.0,
  output_scales: Any = None,
) -> CodedLeafAtBits:
  """Chooses the grid on which the codes of an encoder have the bits asked, and the codes.

  An encoder takes more or fewer bits on a grid than rounding does.  So the plain grid is that of an
  allocation of other bits per weight, which are searched for on some outputs of the leaf; the whole
  leaf is coded once.

  Args:
    name: path of the leaf.
    weights: of the leaf, without slices, in float32.
    dtype: of the leaf's values.
    bits: bits per weight.
    encoder: chooses the codes.
    moments: of its inputs, as for `LeafEncoder.choose_matrix`.
    damping: of the moments.
    ratio: the first guess, from a leaf alike.
    output_scales: of the leaf, as in `LeafState`.

  Warns:
    UserWarning: what the allocation and the encoder say of the grid that is taken.
  """
  pilot = _pilot(weights, moments)
  coded = functools.partial(_coded, name, weights, dtype, encoder, moments, damping, output_scales)
  # bits found on grids that were tried, by the bits of rounded codes
  tried: dict[float, float] = {}
  asked = max(bits * ratio, _LEAST)
  for trial in range(_TRIALS):
    if trial:
      asked = max(_next(tried, bits), _LEAST)
    (values, state), notes = quietly(coded, asked, pilot)
    tried[asked] = bits_per_weight(values, state)
    if abs(tried[asked] - bits) <= _CLOSE * bits:
      break
  last, asked = asked, min(tried, key=lambda plain: abs(tried[plain] - bits))
  if pilot is not None or asked != last:
    (values, state), notes = quietly(coded, asked, None)
  for note in notes:
    messages.warn(note)
  return CodedLeafAtBits(values, state, bits_per_weight(values, state), asked / bits)


def bits_per_weight(values: Any, state: LeafState) -> float:
  """Returns the entropy of a leaf's codes and the bits of its escaped values, per weight."""
  codes = np.asarray(compression.encode(values, CompressionState(state)))
  return entropy_bits(codes, state.dtype) / max(codes.size, 1)


def _next(tried: dict[float, float], bits: float) -> float:
  """Returns the bits of rounded codes to try next, by a line through the last two trials."""
  (last, found), *earlier = reversed(tried.items())
  slope = 1.0
  if earlier and earlier[0][0] != last:
    slope = (found - earlier[0][1]) / (last - earlier[0][0])
  # codes take more bits on a finer grid
  return last + (bits - found) / min(max(slope, 0.5), 2.0)


def _pilot(weights: Array, moments: Moments) -> Any:
  """Returns the outputs on which grids are tried; None for all."""
  inputs = tuple(range(weights.ndim - 1)) if moments is None else moments.inputs
  layout = MatrixLayout(weights.shape, inputs)
  outputs = weights.size // max(layout.width, 1)
  groups = 1
  if moments is not None:
    groups = np.shape(moments.factor if isinstance(moments, Factored) else moments.matrix)[0]
  some = -(-_PILOT // max(layout.width, 1))
  if groups > 1 or len(layout.outputs) != 1 or 2 * some > outputs:
    return None
  return np.linspace(0, outputs - 1, some).astype(int)


def plain_allocation(
  name: str,
  weights: Any,
  dtype: Any,
  bits: float,
  moments: Moments,
  output_scales: Any = None,
) -> LeafAllocation:
  """Returns the allocation of one leaf by itself; arguments as of `code_at_bits`.

  Raises:
    ValueError: all weights are zero.
  """
  axis = _output_axes(weights, moments)
  stored: dict[str, Any] = {name: weights.astype(dtype)}
  measured = stored
  if output_scales is not None:
    measured = {name: leaf_statistics(stored[name], axis, output_scales=output_scales)}
  allocation = allocate(
    measured, bits_per_weight=bits, compressible=lambda path, leaf: True, channel_axis=axis
  )
  record: LeafAllocation | None = allocation.tree[name]
  if record is None:
    raise ValueError(f'{name}: found weights that are all zero, expected others')
  return record


def _output_axes(weights: Any, moments: Moments) -> Any:
  """Returns the axis of the outputs of a leaf, or several."""
  inputs = tuple(range(weights.ndim - 1)) if moments is None else moments.inputs
  outputs = MatrixLayout(weights.shape, inputs).outputs
  return outputs[0] if len(outputs) == 1 else outputs


def _coded(
  name: str,
  weights: Array,
  dtype: Any,
  encoder: LeafEncoder,
  moments: Moments,
  damping: float,
  output_scales: Any,
  bits: float,
  pilot: Any,
) -> tuple[Array, LeafState]:
  """Codes a leaf, or some of its outputs, on the plain grid of an allocation of these bits."""
  axis = _output_axes(weights, moments)
  # the grid is that of the whole leaf
  record = plain_allocation(name, weights, dtype, bits, moments, output_scales)
  grid = init_state({name: weights.astype(dtype)}, Allocation({name: record})).tree[name]
  assert grid is not None
  if pilot is not None:
    weights = jnp.asarray(np.take(np.asarray(weights), pilot, axis=axis))
    kinds = jnp.asarray(np.take(np.asarray(grid.kinds), pilot, axis=axis))
    if output_scales is not None:
      output_scales = jnp.asarray(np.take(np.asarray(output_scales), pilot, axis=axis))
    grid = dataclasses.replace(grid, kinds=kinds, output_scales=output_scales)
  return encoder.choose_matrix(weights, grid, moments, damping)
