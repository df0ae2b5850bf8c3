"""Estimates what codes along a trellis take, from some outputs of every leaf.

A search for an allocation asks for the bits of all codes on several grids, and would encode the
whole network as often.  But an output of a leaf is coded much like the next one, and the bits of
codes over those of rounded codes, of the same weights on the same grid, hardly differ between them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from opq_jax.compression import CompressionState
from opq_jax.compression.records import in_units
from opq_jax.core import native
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import (
  LeafToCode,
  leaves_to_code,
  named_leaf,
  parts_of,
)
from opq_jax.encoders.trellis_leaves import (
  bits_of,
  check_finite,
  code_leaf,
  entropy_bits,
  factored,
  rounded_codes,
)
from opq_jax.network import InputMoments

# outputs and weights of a slice that are coded, at least: errors are pushed on between searches of
# some 128 weights, and contexts need an output's neighbours
_MIN_OUTPUTS = 64
_MIN_WEIGHTS = 1 << 16
# share of all weights up to which an estimate takes much less time than a step of the search
_MAX_SHARE = 0.25
# weights that a grid is fitted to: errors of the fits of many leaves cancel
_FITTED_TO = 1 << 14


class SampledBits(NamedTuple):
  """Bits of a leaf's codes and of rounded codes, scaled to the whole leaf."""

  codes: float
  rounded: float


class Sampled(NamedTuple):
  """What decides how many outputs of a leaf are coded.

  Attributes:
    shape: of the leaf.
    slices: leading axes that count slices.
    moments: of its inputs, or None.
  """

  shape: tuple[int, ...]
  slices: int
  moments: InputMoments | None = None


def surveyed(
  params: PyTree, grids: CompressionState, moments: PyTree | None, damping: float
) -> float | None:
  """Returns the bits of codes along a trellis over those of rounded codes, about.

  Args:
    params: the original weights.
    grids: their plain grids.
    moments, damping: as in `Trellis`.

  Returns:
    The ratio; None where leaves are so small that many of their weights would have to be coded, and
    where codes have no bits.
  """
  leaves = [leaf for leaf in leaves_to_code(params, grids, moments) if leaf.grid is not None]
  facts = [
    Sampled(np.shape(leaf.weights), leaf.grid.slices, leaf.moments) for leaf in leaves if leaf.grid
  ]
  if (strides := strides_of(facts)) is None:
    return None
  return ratio_of(
    native.on_all_processors(
      lambda leaf, stride: sampled_bits(leaf, stride, damping), leaves, strides
    )
  )


def strides_of(leaves: Sequence[Sampled]) -> list[int] | None:
  """Returns of how many outputs of each leaf one is coded; None where that is many of all."""
  strides = [_stride(leaf) for leaf in leaves]
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  coded = sum(size / stride for size, stride in zip(sizes, strides, strict=True))
  return strides if coded < _MAX_SHARE * sum(sizes) else None


def ratio_of(found: Sequence[SampledBits]) -> float | None:
  """Returns the bits of codes of all leaves over those of rounded codes; None of no bits."""
  codes, rounded = (sum(bits) for bits in zip(*found, strict=True))
  return codes / rounded if min(codes, rounded) > 0 else None


def sampled_bits(leaf: LeafToCode, stride: int, damping: float) -> SampledBits:
  """Returns the bits of one leaf, from every `stride`-th of its outputs."""
  codes = rounded = 0.0
  with named_leaf(leaf.name):
    for part in parts_of(leaf):
      check_finite(part)
      units, grid = in_units(part.weights, part.grid)
      weights = _some(units, stride, part.moments)
      grid = dataclasses.replace(grid, kinds=_some(grid.kinds, stride, part.moments))
      moments = factored(part.moments, damping, version=2)
      scale = part.weights.size / weights.size
      codes += scale * bits_of(code_leaf(weights, grid, moments, fitted_to=_FITTED_TO))
      rounded += scale * entropy_bits(rounded_codes(weights, grid), grid.dtype)
  return SampledBits(codes, rounded)


def _stride(leaf: Sampled) -> int:
  """Returns of how many outputs next to each other one is coded."""
  slices, shape = leaf.slices, leaf.shape[leaf.slices :]
  if not shape:
    return 1
  if leaf.moments is None:
    axis = _axis(shape, ())
    outputs = shape[axis]
  else:
    if leaf.moments.matrix.shape[-3] > 1:  # small leaves, whose outputs have different inputs
      return 1
    inputs = tuple(axis - slices for axis in leaf.moments.inputs)
    axis = _axis(shape, inputs)
    outputs = math.prod(shape) // math.prod(shape[axis] for axis in inputs)
  most = min(outputs // _MIN_OUTPUTS, math.prod(shape) // _MIN_WEIGHTS, shape[axis])
  return max(most, 1)


def _axis(shape: tuple[int, ...], inputs: tuple[int, ...]) -> int:
  """Returns the longest axis of outputs; of all, where inputs are not known."""
  return max((axis for axis in range(len(shape)) if axis not in inputs), key=shape.__getitem__)


def _some(array: Any, stride: int, moments: InputMoments | None) -> Any:
  """Returns every `stride`-th output of a slice."""
  array = np.asarray(array)
  if stride == 1:
    return array
  axis = _axis(array.shape, () if moments is None else moments.inputs)
  return np.ascontiguousarray(array[(slice(None),) * axis + (slice(None, None, stride),)])
