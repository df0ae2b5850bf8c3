"""Codes by rounding: every weight gets the code of the cell that it lies in."""

import dataclasses

from jaxtyping import Array

from opq_jax import compression
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.records import kinds_of
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import Encoded, LeafEncoder, Moments, encoded, leaves_to_code


@dataclasses.dataclass(frozen=True, repr=False)
class Rounding(LeafEncoder):
  """Rounds every weight by itself: the codes of `opq_jax.encode`.

  Needs nothing but the weights, may be traced, and is the only encoder that meets a target of
  `sparsity` and `bits`.  Finetuning begins from its codes.

  >>> import jax, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> grids = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  >>> params, state = Rounding().choose_codes(kernel, grids)
  >>> bool((params == opq_jax.apply_compression(kernel, grids)).all())
  True
  """

  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    leaves = list(leaves_to_code(params, grids))
    # all compressed leaves in one program
    weights = {leaf.name: leaf.weights for leaf in leaves if leaf.grid is not None}
    state = CompressionState({leaf.name: leaf.grid for leaf in leaves if leaf.grid is not None})
    values = compression.apply_compression(weights, state)
    return encoded(params, [(values.get(leaf.name, leaf.weights), leaf.grid) for leaf in leaves])

  def choose_matrix(
    self, weights: Array, grid: LeafState, moments: Moments, damping: float
  ) -> tuple[Array, LeafState]:
    """Rounds one leaf.  The mask is made anew: these may be other weights than those of the grid.

    Moments and damping make no difference.
    """
    del moments, damping
    weights = trees.native(weights).astype(grid.dtype)
    kinds = kinds_of(weights, grid.threshold, grid.step, grid.levels, grid.output_scales)
    grid = dataclasses.replace(grid, kinds=kinds)
    return compression.apply_compression(weights, CompressionState(grid)), grid
