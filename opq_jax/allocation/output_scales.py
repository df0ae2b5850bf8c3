r"""Scales of a leaf's outputs, from what an error in each of them costs.

Outputs of one leaf are not worth the same: of a kernel that has queries, keys and values side by
side, errors of the values cost the most.  With omega_j the cost of a squared error in output j, the
leaf's term of the objective is

    sum_j omega_j D_j                                          D_j the squared error of output j

One grid makes equal errors in all outputs.  The grid of output j times s_j makes the errors that it
would make of the weights over s_j, times s_j^2, and so the term is

    sum_j omega_j s_j^2 D_j(w_j / s_j)  =  omega D(w / s)      for  s_j ~ omega_j^(-1/2)

with one omega: the problem of a leaf without scales, whose weights are w / s.  Where cells are
fine, an output's error falls by 4 a bit, so equal bits give the leaf the part

    geometric mean of omega_j / arithmetic mean of omega_j

of its cost, and half of its binary logarithm is what scales save, in bits per weight.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from opq_jax.allocation.buffers import first_weights
from opq_jax.coding import output_scales
from opq_jax.core.limits import MAX_LEVELS


def scales_for(
  costs: Float[np.ndarray, '...'], weights: Any, slices: int
) -> Float32[np.ndarray, '...'] | None:
  """Returns the scales of the outputs of a leaf, as they broadcast over it; None where all are 1.

  Args:
    costs: of a squared error in each output, positive; with an axis of length 1 for each other axis
      of the leaf but those of slices.
    weights: the leaf; a few of its weights are read.
    slices: leading axes that count slices.

  Returns:
    The scales; None where they would save no more bits than they take, and where the leaf has few
    magnitudes, which scales would pull apart.

  >>> costs, weights = np.array([[1.0, 1.0, 16.0, 16.0]]), np.arange(8000.0).reshape(2000, 4)
  >>> scales_for(costs, weights, 0).tolist()
  [[2.0, 2.0, 0.5, 0.5]]
  >>> scales_for(np.ones((1, 4)), weights, 0) is None
  True
  """
  if not may_have_scales(weights):
    return None
  costs = np.asarray(costs, np.float64)
  of_slice: Any = {'axis': tuple(range(slices, costs.ndim)), 'keepdims': True}
  logarithm = -0.5 * np.log(costs)
  scales = nearest_scales(np.exp(logarithm - logarithm.mean(**of_slice)))
  # a factor that all scales have saves nothing: it is in both means
  saved = np.log2(scales).mean(**of_slice)
  saved += 0.5 * np.log2(costs.mean(**of_slice) / (costs * scales**2).mean(**of_slice))
  slice_shape = costs.shape[:slices]
  bits = section_bits(scales, slice_shape).sum()
  weights_of_slice = math.prod(np.shape(weights)[slices:])
  return scales if weights_of_slice * saved.sum() > bits else None


def may_have_scales(weights: Any) -> bool:
  """Returns whether a leaf has more than a few magnitudes, which scales would pull apart."""
  some = first_weights(weights)
  # of a leaf on disk, these are its first row, which may be short
  return some is not None and np.unique(np.abs(some)).size > min(MAX_LEVELS, some.size // 2)


def nearest_scales(scales: Float[np.ndarray, '...']) -> Float32[np.ndarray, '...']:
  """Returns the nearest scales that a file can tell."""
  return output_scales.scales_of(output_scales.nearest_codes(scales))


def cost_of_units(
  costs: Float[Any, '...'], scales: Float32[Any, '...'] | None, slices: int
) -> Float[np.ndarray, '*slices']:
  """Returns the cost of a squared error in the weights over the scales, a mean over outputs."""
  costs = np.asarray(costs, np.float64)
  if scales is not None:
    costs = costs * np.square(np.asarray(scales, np.float64))
  return costs.mean(axis=tuple(range(slices, costs.ndim)))


def in_units(weights: Any, scales: Any) -> Any:
  """Returns the weights of a leaf over its scales, in float32; without scales, themselves."""
  return weights if scales is None else weights.astype(np.float32) / scales


def section_bits(
  scales: Float32[Any, '...'], slice_shape: tuple[int, ...]
) -> Float[np.ndarray, '*slices']:
  """Returns the bits of the sections that tell the scales of a leaf, one of each slice."""
  codes = output_scales.codes_of(np.asarray(scales)).reshape(math.prod(slice_shape), -1)
  return np.array([output_scales.section_bits(own) for own in codes]).reshape(slice_shape)
