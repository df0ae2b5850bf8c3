r"""Whether the codes of a leaf are better those of rotated weights, under error feedback.

With the error e_i in the weights of input i, feedback leaves in an output the squared error

    sum_i e_i^2 / U_ii^2                                                   H^-1 = U^T U

(`opq_jax.encoders.Feedback`; H are the damped moments of the inputs).  Where a few inputs have most
of the energy, 1 / U_ii^2 is large at these few, and one step for all inputs makes the sum large.  A
rotation of the inputs makes 1 / U_ii^2 about the same everywhere (`opq_jax.coding.rotations`).  It
makes the weights nearly Gaussian too, which takes more bits for the same error than heavy tails do
(a tenth of a bit more than Laplace weights, where cells are fine).  And it gives up what rounding
knows of single weights: the weights of an input with much energy may be small.  So both sums are
computed, with the errors of rounding on the grids that would be taken.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Array, Float32, Float64

from opq_jax.allocation import LeafAllocation
from opq_jax.coding import rotations
from opq_jax.encoders.allocation_search import quietly
from opq_jax.encoders.at_bits import plain_allocation
from opq_jax.encoders.encoder import LeafEncoder
from opq_jax.encoders.factors import Factored, IndefiniteMomentsError
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.network import InputMoments

_WORTH = 0.97
"""Share of the error at which inputs are rotated: a smaller gain is not worth a leaf that has no
state to be finetuned with."""


@dataclasses.dataclass(frozen=True, eq=False)
class RotatableMoments:
  """Moments of the inputs of leaves that read the same rows, and of these inputs rotated.

  Attributes:
    moments: H = E[x^T x].
    damping: of the moments, as in `opq_jax.encoders.Feedback`.
    encoder: of the leaves.
  """

  moments: Float32[Any, 'groups K K']
  damping: float
  encoder: LeafEncoder
  # one factor serves all leaves and grids
  _kept: dict[bool, Factored] = dataclasses.field(default_factory=dict, init=False, repr=False)

  @functools.cached_property
  def rotated(self) -> Float32[np.ndarray, '1 K K']:
    """Q^T H Q, the moments of x Q."""
    once = rotations.rotated(np.asarray(self.moments), 1)
    return rotations.rotated(once, 2)

  def factored(self, is_rotated: bool) -> Factored:
    """Returns the factor of the moments, of the encoder and kept.

    Raises:
      IndefiniteMomentsError: there is none.
    """
    if is_rotated not in self._kept:
      matrix: Any = self.rotated if is_rotated else self.moments
      moments = InputMoments(matrix, ())
      self._kept[is_rotated] = self.encoder.factored(moments, self.damping)
    return self._kept[is_rotated]

  def rotated_weights(
    self,
    name: str,
    weights: Array,
    dtype: Any,
    bits: float,
    inputs: tuple[int, ...],
    output_scales: Any = None,
  ) -> Float32[np.ndarray, '...'] | None:
    """Returns the weights of a leaf with inputs rotated; None where its own weights are better.

    Args:
      name: path of the leaf.
      weights: of the leaf.
      dtype: of the leaf's values.
      bits: bits per weight of its codes.
      inputs: axes of the leaf; several are never rotated.
      output_scales: of the leaf, as in `opq_jax.compression.LeafState`.
    """
    # outputs of a grouped convolution read different inputs
    if len(inputs) != 1 or len(self.moments) > 1 or self._costs is None:
      return None
    moments = InputMoments(self.moments, inputs)
    layout, errors = MatrixLayout(weights.shape, inputs), []
    turned = rotations.rotated(np.asarray(weights), inputs[0])
    for array, kind, costs in zip((weights, turned), (dtype, np.float32), self._costs, strict=True):
      # what the allocation says of the grid that is taken is said where codes are chosen
      record, _ = quietly(plain_allocation, name, array, kind, bits, moments, output_scales)
      scales = np.float32(1) if output_scales is None else np.asarray(output_scales)
      units: Any = np.asarray(array, np.float32) / scales
      errors.append(float(costs @ _rounding_errors(layout.rows(units), record)))
    return turned if errors[1] < _WORTH * errors[0] else None

  @functools.cached_property
  def _costs(self) -> tuple[Float64[np.ndarray, ' K'], ...] | None:
    """1 / U_ii^2 of the inputs, and of the inputs rotated; None where there is no factor."""
    try:
      return tuple(_costs_of(self.factored(turned)) for turned in (False, True))
    except IndefiniteMomentsError:  # said where codes are chosen
      return None


def _costs_of(moments: Factored) -> Float64[np.ndarray, ' K']:
  """Returns 1 / U_ii^2 of the inputs, in the order of the leaf."""
  costs = np.diagonal(moments.factor[0]).astype(np.float64) ** -2
  if moments.order is None:
    return costs
  of_leaf = np.empty_like(costs)
  of_leaf[moments.order[0]] = costs
  return of_leaf


def _rounding_errors(
  rows: Float32[np.ndarray, 'K outputs'], grid: LeafAllocation
) -> Float64[np.ndarray, ' K']:
  """Returns the squared error of each input's weights, rounded on a plain grid."""
  threshold, step, offset = (float(x) for x in (grid.threshold, grid.step, grid.offset))
  magnitude, levels = np.abs(rows), int(grid.levels)
  cell = np.clip(np.floor((magnitude - threshold) / step), 0, max(levels - 1, 0))
  errors = magnitude - (threshold + offset + cell * step)
  # weights beyond the last cell are stored as they are
  errors[magnitude >= threshold + levels * step] = 0
  errors = np.where(magnitude > threshold, errors, magnitude)
  squared: Float64[np.ndarray, ' K'] = np.square(errors).sum(axis=1, dtype=np.float64)
  return squared
