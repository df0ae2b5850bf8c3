"""Records of an allocation: one struct per compressed leaf, in a tree like the parameters."""

from typing import Any

import flax.struct
from jaxtyping import Array, Float32, Int32

from opq_jax.core import exported_nodes
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.trees import PyTree


@exported_nodes.register
@flax.struct.dataclass
class LeafAllocation:
  """Pruning and quantization of one leaf of n weights in C output channels.

  Of a leaf with slices every array has the slices' axes in front: each slice has a threshold, a
  step and predictions of its own, as if it were a leaf by itself.

  Lengths are in the units of the weights.  Predictions are computed from the leaf's true histogram,
  or from the Laplace density where only closed forms are asked for (`corrected=False`).

  Attributes:
    scale: tau_j, mean |w| of every channel.
    threshold: beta; a weight survives where |w| > beta.
    sparsity: predicted share of the leaf's weights that is pruned.
    step: Delta > 0, the width of a cell.
    offset: position of a level in its cell; the first level is threshold + offset.
    levels: cells per sign, 0 (no weight is on the grid) ... 127.
    escaped: predicted share of the leaf's weights beyond the last cell, which are stored exactly.
    clipped: predicted share of the leaf's weights beyond the last cell that take its level: with
      `palette_bits` none is stored exactly.
    bits: b_j = 1 + log2(max(1, reach_j / Delta)) of every channel: bits of a surviving weight at a
      fixed width, sign included.
    error: predicted ||w - w^||^2 / ||w||^2.
    entropy: predicted zeroth-order entropy of the codes plus the bits of escaped values, in bits
      per weight of the leaf.
    payload: `entropy` plus the leaf's frequency table, checksum and positions of escaped weights in
      a file, in bits per weight of the leaf; with `corrected=False` the entropy of the Laplace
      density alone.
    laplace_fit: E[w^2] over 2 mean_j tau_j^2, its value under the Laplace density: 1 where the
      density fits, .79 for Gaussian weights, .67 for uniform ones, far above 1 for heavy tails; NaN
      with `corrected=False`.
    dead_channels: output channels that have weights and lose all of them.
    dead_rows: the same for indices of the first axis (rows of a table); 0 where the first axis is
      the channels' own.
    shape: the leaf's shape.
    channel_axis: the axis of its output channels, or several.
    tied_to: the path of an earlier leaf that is the same array, whose allocation this is; '' of
      all others.
    is_transposed: whether the leaf is the transpose of that one.
    slices: leading axes that count slices.
    output_scales: of all outputs, with an axis of length 1 for each other axis that a slice has;
      None where all are 1.  All lengths and predictions are those of the weights over the scales.
    palette_bits: as in `opq_jax.allocate`; None where weights may escape.
  """

  scale: Float32[Array, '*slices channels']
  threshold: Float32[Array, '*slices']
  sparsity: Float32[Array, '*slices']
  step: Float32[Array, '*slices']
  offset: Float32[Array, '*slices']
  levels: Int32[Array, '*slices']
  escaped: Float32[Array, '*slices']
  clipped: Float32[Array, '*slices']
  bits: Float32[Array, '*slices channels']
  error: Float32[Array, '*slices']
  entropy: Float32[Array, '*slices']
  payload: Float32[Array, '*slices']
  laplace_fit: Float32[Array, '*slices']
  dead_channels: Int32[Array, '*slices']
  dead_rows: Int32[Array, '*slices']
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
  channel_axis: ChannelAxes = flax.struct.field(pytree_node=False)
  tied_to: str = flax.struct.field(pytree_node=False, default='')
  is_transposed: bool = flax.struct.field(pytree_node=False, default=False)
  slices: int = flax.struct.field(pytree_node=False, default=0)
  output_scales: Float32[Any, '...'] | None = None
  palette_bits: int | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Shape of the slices' axes; () without slices."""
    return tuple(self.shape[: self.slices])


@exported_nodes.register
@flax.struct.dataclass
class Allocation:
  """Pruning and quantization of a whole tree.

  Attributes:
    tree: the parameters' own tree, with a `LeafAllocation` where a leaf is compressed and None
      where it passes through.
  """

  tree: PyTree
