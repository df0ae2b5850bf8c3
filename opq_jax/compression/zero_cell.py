"""Grids with a zero cell: finetuning may move weights to zero and back.

At high rates most weights of a network are pruned, and a mask that is fixed before finetuning fixes
where the others are.  With a zero cell only the smallest weights are pruned for good.  All others
are zero while their magnitude is below the threshold, and on the grid while it is not: a dead zone,
as ternary networks have it (Li, Zhang, Liu, "Ternary Weight Networks", arXiv 1605.04711).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from opq_jax.compression.cells import thresholds
from opq_jax.compression.codes import check_leaf
from opq_jax.compression.records import (
  ON_GRID,
  PRUNED,
  ZERO_OR_ON_GRID,
  CompressionState,
  LeafState,
  over_weights,
)
from opq_jax.core import trees
from opq_jax.core.trees import PyTree


def add_zero_cell(params: PyTree, state: CompressionState, share: float = 0.25) -> CompressionState:
  """Returns the state in which all but the smallest weights may become zero and come back.

  They are zero below the threshold, and on the grid above it:

      kind before   |w|                                         kind
      pruned        <= share * threshold                        pruned
      pruned        > share * threshold                         zero or on grid
      on grid       any                                         zero or on grid
      escaped       any                                         escaped

  Compressed values stay as they are, and float weights whose codes are rounded keep their codes, so
  the network and its file are the same before the first step.  What changes is what
  `apply_compression` makes of weights that have moved, and its derivative: the identity on weights
  that may come back.  `bits_per_weight` then prices a weight that leaves the zero cell, too.

  A file holds codes, so a state that is loaded has zeros as pruned weights again.

  Args:
    params: the float weights before compression, by which it is decided what may come back.
    state: their kinds and codebooks, of rounded codes or of others.  Leaves and slices without
      levels, or with a threshold of 0, stay as they are.
    share: 0 ... 1, of the threshold.  With 0 no weight but 0 itself is pruned for good.  What an
      earlier call has freed stays free.

  Raises:
    ValueError: `share` is out of range, or `state` was made for a tree of other structure, shapes
      or dtypes.

  >>> import opq_jax
  >>> params = {'w': jax.random.laplace(jax.random.key(0), (256, 64))}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.8, bits=2.0))
  >>> with_zero = add_zero_cell(params, state)
  >>> round(float(1 - state.tree['w'].mask.mean()), 1)
  0.8
  >>> round(float(1 - with_zero.tree['w'].mask.mean()), 1)
  0.3
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share: found {share}, expected 0 ... 1')
  params = jax.tree.map(trees.native, params)
  records = trees.records(params, state.tree, LeafState)
  new = []
  for (name, weights), record in zip(trees.named_leaves(params).items(), records, strict=True):
    if record is not None:
      check_leaf(name, weights, record)
      record = dataclasses.replace(record, kinds=_kinds(weights, record, jnp.float32(share)))
    new.append(record)
  return CompressionState(jax.tree.unflatten(jax.tree.structure(params), new))


@jax.jit
def _kinds(weights: Array, leaf: LeafState, share: Float32[Array, '']) -> UInt8[Array, '...']:
  magnitude, threshold = jnp.abs(weights.astype(jnp.float32)), thresholds(leaf, weights.ndim)
  # a pruned weight just at the threshold would be in the first cell, and no longer zero
  may_return = (magnitude > share * threshold) & (magnitude != threshold)
  levels = over_weights(leaf.levels, weights.ndim)
  is_free = (leaf.kinds == ON_GRID) | ((leaf.kinds == PRUNED) & may_return)
  has_cells = (levels > 0) & (threshold > 0)
  return jnp.where(is_free & has_cells, jnp.uint8(ZERO_OR_ON_GRID), leaf.kinds)
