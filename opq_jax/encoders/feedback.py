r"""Codes chosen with error feedback: a better encoder for the same codebooks and the same decoder.

`opq_jax.encode` rounds every weight for itself.  What counts is a layer's output, and there the
error of one weight can be made good by the weights that are still to be rounded.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from opq_jax.allocation.allocator import Allocation, LeafAllocation, allocate, check_targets
from opq_jax.compression import codes as compression
from opq_jax.compression.codes import CompressionState, LeafState
from opq_jax.core import trees
from opq_jax.core.trees import PyTree

DAMPING = 0.05
_BLOCK = 64  # inputs whose feedback is pushed on within a block that stays in the cache
_TOLERANCE = 3e-3  # of the bits, either way
_MAX_STEPS = 4
_MOST_BITS = 8.0  # of a code, the most that `allocate` may be asked for


def encode_with_feedback(
  params: PyTree, state: CompressionState, moments: PyTree, *, damping: float = DAMPING
) -> tuple[PyTree, CompressionState]:
  r"""Other codes of the same codebooks, with which the layers' outputs err less.

  Of a layer y = x W with second moments H = E[x^T x] the codes are to make

      E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))

  small, all Q on the leaf's codebook.  With the upper triangular U of H^-1 = U^T U, one input i
  after the other, those of most energy first, and all output channels at once:

      q_i  =  the cell that w_i lies in, 0 where |w_i| <= threshold
      w_j  <-  w_j - (w_i - q_i) U_ij / U_ii           for all j that are still to come

  which is the least-squares answer of the weights to come to the error that was made.  Pruned is
  one of the codes: the mask is decided on the way.  An escaped weight keeps its value, and
  the errors that earlier weights have pushed on to it are pushed on.  The cell is that of
  `opq_jax.compression.codes`, because it knows what a code costs: the edges of a grid that is
  optimal for its entropy are those of argmin_k (w - v_k)^2 + lambda bits_k, lambda the leaf's
  slope.

  The corrections make weights a little larger, and files by a few percent;
  `allocate_with_feedback` asks for so much coarser grids that they are not.

  Where H says that inputs are independent and alike, this is `opq_jax.encode`.

  An error w_i - q_i beyond one step, or the threshold where that is larger, is pushed on as if it
  were no more: it comes from a weight out of the grid's reach, and the weights to come would all
  be bent for it.  Where a few massive rows of x rule H, that costs all other rows more than it
  gives (`tests/test_feedback.py`).

  The feedback is that of Hassibi and Stork, "Second Order Derivatives for Network Pruning:
  Optimal Brain Surgeon", NIPS 1992, in the form of Frantar et al., "GPTQ: Accurate Post-Training
  Quantization for Generative Pre-trained Transformers", ICLR 2023.  That codes, codebook and mask
  are entropy-coded ones of a whole leaf, and that the moments need no data
  (`opq_jax.synthetic_inputs`), is ours.

  Args:
    params: the original weights.
    state: their state, from `opq_jax.init_state`.
    moments: `opq_jax.second_moments`: the tree of the params with a matrix [groups, K, K], or None
      where the codes stay as they are.
    damping: added to the diagonal of H, times its mean: how far to distrust the moments.

  Returns:
    `(params, state)`: the decoded values, and the same grids with the masks of these codes.  For
    these two, as for any others, `encode` finds the codes and `save` writes them.  The call is pure
    and may be traced.

  Raises:
    ValueError: a tree is made for another one, a matrix has another shape than its kernel needs,
      or (outside of a trace) is not finite.

  >>> import numpy as np, opq_jax
  >>> rng = np.random.default_rng(0)
  >>> x = (rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64))).astype(np.float32)
  >>> kernel = rng.laplace(size=(64, 32)).astype(np.float32)
  >>> state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  >>> coded, coded_state = encode_with_feedback(kernel, state, (x.T @ x / 512)[None])
  >>> error = lambda values: float(np.square(x @ (kernel - np.asarray(values))).sum())
  >>> error(coded) < 0.8 * error(opq_jax.apply_compression(kernel, state))
  True
  """
  params = jax.tree.map(trees.native, params)
  leaves = trees.named_leaves(params)
  records = trees.records(params, state.tree, LeafState)
  matrices = matrices_of(params, moments)
  values: list[Array] = []
  masks: list[LeafState | None] = []
  for (name, leaf), record, matrix in zip(leaves.items(), records, matrices, strict=True):
    if record is None:
      values.append(leaf)
      masks.append(None)
      continue
    if matrix is not None:
      check_moments(name, leaf, matrix)
    value, mask = encode_leaf(leaf, record, matrix, damping)
    values.append(value)
    masks.append(mask)
  structure = jax.tree.structure(params)
  return (
    jax.tree.unflatten(structure, values),
    CompressionState(jax.tree.unflatten(structure, masks)),
  )


def encode_leaf(
  kernel: Array, record: LeafState, moments: Array | None, damping: float
) -> tuple[Array, LeafState]:
  """Decoded values of one kernel, and its grid with their kinds; plain codes without moments."""
  if moments is None:
    codes = compression.encode(kernel, CompressionState(record))
  else:
    codes = codes_of_leaf(kernel, moments, record, damping)
  values = compression.decode(codes, CompressionState(record), kernel.astype(record.dtype))
  return values, dataclasses.replace(record, kinds=compression.kinds_of_codes(codes))


def matrices_of(params: PyTree, moments: PyTree) -> list[Any]:
  """The moments of every leaf, None where there are none.

  Raises:
    ValueError: they are those of another tree.
  """
  try:
    return trees.beside(params, moments)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'moments: found {jax.tree.structure(moments)}, expected the tree of the parameters with a '
      'matrix or None at every leaf'
    ) from error


def allocate_with_feedback(
  params: PyTree,
  moments: PyTree,
  *,
  compression_rate: float | None = None,
  bits_per_weight: float | None = None,
  damping: float = DAMPING,
  **options: Any,
) -> tuple[Allocation, PyTree, CompressionState]:
  """Allocates such that the codes with feedback, not the plain ones, have the rate that is asked.

  Feedback costs a leaf a few percent of entropy at the same grid.  A grid that much coarser wins
  by far over the same grid with dearer codes, and is found by asking for a higher rate: in
  proportion at first, then by the secant of the last two, to 0.3 % or for the fourth time.

  Args:
    params: the original weights.
    moments: as for `encode_with_feedback`.
    compression_rate, bits_per_weight: of `allocate`: the entropy of the codes is that of plain ones
      of that target.
    damping: as for `encode_with_feedback`.
    **options: of `opq_jax.allocate`, such as `objective`.

  Returns:
    The allocation that was found, and `(params, state)` of `encode_with_feedback`.

  Raises:
    ValueError: as `allocate` and `encode_with_feedback`.

  >>> import numpy as np
  >>> rng = np.random.default_rng(0)
  >>> x = (rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64))).astype(np.float32)
  >>> kernel = rng.laplace(size=(64, 256)).astype(np.float32)
  >>> allocation, coded, state = allocate_with_feedback(
  ...   kernel, (x.T @ x / 512)[None], compression_rate=16.0
  ... )
  >>> bool(allocation.tree.step > allocate(kernel, compression_rate=16.0).tree.step)
  True
  """

  def encoder(params: PyTree, state: CompressionState) -> tuple[PyTree, CompressionState, float]:
    coded, coded_state = encode_with_feedback(params, state, moments, damping=damping)
    return coded, coded_state, _entropy(coded, coded_state)

  return allocate_for(encoder, params, compression_rate, bits_per_weight, **options)


def allocate_for(
  encoder: Callable[[PyTree, CompressionState], tuple[PyTree, CompressionState, float]],
  params: PyTree,
  compression_rate: float | None,
  bits_per_weight: float | None = None,
  **options: Any,
) -> tuple[Allocation, PyTree, CompressionState]:
  """The allocation whose codes by an encoder have the entropy of plain codes of the target.

  Args:
    encoder: (params, plain grids) -> params, their state, and bits per weight.
    params, compression_rate, bits_per_weight, **options: of `opq_jax.allocate`.
  """
  targets = check_targets(compression_rate=compression_rate, bits_per_weight=bits_per_weight)
  log_asked, log_off, elasticity = math.log(float(targets['bits_per_weight'])), None, 1.0
  for _ in range(_MAX_STEPS):
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter('always')
      allocation = allocate(params, bits_per_weight=math.exp(log_asked), **options)
      if log_off is None:
        wanted = _predicted_entropy(params, allocation)
      coded, coded_state, found = encoder(params, compression.init_state(params, allocation))
    last, log_off = log_off, math.log(max(found, 1e-9) / max(wanted, 1e-9))
    if abs(log_off) <= _TOLERANCE:
      break
    if last is not None:
      elasticity = min(max((log_off - last) / moved, 0.5), 2.0)
    moved = min(-log_off / elasticity, math.log(_MOST_BITS) - log_asked)
    if moved == 0:  # no grid has more bits
      break
    log_asked += moved
  for warning in said:  # of the last allocation alone
    warnings.warn(warning.message, stacklevel=3)
  return allocation, coded, coded_state


def _predicted_entropy(params: PyTree, allocation: Allocation) -> float:
  """Bits per weight of the plain codes of all compressed leaves."""
  records = trees.records(params, allocation.tree, LeafAllocation)
  leaves = [(math.prod(r.shape), float(r.entropy)) for r in records if r is not None]
  return sum(size * bits for size, bits in leaves) / max(sum(size for size, _ in leaves), 1)


@jax.jit
def codes_of_leaf(
  kernel: Float[Array, '... channels'],
  moments: Float32[Array, 'groups K K'],
  leaf: LeafState,
  damping: Float[Array, ''],
) -> Array:
  """The int8 codes of one kernel, as `encode_with_feedback` chooses them."""
  groups, width, _ = moments.shape
  weights = kernel.astype(jnp.float32).reshape(width, groups, -1).swapaxes(0, 1)
  # so few inputs at a time, and inputs of nothing for the last block to be a whole one
  block = min(_BLOCK, width)
  padded = -(-width // block) * block
  # the value of an escaped weight, in the leaf's dtype; NaN where a weight is not escaped
  exact = jnp.where(leaf.escaped, kernel.astype(leaf.dtype).astype(jnp.float32), jnp.nan)
  exact = exact.reshape(width, groups, -1).swapaxes(0, 1)

  def group(
    weights: Float32[Array, 'K channels'],
    exact: Float32[Array, 'K channels'],
    moments: Float32[Array, 'K K'],
  ) -> Float32[Array, 'K channels']:
    energy = jnp.diagonal(moments)
    mean = jnp.mean(energy)
    matrix = moments / jnp.where(mean > 0, mean, 1)
    order = jnp.argsort(-energy)
    matrix = matrix[order][:, order] + jnp.float32(damping) * jnp.eye(width)
    # independent of all others
    matrix = jnp.eye(padded).at[:width, :width].set(matrix)
    rows = jnp.zeros((padded, weights.shape[1])).at[:width].set(weights[order])
    kept = jnp.full((padded, weights.shape[1]), jnp.nan).at[:width].set(exact[order])
    codes = _feedback(rows, kept, _factor(matrix), leaf, block)[:width]
    return jnp.zeros_like(codes).at[order].set(codes)

  codes = jax.vmap(group)(weights, exact, moments)
  return codes.swapaxes(0, 1).reshape(kernel.shape).astype(jnp.int8)


def _factor(matrix: Float32[Array, 'K K']) -> Float32[Array, 'K K']:
  """The upper triangular U of matrix^-1 = U^T U."""
  # J H J = L L^T with J the reversal, so H = R R^T with R = J L J upper, and U = R^-1 = J L^-1 J
  lower = jnp.linalg.cholesky(matrix[::-1, ::-1])
  inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(matrix)), lower=True)
  return inverse[::-1, ::-1]


def _feedback(
  weights: Float32[Array, 'K channels'],
  exact: Float32[Array, 'K channels'],
  factor: Float32[Array, 'K K'],
  leaf: LeafState,
  block: int,
) -> Float32[Array, 'K channels']:
  """The codes, as whole numbers, of K inputs one after the other; `block` divides K."""
  inputs, channels = weights.shape
  most = jnp.maximum(leaf.step, leaf.threshold)

  def per_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    weights, codes = carry
    begin = number * block
    mine = lax.dynamic_slice(weights, (begin, 0), (block, channels))
    kept = lax.dynamic_slice(exact, (begin, 0), (block, channels))
    push = lax.dynamic_slice(factor, (begin, 0), (block, inputs))
    within = lax.dynamic_slice(push, (0, begin), (block, block))

    def per_input(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      mine, codes, errors = carry
      code, value = nearest(mine[i], leaf)
      is_escaped = ~jnp.isnan(kept[i])
      code = jnp.where(is_escaped, float(compression.ESCAPE), code)
      value = jnp.where(is_escaped, kept[i], value)
      error = jnp.clip(mine[i] - value, -most, most) / within[i, i]
      mine = mine - within[i][:, None] * error[None]
      return mine, codes.at[i].set(code), errors.at[i].set(error)

    zeros = jnp.zeros((block, channels))
    _, mine, errors = lax.fori_loop(0, block, per_input, (mine, zeros, zeros))
    weights = weights - jnp.matmul(push.T, errors, precision=lax.Precision.HIGHEST)
    return weights, lax.dynamic_update_slice(codes, mine, (begin, 0))

  blocks = inputs // block
  _, codes = lax.fori_loop(0, blocks, per_block, (weights, jnp.zeros_like(weights)))
  return codes


@jax.jit
def nearest(
  weights: Float32[Array, ' channels'], leaf: LeafState
) -> tuple[Float32[Array, ' channels'], Float32[Array, ' channels']]:
  """The code of each weight, by the rule of `opq_jax.encode` but with no mask given; its value."""
  magnitude = jnp.abs(weights)
  cell = compression.settled(compression.cell(magnitude, leaf), leaf)
  survives = (magnitude > leaf.threshold) & (leaf.levels > 0)
  sign = jnp.where(weights < 0, -1.0, 1.0)
  code = jnp.where(survives, sign * (cell + 1), 0)
  value = compression.value_of(cell, leaf).astype(jnp.float32)
  return code, jnp.where(survives, sign * value, 0)


def _entropy(params: PyTree, state: CompressionState) -> float:
  """Zeroth-order entropy of all codes, in bits a weight, each leaf by its own distribution.

  With the values of escaped weights.
  """
  codes = trees.named_leaves(compression.encode(params, state))
  records = trees.records(params, state.tree, LeafState)
  chosen = [
    (code, record)
    for code, record in zip(codes.values(), records, strict=True)
    if record is not None
  ]
  value_bits = [8.0 * jnp.dtype(record.dtype).itemsize for _, record in chosen]
  bits = sum(float(_leaf_bits(code, b)) for (code, _), b in zip(chosen, value_bits, strict=True))
  return bits / max(sum(code.size for code, _ in chosen), 1)


@jax.jit
def _leaf_bits(codes: Array, value_bits: Float[Array, '']) -> Float32[Array, '']:
  counts = jnp.zeros(256).at[codes.reshape(-1).astype(jnp.int32) + 128].add(1)
  share = counts / codes.size
  entropy = -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1)))
  return codes.size * entropy + counts[0] * value_bits


def check_moments(name: str, kernel: Array, moments: Array | np.ndarray) -> None:
  """Raises ValueError where a matrix has another shape than its kernel needs, or is not finite."""
  groups = moments.shape[0] if moments.ndim == 3 else 0
  width = kernel.size // kernel.shape[-1] if kernel.ndim else 0
  if groups == 0 or moments.shape[1:] != (width, width) or kernel.shape[-1] % groups:
    raise ValueError(
      f'{name}: found moments of shape {moments.shape}, expected [groups, {width}, {width}] with '
      f'groups that divide {kernel.shape[-1]} channels'
    )
  if isinstance(moments, jax.core.Tracer):
    return
  # where it is: XLA would compile a program for every shape
  numpy = np if isinstance(moments, np.ndarray) else jnp
  if not numpy.isfinite(moments).all():
    raise ValueError(f'{name}: found NaN or infinite moments, expected finite ones')
