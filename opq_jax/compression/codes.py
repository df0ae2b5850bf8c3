"""Weights to integer codes and values, and back, under a frozen compression state.

`opq_jax.compression.records` describes kinds, codes and values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int8

from opq_jax.compression.cells import cell_of, is_below_first, settled, value_of, values_of_codes
from opq_jax.compression.records import (
  PRUNED,
  ZERO_OR_ON_GRID,
  CompressionState,
  LeafState,
)
from opq_jax.core import trees
from opq_jax.core.limits import ESCAPE
from opq_jax.core.trees import PyTree


@trees.compiled
def apply_compression(params: PyTree, state: CompressionState) -> PyTree:
  """Returns the parameters of the compressed network: pruned, and on the codebook.

  Args:
    params: the tree, with any values; while finetuning, the latent weights.  Every shard of a leaf
      is compressed where it is, and the values lie as the weights do.
    state: its kinds and codebooks.

  Returns:
    The same tree with `codebook[code]` at every compressed leaf (the leaf's dtype), escaped weights
    as they are, and every other leaf bit-identical.  The derivative is straight-through: the
    identity on survivors, escaped ones included, and exactly 0 on pruned weights; nothing flows
    into the state.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import opq_jax
  >>> params = {'w': jnp.array([[0.1, -2.0], [1.0, 0.2]])}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=2.0))
  >>> bool((apply_compression(params, state)['w'] == 0).sum() == 2)
  True
  >>> jax.grad(lambda p: apply_compression(p, state)['w'].sum())(params)['w'].tolist()
  [[0.0, 1.0], [1.0, 0.0]]
  """
  return trees.map_records(_compress_leaf, params, state.tree, LeafState)


@trees.compiled
def encode(params: PyTree, state: CompressionState) -> PyTree:
  """Returns the integer codes of the parameters: int8 leaves where compressed, others as they are.

  The inverse is `decode`: `decode(encode(params, state), state, params)` equals
  `apply_compression(params, state)` bit for bit.  It needs the parameters for escaped weights,
  whose code -128 does not hold their values.

  Args:
    params: the tree, with any values.
    state: its kinds and codebooks.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import opq_jax
  >>> params = {'w': jnp.array([[0.1, -2.0], [1.0, 0.2]])}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=2.0))
  >>> encode(params, state)['w'].tolist()
  [[0, -3], [2, 0]]
  """
  return trees.map_records(_encode_leaf, params, state.tree, LeafState)


def decode(codes: PyTree, state: CompressionState, params: PyTree | None = None) -> PyTree:
  """Returns the values of integer codes: `codebook[code]`, in the dtype that each leaf had.

  Args:
    codes: the result of `encode`.
    state: its kinds and codebooks.
    params: where escaped weights are read, and nothing else is; not needed where there are none.
      Inside of a trace, where codes are not known, an escaped weight is NaN without them.

  Raises:
    ValueError: `state` was made for a tree of other structure or shapes; or a leaf has escaped
      weights and no `params` are given.
  """
  if params is None:
    leaves = trees.named_leaves(codes).items()
    leaf_states = trees.records(codes, state.tree, LeafState)
    for (name, code), record in zip(leaves, leaf_states, strict=True):
      # a traced code has no value yet to look for escapes in
      if record is None or isinstance(code, jax.core.Tracer):
        continue
      if bool(jnp.any(code == ESCAPE)):
        raise ValueError(
          f'{name}: found escaped weights and no params, expected decode(codes, state, params)'
        )
  return _decode(codes, state, params)


@trees.compiled
def _decode(codes: PyTree, state: CompressionState, params: PyTree | None) -> PyTree:
  weights = {} if params is None else trees.named_leaves(params)

  def look_up(name: str, code: Int8[Array, '...'], leaf: LeafState) -> Float[Array, '...']:
    _check_shape(name, code, leaf.kinds.shape)
    value = values_of_codes(code, leaf)
    # NaN cannot be mistaken for a weight
    escaped = jnp.full_like(value, jnp.nan)
    if params is not None:
      escaped = weights[name]
      check_leaf(name, escaped, leaf)
    return jnp.where(code == ESCAPE, escaped, value)

  return trees.map_records(look_up, codes, state.tree, LeafState)


def _encode_leaf(name: str, weights: Array, leaf: LeafState) -> Int8[Array, '...']:
  check_leaf(name, weights, leaf)
  weights = weights.astype(jnp.float32)
  code = 1 + settled(cell_of(jnp.abs(weights), leaf), leaf)
  code = jnp.where(_is_zero(weights, leaf), 0, jnp.where(weights < 0, -code, code))
  return jnp.where(leaf.escaped, ESCAPE, code).astype(jnp.int8)


def _compress_leaf(name: str, weights: Array, leaf: LeafState) -> Array:
  check_leaf(name, weights, leaf)
  return _quantize(weights, leaf)


@jax.custom_jvp
def _quantize(weights: Array, leaf: LeafState) -> Array:
  as_float = weights.astype(jnp.float32)
  # a weight that finetuning has moved out of the grid may be in a cell that has no number
  value = value_of(settled(cell_of(jnp.abs(as_float), leaf), leaf), leaf)
  value = jnp.where(as_float < 0, -value, value)
  value = jnp.where(_is_zero(as_float, leaf), jnp.zeros_like(value), value)
  return jnp.where(leaf.escaped, weights, value)


def _is_zero(weights: Float32[Array, '...'], leaf: LeafState) -> Bool[Array, '...']:
  in_zero_cell = (leaf.kinds == ZERO_OR_ON_GRID) & is_below_first(jnp.abs(weights), leaf)
  return (leaf.kinds == PRUNED) | in_zero_cell


@_quantize.defjvp
def _straight_through(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
  weights, leaf = primals
  tangent = tangents[0]
  # a custom rule, because the derivative of `floor` is 0; tangents of the state are dropped
  return _quantize(weights, leaf), jnp.where(leaf.mask, tangent, jnp.zeros_like(tangent))


def _check_shape(name: str, leaf: Array, expected: tuple[int, ...]) -> None:
  if jnp.shape(leaf) != tuple(expected):
    raise ValueError(f'{name}: found shape {jnp.shape(leaf)}, expected {tuple(expected)}')


def check_leaf(name: str, weights: Array, leaf: LeafState) -> None:
  """Raises ValueError where weights have another shape or dtype than their state."""
  _check_shape(name, weights, leaf.kinds.shape)
  if weights.dtype != leaf.dtype:
    raise ValueError(f'{name}: found dtype {weights.dtype}, expected {leaf.dtype}')
