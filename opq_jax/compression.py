"""Masks and codebooks: the frozen compression state, and what it makes of weights.

A weight w of a compressed leaf becomes an integer code, and the code a value:

    code  = 0                                                          where the mask is False
    code  = sign(w) * min(1 + floor((|w| - threshold) / step), levels) where it is True
    value = codebook[code]

Cell k of a survivor is [threshold + (k-1) step, threshold + k step) and its value is the cell's
centroid.  This cell rule, not the nearest value, is what the error and the entropy of
`opq_jax.laplace` describe: rounding to the nearest value instead costs up to 1.6 % more bits at
the same squared error for Laplace weights (`python -m experiments.benchmarks.cell_rule`).

The mask and the codebook are computed once, from the pretrained weights, and never change.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from opq_jax import trees
from opq_jax.allocation import MAX_LEVELS, Allocation, LeafAllocation
from opq_jax.trees import PyTree


@flax.struct.dataclass
class LeafState:
  """What one compressed leaf keeps for ever.

  Attributes:
    mask: True where a weight survives; the leaf's shape.
    codebook: the value of every code, so that `codebook[code]` is the value: entry 0 is 0.0,
      entries 1 ... 127 are the positive values and entries -1 ... -127 (counted from the end, as
      Python does) their negatives.  Past the last level the largest value repeats, so the entries
      are exactly the values that the leaf can hold.
    threshold: where the first cell begins.
    step: the width of a cell; positive.
    levels: cells a sign, 0 ... 127 (0 where every weight is pruned).
    dtype: the leaf's dtype; values are computed in float32 and rounded to it once.

  Invariants, whatever the optimizer does to the weights:
    * `codebook[1:128]` is exactly affine, `first + step * k` in float32 without rounding, so that
      computing a value and looking it up give the same bits on every platform;
    * a value lies inside its own cell, so compressing compressed weights changes nothing.
  """

  mask: Bool[Array, '...']
  codebook: Float32[Array, '255']
  threshold: Float32[Array, '']
  step: Float32[Array, '']
  levels: Int32[Array, '']
  dtype: Any = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CompressionState:
  """Masks and codebooks of a whole parameter tree.

  Attributes:
    tree: the parameters' own tree, with a `LeafState` where a leaf is compressed and None where
      it passes through bit-identical.

  The state is a pytree: replicate it, save it with Orbax, pass it beside the parameters.  It is
  an input of a training step and never an output.
  """

  tree: PyTree


def affine_codebook(
  first: Float[Array, ''], step: Float[Array, ''], levels: Int32[Array, '']
) -> Float32[Array, '255']:
  """The codebook of `levels` values a sign, `first + step * k`; entry 0 is 0.0.

  >>> book = affine_codebook(jnp.float32(0.5), jnp.float32(0.25), jnp.int32(3))
  >>> [float(v) for v in book[jnp.array([0, 1, 2, 3, 4, -1, -3])]]
  [0.0, 0.5, 0.75, 1.0, 1.0, -0.5, -1.0]
  """
  index = jnp.arange(MAX_LEVELS, dtype=jnp.float32)
  last = jnp.maximum(levels.astype(jnp.float32) - 1, 0)
  positive = jnp.asarray(first, jnp.float32) + jnp.asarray(step, jnp.float32) * jnp.minimum(
    index, last
  )
  positive = jnp.where(levels > 0, positive, 0)
  return jnp.concatenate([jnp.zeros(1, jnp.float32), positive, -positive[::-1]])


def init_state(params: PyTree, allocation: Allocation) -> CompressionState:
  """The masks and codebooks that `allocation` asks for; frozen from here on.

  A weight survives where |w| > threshold.  The first value of a leaf is threshold + offset.
  Step and first value are rounded to multiples of one power of two (the step keeps 15 significant
  bits), so that every value `first + step * k` is exact in float32.

  Args:
    params: the tree that was allocated.  Masks lie over devices as their weights do, and what is
      one for a leaf is replicated over its mesh.
    allocation: what `opq_jax.allocate` returned for it.

  Returns:
    A `CompressionState` of the same tree.  The call is pure and may be traced.

  Raises:
    ValueError: `allocation` was made for a tree of other structure or shapes.

  >>> import jax, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (64, 32)), 'bias': jnp.zeros(32)}
  >>> state = init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> state.tree['bias'] is None, state.tree['kernel'].mask.shape
  (True, (64, 32))
  """
  found = trees.records(params, allocation.tree, LeafAllocation)
  states = [
    None if record is None else _init_leaf(name, leaf, record)
    for (name, leaf), record in zip(trees.named_leaves(params).items(), found, strict=True)
  ]
  return CompressionState(jax.tree.unflatten(jax.tree.structure(params), states))


@jax.jit
def apply_compression(params: PyTree, state: CompressionState) -> PyTree:
  """The parameters as the compressed network holds them: pruned, and on the codebook.

  Args:
    params: the tree, with any values; while finetuning, the latent weights.  Every shard of a leaf
      is compressed where it is, and the values lie as the weights do.
    state: its masks and codebooks.

  Returns:
    The same tree with `codebook[code]` at every compressed leaf (the leaf's dtype) and every
    other leaf bit-identical.  The derivative is straight-through: the identity on survivors and
    exactly 0 on pruned weights; nothing flows into the state.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.

  >>> import jax, opq_jax
  >>> params = {'w': jnp.array([[0.1, -2.0], [1.0, 0.2]])}
  >>> state = init_state(params, opq_jax.allocate(params, sparsity=0.5, bits=2.0))
  >>> bool((apply_compression(params, state)['w'] == 0).sum() == 2)
  True
  >>> jax.grad(lambda p: apply_compression(p, state)['w'].sum())(params)['w'].tolist()
  [[0.0, 1.0], [1.0, 0.0]]
  """
  return trees.map_records(_compress_leaf, params, state.tree, LeafState)


@jax.jit
def encode(params: PyTree, state: CompressionState) -> PyTree:
  """The integer codes of the parameters: int8 leaves where compressed, others as they are.

  The inverse is `decode`: `decode(encode(params, state), state)` equals
  `apply_compression(params, state)` bit for bit.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.
  """
  return trees.map_records(_encode_leaf, params, state.tree, LeafState)


@jax.jit
def decode(codes: PyTree, state: CompressionState) -> PyTree:
  """The values of integer codes: `codebook[code]`, in the dtype that each leaf had.

  Raises:
    ValueError: `state` was made for a tree of other structure or shapes.
  """

  def look_up(name: str, code: Int8[Array, '...'], leaf: LeafState) -> Float[Array, '...']:
    _check_shape(name, code, leaf.mask.shape)
    cell = jnp.abs(code.astype(jnp.float32)) - 1
    last = jnp.maximum(leaf.levels.astype(jnp.float32) - 1, 0)
    # exact, as in `_quantize`; and no look-up, before which XLA might gather the codes
    value = leaf.codebook[1] + leaf.step * jnp.clip(cell, 0, last)
    value = jnp.where(code < 0, -value, value)
    return jnp.where(code == 0, 0, value).astype(leaf.dtype)

  return trees.map_records(look_up, codes, state.tree, LeafState)


def _init_leaf(name: str, weights: Array, leaf: LeafAllocation) -> LeafState:
  _check_shape(name, weights, leaf.shape)
  step, first = exact_grid(leaf.step, leaf.threshold + leaf.offset, leaf.levels)
  grid = affine_codebook(first, step, leaf.levels), leaf.threshold, step, leaf.levels
  sharding = None if isinstance(weights, jax.core.Tracer) else getattr(weights, 'sharding', None)
  if isinstance(sharding, NamedSharding):
    # where the weights are, so that every process has it and a checkpoint knows of one mesh
    grid = jax.device_put(grid, NamedSharding(sharding.mesh, P()))
  codebook, threshold, step, levels = grid
  return LeafState(
    mask=survives(weights, leaf.threshold),
    codebook=codebook,
    threshold=threshold,
    step=step,
    levels=levels,
    dtype=weights.dtype,
  )


@jax.jit
def survives(weights: Array, threshold: Float32[Array, '']) -> Bool[Array, '...']:
  """Whether |w| > threshold, as float32."""
  return jnp.abs(weights.astype(jnp.float32)) > threshold


def exact_grid(
  step: Float32[Array, ''], first: Float32[Array, ''], levels: Int32[Array, '']
) -> tuple[Float32[Array, ''], Float32[Array, '']]:
  """`step` and `first` rounded so that `first + step * k`, k < levels, is exact in float32.

  Both become multiples of one unit, a power of two: at most 2**15 units make a step, and at most
  2**23 the largest value, so neither product nor sum rounds, with or without a fused
  multiply-add.
  """
  last = first + step * levels.astype(jnp.float32)
  exponent = jnp.maximum(jnp.frexp(step)[1] - 15, jnp.frexp(last)[1] - 23)
  unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -126))
  return jnp.maximum(jnp.round(step / unit), 1) * unit, jnp.round(first / unit) * unit


def cell(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """The cell of |w|, counted from 0, as a whole float32 number; meaningless where pruned."""
  last = jnp.maximum(leaf.levels.astype(jnp.float32) - 1, 0)
  # times the reciprocal, since XLA divides by a scalar in either way, and the two differ at edges
  return jnp.clip(jnp.floor((magnitude - leaf.threshold) * (1 / leaf.step)), 0, last)


def _encode_leaf(name: str, weights: Array, leaf: LeafState) -> Int8[Array, '...']:
  _check_leaf(name, weights, leaf)
  weights = weights.astype(jnp.float32)
  code = 1 + cell(jnp.abs(weights), leaf)
  return jnp.where(leaf.mask, jnp.where(weights < 0, -code, code), 0).astype(jnp.int8)


def _compress_leaf(name: str, weights: Array, leaf: LeafState) -> Array:
  _check_leaf(name, weights, leaf)
  return _quantize(weights, leaf)


@jax.custom_jvp
def _quantize(weights: Array, leaf: LeafState) -> Array:
  as_float = weights.astype(jnp.float32)
  # exact (see LeafState), so this equals codebook[code] without reading the codebook per weight
  value = leaf.codebook[1] + leaf.step * cell(jnp.abs(as_float), leaf)
  value = jnp.where(as_float < 0, -value, value)
  return jnp.where(leaf.mask, value, 0).astype(weights.dtype)


@_quantize.defjvp
def _straight_through(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
  weights, leaf = primals
  tangent = tangents[0]
  return _quantize(weights, leaf), jnp.where(leaf.mask, tangent, jnp.zeros_like(tangent))


def _check_shape(name: str, leaf: Array, expected: tuple[int, ...]) -> None:
  if jnp.shape(leaf) != tuple(expected):
    raise ValueError(f'{name}: found shape {jnp.shape(leaf)}, expected {tuple(expected)}')


def _check_leaf(name: str, weights: Array, leaf: LeafState) -> None:
  _check_shape(name, weights, leaf.mask.shape)
  if weights.dtype != leaf.dtype:
    raise ValueError(f'{name}: found dtype {weights.dtype}, expected {leaf.dtype}')
