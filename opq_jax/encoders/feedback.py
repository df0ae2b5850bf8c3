"""Codes by error feedback: weights coded later compensate for errors in the layer's output."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from opq_jax import compression
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.cells import cell_of, settled, value_of
from opq_jax.compression.records import in_units, kinds_of_codes
from opq_jax.core import trees
from opq_jax.core.limits import ESCAPE
from opq_jax.core.trees import PyTree
from opq_jax.encoders.encoder import (
  Encoded,
  LeafEncoder,
  Moments,
  Trial,
  encoded,
  leaves_to_code,
  named_leaf,
)
from opq_jax.encoders.factors import (
  DAMPING,
  Factored,
  IndefiniteMomentsError,
  check_damping,
  factor_of,
)
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.encoders.tied_codes import with_ties
from opq_jax.network import InputMoments

# inputs whose errors are pushed on one by one, within rows that stay in the processor's cache
_BLOCK = 64


# eq=False in all encoders: arrays do not compare to one boolean, and have no hash
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Feedback(LeafEncoder):
  r"""Chooses codes that minimise the error of each layer's output, by error feedback (GPTQ).

  With decoded weights Q in the place of W, the output of a layer y = x W has the squared error

      E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))          H = E[x^T x]

  With the upper triangular U of H^-1 = U^T U, inputs are coded one after the other, inputs of most
  energy first, for all output channels at once:

      q_i  =  the value of the cell that w_i lies in, 0 where |w_i| <= threshold
      w_j  <-  w_j - (w_i - q_i) U_ij / U_ii           for all inputs j that are still to come

  The update is the least-squares answer of the remaining weights to the error of w_i.  Pruning is
  one of the codes, so the mask is decided on the way.  An escaped weight keeps its value, and
  passes on the errors that were pushed to it.  The cell is that of `opq_jax.encode` (not the
  nearest value), because its edges know what a code costs: they are those of
  argmin_k (w - v_k)^2 + lambda bits_k, with lambda the slope of a grid that is optimal for its
  entropy.  For independent inputs of equal energy the codes are those of `Rounding`.

  An error w_i - q_i is pushed on only up to the larger of step and threshold.  A larger error
  belongs to a weight out of the grid's reach, and all remaining weights would be bent to compensate
  for it.  Where a few massive rows of x dominate H, this would cost the other rows more than it
  gives the massive ones (`tests/encoders/test_feedback.py`).

  The update is that of Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal
  Brain Surgeon", NIPS 1992, in the form of Frantar et al., "GPTQ: Accurate Post-Training
  Quantization for Generative Pre-trained Transformers", ICLR 2023.  Ours are the entropy-coded
  grid and mask of a whole leaf, and moments without data (`opq_jax.correction.synthetic_inputs`).

  Pushed errors make weights a little larger, and their codes take a few percent more bits on the
  same grid.  `opq_jax.compress` therefore searches for coarser grids, whose codes have the bits
  asked.

  Attributes:
    moments: second moments of each layer's inputs, from `opq_jax.network.second_moments`: a tree
      like the params, with an `InputMoments`, or None where weights are rounded.  A bare matrix
      [groups, K, K] is of a leaf whose last axis are the outputs.
    damping: added to the diagonal of H, times its mean: how far to distrust the moments.

  >>> import numpy as np, opq_jax
  >>> rng = np.random.default_rng(0)
  >>> x = (rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64))).astype(np.float32)
  >>> kernel = rng.laplace(size=(64, 256)).astype(np.float32)
  >>> error = lambda params: float(np.square(x @ (kernel - np.asarray(params))).sum())
  >>> feedback = Feedback((x.T @ x / 512)[None])
  >>> coded = opq_jax.compress(kernel, compression_rate=16.0, encoder=feedback)
  >>> error(coded.params) < 0.7 * error(opq_jax.compress(kernel, compression_rate=16.0).params)
  True
  >>> feedback
  Feedback(moments=<float32[1, 64, 64]>, damping=0.05)
  """

  moments: PyTree
  damping: float = DAMPING

  def __post_init__(self) -> None:
    if self.moments is None:
      raise ValueError(
        'moments: found None, expected a tree of matrices (without moments: Rounding())'
      )
    check_damping(self.damping)

  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of a tree on its plain grids; pure, and may be traced.

    Leaves that are one array get the codes of the first of them that has moments.

    In a trace, a leaf whose damped moments are not positive definite is rounded.

    Raises:
      ValueError: grids or moments were made for another tree, a matrix has another shape than its
        leaf needs, or (outside of a trace) is not finite or not positive definite once damped.
    """
    records = trees.records(params, grids.tree, LeafState)
    return with_ties(self._apart(params, grids), params, records, lambda: self.preferred(params))

  def _apart(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of each leaf by itself, of tied leaves too."""
    chosen: list[tuple[Array, LeafState | None]] = []
    for leaf in leaves_to_code(params, grids, self.moments):
      if leaf.grid is None:
        chosen.append((leaf.weights, None))
        continue
      with named_leaf(leaf.name):
        chosen.append(self.choose_leaf(leaf.weights, leaf.grid, leaf.moments, self.damping))
    return encoded(params, chosen)

  def factored(self, moments: InputMoments, damping: float) -> Factored:
    matrix = np.asarray(moments.matrix, np.float32)
    energy = np.diagonal(matrix, axis1=1, axis2=2)
    # the errors that cost most are made first, while the most weights are left to answer them
    order = np.argsort(-energy, axis=1, kind='stable')
    matrix = np.stack([group[np.ix_(own, own)] for group, own in zip(matrix, order, strict=True)])
    return Factored(factor_of(matrix, damping), moments.inputs, order)

  def choose_matrix(
    self, weights: Array, grid: LeafState, moments: Moments, damping: float
  ) -> tuple[Array, LeafState]:
    if moments is None:
      codes = compression.encode(weights.astype(grid.dtype), CompressionState(grid))
    else:
      layout = MatrixLayout(weights.shape, moments.inputs)
      # an output's errors are pushed on to its own weights alone, so its scale is a unit like any
      units, unit_grid = in_units(weights, grid)
      of_rows = dataclasses.replace(unit_grid, kinds=layout.rows(grid.kinds))
      if isinstance(moments, Factored):
        assert moments.order is not None
        rows = codes_by_factor(layout.rows(units), moments.factor, moments.order, of_rows)
      else:
        rows, is_definite = codes_of_matrix(layout.rows(units), moments.matrix, of_rows, damping)
        if not isinstance(is_definite, jax.core.Tracer) and not is_definite:
          raise IndefiniteMomentsError(damping)
      codes = layout.leaf(rows)
    values = compression.decode(codes, CompressionState(grid), weights.astype(grid.dtype))
    return values, dataclasses.replace(grid, kinds=kinds_of_codes(codes))

  def trials(self) -> Callable[[PyTree, CompressionState], Trial]:
    def trial(params: PyTree, grids: CompressionState) -> Trial:
      coded = self._apart(params, grids)
      return Trial(*coded, _bits_per_weight(*coded))

    return trial


@jax.jit
def codes_of_matrix(
  weights: Float[Array, '... channels'],
  moments: Float32[Array, 'groups K K'],
  grid: LeafState,
  damping: Float[Array, ''],
) -> tuple[Int8[Array, '... channels'], Bool[Array, '']]:
  """Returns the codes of one leaf by error feedback, and whether all damped moments have a factor.

  Where one has none, the weights of its group are rounded.
  """
  width = moments.shape[-1]
  padded = _whole_blocks(width)

  def factor_of_group(
    moments: Float32[Array, 'K K'],
  ) -> tuple[Float32[Array, 'K K'], Int[Array, ' K'], Bool[Array, '']]:
    # over the mean energy: a factor of H cancels in U_ij / U_ii, but damping and float32 then see
    # numbers near 1.  Where all inputs are 0, H is the damping alone, and weights are rounded
    energy = jnp.diagonal(moments)
    mean = jnp.mean(energy)
    matrix = moments / jnp.where(mean > 0, mean, 1)
    # the errors that cost most are made first, while the most weights are left to answer them
    order = jnp.argsort(-energy)
    matrix = matrix[order][:, order] + jnp.float32(damping) * jnp.eye(width)
    factor = _factor(jnp.eye(padded).at[:width, :width].set(matrix))
    # Cholesky's answer of NaN would make every weight 0: NaN is in no cell
    is_definite = jnp.isfinite(factor).all()
    factor = jnp.where(is_definite, factor, jnp.eye(padded))
    return factor[:width, :width], order, is_definite

  factor, order, is_definite = jax.vmap(factor_of_group)(moments)
  return codes_by_factor(weights, factor, order, grid), is_definite.all()


@jax.jit
def codes_by_factor(
  weights: Float[Array, '... channels'],
  factor: Float32[Array, 'groups K K'],
  order: Int[Array, 'groups K'],
  grid: LeafState,
) -> Int8[Array, '... channels']:
  """Returns the codes of one leaf by error feedback.

  Args:
    weights: of the leaf, in rows of inputs.
    factor: U of each group, of inputs in their order.
    order: of the inputs, those of most energy first.
    grid: the plain grid, in units of the leaf's output scales.
  """
  groups, width, _ = factor.shape
  # the outputs of a group lie next to each other, as in Flax; a group has moments of its own
  by_group = lambda array: array.reshape(width, groups, -1).swapaxes(0, 1)
  rows = by_group(weights.astype(jnp.float32))
  # the value of an escaped weight, in the leaf's dtype; NaN where a weight is not escaped
  exact = by_group(jnp.where(grid.escaped, weights.astype(grid.dtype).astype(jnp.float32), jnp.nan))
  padded = _whole_blocks(width)

  def codes_of_group(
    rows: Float32[Array, 'K channels'],
    exact: Float32[Array, 'K channels'],
    factor: Float32[Array, 'K K'],
    order: Int[Array, ' K'],
  ) -> Float32[Array, 'K channels']:
    factor = jnp.eye(padded).at[:width, :width].set(factor)
    rows = jnp.zeros((padded, rows.shape[1])).at[:width].set(rows[order])
    exact = jnp.full((padded, rows.shape[1]), jnp.nan).at[:width].set(exact[order])
    codes = _coded_rows(rows, exact, factor, grid, min(_BLOCK, width))[:width]
    return jnp.zeros_like(codes).at[order].set(codes)

  codes = jax.vmap(codes_of_group)(rows, exact, factor, order)
  return codes.swapaxes(0, 1).reshape(weights.shape).astype(jnp.int8)


def _whole_blocks(width: int) -> int:
  """Returns the inputs of whole blocks: the last is filled with some that nothing depends on."""
  block = min(_BLOCK, width)
  return -(-width // block) * block


def _factor(matrix: Float32[Array, 'K K']) -> Float32[Array, 'K K']:
  """Returns the upper triangular U of matrix^-1 = U^T U."""
  # J H J = L L^T with J the reversal, so H = R R^T with R = J L J upper, and U = R^-1 = J L^-1 J;
  # H^-1 itself, whose condition is the square of that of L, is never formed
  lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
  inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(matrix)), lower=True)
  return inverse[::-1, ::-1]


class _AllRows(NamedTuple):
  """All rows of one group, between two blocks: weights with pushed errors, and codes so far."""

  weights: Float32[Array, 'K channels']
  codes: Float32[Array, 'K channels']


class _BlockRows(NamedTuple):
  """The rows of one block, between two inputs; errors are (w_i - q_i) / U_ii."""

  weights: Float32[Array, 'block channels']
  codes: Float32[Array, 'block channels']
  errors: Float32[Array, 'block channels']


def _coded_rows(
  weights: Float32[Array, 'K channels'],
  exact: Float32[Array, 'K channels'],
  factor: Float32[Array, 'K K'],
  grid: LeafState,
  block: int,
) -> Float32[Array, 'K channels']:
  """Returns the codes, as whole numbers, of K inputs one after the other; `block` divides K.

  An error reaches the rows of its own block at once, and all rows after the block by one product of
  matrices at the block's end.
  """
  inputs, channels = weights.shape
  limit = jnp.maximum(grid.step, grid.threshold)

  def code_block(number: Array, rows: _AllRows) -> _AllRows:
    begin = number * block
    block_weights = lax.dynamic_slice(rows.weights, (begin, 0), (block, channels))
    block_exact = lax.dynamic_slice(exact, (begin, 0), (block, channels))
    to_all = lax.dynamic_slice(factor, (begin, 0), (block, inputs))
    to_block = lax.dynamic_slice(to_all, (0, begin), (block, block))

    def code_input(i: Array, rows: _BlockRows) -> _BlockRows:
      code, value = codes_in_cells(rows.weights[i], grid)
      is_escaped = ~jnp.isnan(block_exact[i])
      code = jnp.where(is_escaped, float(ESCAPE), code)
      value = jnp.where(is_escaped, block_exact[i], value)
      error = jnp.clip(rows.weights[i] - value, -limit, limit) / to_block[i, i]
      # U is 0 before its diagonal, so this leaves rows alone that have their codes
      return _BlockRows(
        rows.weights - to_block[i][:, None] * error[None],
        rows.codes.at[i].set(code),
        rows.errors.at[i].set(error),
      )

    zeros = jnp.zeros((block, channels))
    coded = lax.fori_loop(0, block, code_input, _BlockRows(block_weights, zeros, zeros))
    # to all rows, because shapes in a loop of XLA are fixed: rows that have their codes change too,
    # and are never read again.  In full float32: by default GPUs and TPUs would round the factors
    push = jnp.matmul(to_all.T, coded.errors, precision=lax.Precision.HIGHEST)
    return _AllRows(
      rows.weights - push, lax.dynamic_update_slice(rows.codes, coded.codes, (begin, 0))
    )

  start = _AllRows(weights, jnp.zeros_like(weights))
  return lax.fori_loop(0, inputs // block, code_block, start).codes


class CodedRow(NamedTuple):
  """Codes, as whole float32 numbers, and their values."""

  codes: Float32[Array, ' channels']
  values: Float32[Array, ' channels']


@jax.jit
def codes_in_cells(weights: Float32[Array, ' channels'], grid: LeafState) -> CodedRow:
  """Returns the code of the cell that each weight lies in: as `opq_jax.encode`, without a mask."""
  magnitude = jnp.abs(weights)
  cell = settled(cell_of(magnitude, grid), grid)
  survives = (magnitude > grid.threshold) & (grid.levels > 0)
  sign = jnp.where(weights < 0, -1.0, 1.0)
  code = jnp.where(survives, sign * (cell + 1), 0)
  value = value_of(cell, grid).astype(jnp.float32)
  return CodedRow(code, jnp.where(survives, sign * value, 0))


def _bits_per_weight(params: PyTree, state: CompressionState) -> float:
  """Returns the zeroth-order entropy of all codes and the bits of escaped values, per weight.

  Each leaf has its own distribution.
  """
  codes = trees.named_leaves(compression.encode(params, state))
  records = trees.records(params, state.tree, LeafState)
  compressed = [
    (code, record)
    for code, record in zip(codes.values(), records, strict=True)
    if record is not None
  ]
  bits = 0.0
  for code, record in compressed:
    value_bits = 8.0 * jnp.dtype(record.dtype).itemsize
    # slices one by one: each has a distribution of its own, and all have one shape
    of_slices = code.reshape(-1, *code.shape[record.slices :])
    bits += sum(float(_leaf_bits(of_slice, value_bits)) for of_slice in of_slices)
  return bits / max(sum(code.size for code, _ in compressed), 1)


@jax.jit
def _leaf_bits(codes: Array, value_bits: Float[Array, '']) -> Float32[Array, '']:
  # whole numbers: a count in float32 would stop at 2^24
  counts = jnp.zeros(256, jnp.int32).at[codes.reshape(-1).astype(jnp.int32) + 128].add(1)
  share = counts.astype(jnp.float32) / codes.size
  entropy = -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1)))
  # an escape, -128, is counted first
  return codes.size * entropy + counts[0].astype(jnp.float32) * value_bits
