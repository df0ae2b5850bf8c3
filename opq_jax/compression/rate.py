"""Bits per weight of the codes as a smooth function of the weights: a term of a training loss.

Finetuning moves weights to cells further out, which take more bits, so the file grows.  With this
term in the loss, a weight moves out only where that lowers the loss by more than its bits cost.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from opq_jax.allocation.code_bits import times_log2
from opq_jax.compression.cells import (
  cell_of,
  is_below_first,
  settled,
  steps_beyond_first,
  thresholds,
)
from opq_jax.compression.codes import check_leaf
from opq_jax.compression.records import (
  ESCAPED,
  ON_GRID,
  ZERO_OR_ON_GRID,
  CompressionState,
  LeafState,
)
from opq_jax.core import trees
from opq_jax.core.trees import PyTree


class _Bits(NamedTuple):
  """Bits of the codes of a leaf, and its weights."""

  bits: Float32[Array, '']
  weights: int


@trees.compiled
def bits_per_weight(params: PyTree, state: CompressionState) -> Float32[Array, '']:
  """Returns the entropy of the codes under the Laplace density, differentiable in the weights.

  The excess of Laplace magnitudes over the threshold is exponential, so the cells c = 0, 1, ... of
  weights on the grid are geometric, and their entropy follows from the mean cell m.  With
  h(p) = -p log2 p - (1-p) log2(1-p), the shares p of pruned and e of escaped weights, and k weights
  on the grid, a leaf (or slice) of n weights takes these bits for kinds, signs and cells:

      n (h(p) + (1 - p) h(e / (1 - p)))  +  k  +  k ((1 + m) log2(1 + m) - m log2 m)

  Kinds and signs take the same bits wherever weights move.  A cell further out takes log2((1 + m) /
  m) more.  The derivative is straight-through: that of the cell is 1 / step.  So, of N weights in
  all leaves, the result has the derivative

      sign(w) log2((1 + m) / m) / (step N)      where |w| is larger than the first value
      0                                         elsewhere, and where w is pruned or escaped

  With a zero cell (`add_zero_cell`), p counts the weights in it, and a weight that leaves it takes

      log2(p / (1 - p - e)) + 1 + log2(1 + m)

  bits more.  The derivative of its place, 0 below the threshold and 1 above, is taken as
  1 / threshold from a half to one and a half thresholds.

  Entropy-constrained training (Wiedemann, Marban, Mueller, Samek, "Entropy-Constrained Training of
  Deep Neural Networks", arXiv 1812.07520) has a term of this kind; the closed form for
  Laplace weights is our derivation.  In a loss

      task(apply_compression(params, state)) + price * bits_per_weight(params, state)

  the price is the increase of the task's loss that saving one bit per weight is worth.

  Args:
    params: the latent weights.
    state: kinds and codebooks of their tree.

  Returns:
    Bits per weight of the compressed leaves, without the values of escaped weights; 0 where no leaf
    is compressed.  So that m is never 0, one weight of cell 1 is added to those of which it is the
    mean; the derivative is k / (k + 1) of the above.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import jax, opq_jax
  >>> params = {'w': jax.random.laplace(jax.random.key(0), (256, 64))}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, bits_per_weight=2.0))
  >>> round(float(bits_per_weight(params, state)), 1)
  2.0
  >>> gradient = jax.grad(bits_per_weight)(params, state)['w']
  >>> bool((gradient * params['w'] >= 0).all())  # descent moves inwards, or nowhere
  True
  """
  leaves = [
    _bits_of_leaf(name, leaf, record)
    for (name, leaf), record in zip(
      trees.named_leaves(params).items(),
      trees.records(params, state.tree, LeafState),
      strict=True,
    )
    if record is not None
  ]
  count = sum(leaf.weights for leaf in leaves)
  # as a float: of billions of weights the number is beyond int32
  return sum((leaf.bits for leaf in leaves), jnp.float32(0)) / float(max(count, 1))


def _bits_of_leaf(name: str, weights: Array, leaf: LeafState) -> _Bits:
  """Returns the bits of all slices of a leaf, and its weights."""
  check_leaf(name, weights, leaf)
  axes = tuple(range(leaf.slices, weights.ndim))
  magnitude = jnp.abs(weights.astype(jnp.float32))
  total = lambda x: jnp.sum(x, axis=axes, dtype=jnp.float32)
  each = float(weights.size // leaf.threshold.size)
  is_on_grid = _share_on_grid(magnitude, leaf)
  on_grid, escaped = total(is_on_grid), total(leaf.kinds == ESCAPED)
  shares = (x / each for x in (each - on_grid - escaped, on_grid, escaped))
  kinds = -each * sum(map(times_log2, shares))

  # the value of the cell, the derivative of the place
  place = jnp.maximum(steps_beyond_first(magnitude, leaf), 0)
  cell = _with_derivative_of(settled(cell_of(magnitude, leaf), leaf), place)
  cells = total(jnp.where(lax.stop_gradient(is_on_grid) > 0, cell, 0))
  mean = (cells + 1) / (on_grid + 1)
  entropy = times_log2(1 + mean) - times_log2(mean)
  return _Bits(jnp.sum(kinds + on_grid * (1 + entropy)), weights.size)


def _share_on_grid(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """Returns 1 where a code is that of a cell, else 0; of a zero cell with the slope of a ramp."""
  threshold = thresholds(leaf, magnitude.ndim)
  ramp = jnp.clip(magnitude / jnp.where(threshold > 0, threshold, 1) - 0.5, 0, 1)
  is_beyond = 1 - is_below_first(magnitude, leaf).astype(jnp.float32)
  may_be_zero = leaf.kinds == ZERO_OR_ON_GRID
  always = (leaf.kinds == ON_GRID).astype(jnp.float32)
  return jnp.where(may_be_zero, _with_derivative_of(is_beyond, ramp), always)


def _with_derivative_of(value: Array, smooth: Array) -> Array:
  """Returns `value`, with the derivative of `smooth`."""
  return smooth + lax.stop_gradient(value - smooth)
