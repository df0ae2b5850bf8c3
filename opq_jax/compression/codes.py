"""Masks and codebooks: the frozen compression state, and what it makes of weights.

A weight w of a compressed leaf is pruned, on the grid, or escaped (`LeafState.kinds`).  It becomes
an integer code, and the code a value:

    pruned    code  = 0                                                       value = 0
    on grid   code  = sign(w) min(1 + floor((|w| - threshold) / step), levels)
              value = codebook[code], rounded to the leaf's dtype inside its own cell
    escaped   code  = -128                                                    value = w

Cell k of a survivor is [threshold + (k-1) step, threshold + k step) and its value is the cell's
centroid.  This cell rule, not the nearest value, is what the error and the entropy of
`opq_jax.allocation.laplace` describe: rounding to the nearest value instead costs up to 1.6 % more
bits at the same squared error for Laplace weights (`python -m experiments.benchmarks.cell_rule`).

A weight beyond the last cell escapes: it is stored as it is, beside the codes.  A few outliers of
1000 standard deviations then cost the bits of their values and places, and neither a wide grid for
all others nor an error of their own.

Which weights are pruned or escape, and the codebook, are computed once, from the pretrained
weights, and never change.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, UInt8

from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.core import trees
from opq_jax.core.limits import MAX_LEVELS, STEP_BITS
from opq_jax.core.trees import PyTree

ESCAPE = -128  # the code of an escaped weight
PRUNED, ON_GRID, ESCAPED = 0, 1, 2  # the kinds of weights
# of a step, beyond the last cell: an edge there is known up to float32's rounding of 127 steps
_SLACK = 2.0**-10


@flax.struct.dataclass
class LeafState:
  """What one compressed leaf keeps for ever.

  Attributes:
    kinds: of every weight: 0 pruned, 1 on the grid, 2 escaped; the leaf's shape.
    codebook: the value of every code, so that `codebook[code]` is the value: entry 0 is 0.0,
      entries 1 ... 127 are the positive values and entries -1 ... -127 (counted from the end, as
      Python does) their negatives.  Past the last level the largest value repeats, so the entries
      are exactly the values that a float32 leaf can hold on its grid.
    threshold: where the first cell begins.
    step: the width of a cell; positive.
    levels: cells a sign, 0 ... 127 (0 where no weight is on the grid).
    dtype: the leaf's dtype; values are computed in float32 and rounded to it once, to the nearest
      number of that dtype that lies in the value's own cell.

  Invariants, whatever the optimizer does to the weights:
    * `codebook[1:128]` is exactly affine, `first + step * k` in float32, with products that never
      round, so that computing a value and looking it up give the same bits on every platform;
    * a value lies inside its own cell, so compressing compressed weights changes nothing;
    * a pruned weight is 0, and an escaped weight is itself.
  """

  kinds: UInt8[Array, '...']
  codebook: Float32[Array, '255']
  threshold: Float32[Array, '']
  step: Float32[Array, '']
  levels: Int32[Array, '']
  dtype: Any = flax.struct.field(pytree_node=False)

  @property
  def mask(self) -> Bool[Array, '...']:
    """True where a weight is not pruned."""
    return self.kinds != PRUNED

  @property
  def escaped(self) -> Bool[Array, '...']:
    """True where a weight is stored as it is."""
    return self.kinds == ESCAPED


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

  A weight survives where |w| > threshold, and escapes where it lies beyond the leaf's last cell,
  |w| >= threshold + levels * step.  The first value of a leaf is threshold + offset.  Step and
  first value are rounded (`exact_grid`), so that every value is the same on every platform.

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
  params = jax.tree.map(trees.native, params)
  found = trees.records(params, allocation.tree, LeafAllocation)
  states = [
    None if record is None else _init_leaf(name, leaf, record)
    for (name, leaf), record in zip(trees.named_leaves(params).items(), found, strict=True)
  ]
  return CompressionState(jax.tree.unflatten(jax.tree.structure(params), states))


@trees.compiled
def apply_compression(params: PyTree, state: CompressionState) -> PyTree:
  """The parameters as the compressed network holds them: pruned, and on the codebook.

  Args:
    params: the tree, with any values; while finetuning, the latent weights.  Every shard of a leaf
      is compressed where it is, and the values lie as the weights do.
    state: its masks and codebooks.

  Returns:
    The same tree with `codebook[code]` at every compressed leaf (the leaf's dtype), escaped weights
    as they are, and every other leaf bit-identical.  The derivative is straight-through: the
    identity on survivors, escaped ones included, and exactly 0 on pruned weights; nothing flows
    into the state.

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


@trees.compiled
def encode(params: PyTree, state: CompressionState) -> PyTree:
  """The integer codes of the parameters: int8 leaves where compressed, others as they are.

  An escaped weight has the code -128, which does not say what it is: `decode` wants the
  parameters too.  The inverse is `decode`: `decode(encode(params, state), state, params)` equals
  `apply_compression(params, state)` bit for bit.

  Raises:
    ValueError: `state` was made for a tree of other structure, shapes or dtypes.
  """
  return trees.map_records(_encode_leaf, params, state.tree, LeafState)


def decode(codes: PyTree, state: CompressionState, params: PyTree | None = None) -> PyTree:
  """The values of integer codes: `codebook[code]`, in the dtype that each leaf had.

  Args:
    codes: of `encode`.
    state: its masks and codebooks.
    params: where escaped weights are read, and nothing else is; not needed where there are none.
      Inside of a trace, where nobody can know, an escaped weight is NaN without them.

  Raises:
    ValueError: `state` was made for a tree of other structure or shapes; or a leaf has escaped
      weights and no `params` are given.
  """
  if params is None:
    for name, code, _ in _recorded(codes, state):
      if not isinstance(code, jax.core.Tracer) and bool(jnp.any(code == ESCAPE)):
        raise ValueError(
          f'{name}: found escaped weights and no params, expected decode(codes, state, params)'
        )
  return _decode(codes, state, params)


def _recorded(tree: PyTree, state: CompressionState) -> list[tuple[str, Any, LeafState]]:
  """Name, leaf and state of every compressed leaf."""
  found = trees.records(tree, state.tree, LeafState)
  named = zip(trees.named_leaves(tree).items(), found, strict=True)
  return [(name, leaf, record) for (name, leaf), record in named if record is not None]


@trees.compiled
def _decode(codes: PyTree, state: CompressionState, params: PyTree | None) -> PyTree:
  weights = {} if params is None else trees.named_leaves(params)

  def look_up(name: str, code: Int8[Array, '...'], leaf: LeafState) -> Float[Array, '...']:
    _check_shape(name, code, leaf.kinds.shape)
    cell = jnp.clip(jnp.abs(code.astype(jnp.float32)) - 1, 0, _last(leaf))
    value = value_of(cell, leaf)
    value = jnp.where(code < 0, -value, value)
    value = jnp.where(code == 0, jnp.zeros_like(value), value)
    escaped = jnp.full_like(value, jnp.nan)
    if params is not None:
      escaped = weights[name]
      _check_leaf(name, escaped, leaf)
    return jnp.where(code == ESCAPE, escaped, value)

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
    kinds=kinds_of(weights, leaf.threshold, step, leaf.levels),
    codebook=codebook,
    threshold=threshold,
    step=step,
    levels=levels,
    dtype=weights.dtype,
  )


@jax.jit
def kinds_of(
  weights: Array, threshold: Float32[Array, ''], step: Float32[Array, ''], levels: Int32[Array, '']
) -> UInt8[Array, '...']:
  """What becomes of every weight: 0 pruned, 1 on the grid, 2 escaped (`LeafState.kinds`)."""
  magnitude = jnp.abs(weights.astype(jnp.float32))
  end = jnp.where(levels > 0, levels.astype(jnp.float32) + _SLACK, 0)
  is_escaped = (magnitude - threshold) * (1 / step) >= end
  return jnp.where(magnitude > threshold, 1 + is_escaped.astype(jnp.uint8), 0).astype(jnp.uint8)


def exact_grid(
  step: Float32[Array, ''], first: Float32[Array, ''], levels: Int32[Array, '']
) -> tuple[Float32[Array, ''], Float32[Array, '']]:
  """`step` and `first` rounded so that `first + step * k`, k < levels, is exact in float32.

  Both become multiples of one unit, a power of two: at most 2**17 units make a step, and at most
  2**24 the largest value, so neither product nor sum rounds, with or without a fused
  multiply-add.  Of at most two levels no product can round, and both are left as they are: their
  sum is rounded once, in the same way everywhere.
  """
  last = first + step * jnp.maximum(levels.astype(jnp.float32) - 1, 0)
  exponent = jnp.maximum(jnp.frexp(step)[1] - STEP_BITS, jnp.frexp(last)[1] - 24)
  unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -126))
  is_exact = levels <= 2
  rounded = jnp.maximum(jnp.round(step / unit), 1) * unit, jnp.round(first / unit) * unit
  return jnp.where(is_exact, step, rounded[0]), jnp.where(is_exact, first, rounded[1])


def cell(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """The cell of |w|, counted from 0, as a whole float32 number; meaningless where pruned."""
  return jnp.clip(_place(magnitude, leaf), 0, _last(leaf))


def settled(cell: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  """The cell in which the value of a cell lies, once it is of the leaf's dtype.

  It is another where a cell has no number of the dtype.  An encoder that may choose any cell
  chooses the settled one: encoding its value again gives the same code.
  """
  if _is_wide(leaf.dtype):
    return cell
  return jnp.clip(_place(value_of(cell, leaf).astype(jnp.float32), leaf), 0, _last(leaf))


def _is_wide(dtype: Any) -> bool:
  return bool(jnp.finfo(dtype).nmant >= 23)


def _place(magnitude: Float32[Array, '...'], leaf: LeafState) -> Float32[Array, '...']:
  # times the reciprocal, since XLA divides by a scalar in either way, and the two differ at edges
  return jnp.floor((magnitude - leaf.threshold) * (1 / leaf.step))


def _last(leaf: LeafState) -> Float32[Array, '']:
  """The last cell, counted from 0."""
  return jnp.maximum(leaf.levels.astype(jnp.float32) - 1, 0)


def value_of(cell: Float32[Array, '...'], leaf: LeafState) -> Float[Array, '...']:
  """The value of a cell, in the leaf's dtype: of its numbers in the cell the nearest.

  Where a cell has no number of the dtype, the value is the nearest in another cell.  No weight of
  that dtype is in such a cell.
  """
  # exact (see LeafState), so this equals codebook[code] without reading the codebook per weight
  value = leaf.codebook[1] + leaf.step * cell
  if _is_wide(leaf.dtype):
    return value.astype(leaf.dtype)
  largest = jnp.finfo(leaf.dtype).max.astype(leaf.dtype)
  rounded = jnp.minimum(value, largest.astype(jnp.float32)).astype(leaf.dtype)
  place = _place(rounded.astype(jnp.float32), leaf)
  # the numbers of a dtype follow each other as their bits do
  bits = jax.lax.bitcast_convert_type(rounded, _unsigned(leaf.dtype))
  one, most = bits.dtype.type(1), jax.lax.bitcast_convert_type(largest, bits.dtype)
  bits = jnp.where(place < cell, jnp.minimum(bits + one, most), bits)
  bits = jnp.where((place > cell) & (cell < _last(leaf)), jnp.maximum(bits, one) - one, bits)
  return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def value_table(leaf: LeafState) -> Float[Array, '256']:
  """The value of every code, in the leaf's dtype; a negative code counts from the end.

  That of an escape says nothing.
  """
  codes = jnp.arange(256, dtype=jnp.uint8).astype(jnp.int8)
  values = value_of(jnp.clip(jnp.abs(codes.astype(jnp.float32)) - 1, 0, _last(leaf)), leaf)
  values = jnp.where(codes < 0, -values, values)
  return jnp.where(codes == 0, jnp.zeros_like(values), values)


def kinds_of_codes(codes: Any) -> Any:
  """The kinds of the weights that have these codes, where the codes are."""
  return (codes != 0).astype(np.uint8) + (codes == ESCAPE).astype(np.uint8)


def _unsigned(dtype: Any) -> Any:
  return {1: jnp.uint8, 2: jnp.uint16}[jnp.dtype(dtype).itemsize]


def _encode_leaf(name: str, weights: Array, leaf: LeafState) -> Int8[Array, '...']:
  _check_leaf(name, weights, leaf)
  weights = weights.astype(jnp.float32)
  code = 1 + settled(cell(jnp.abs(weights), leaf), leaf)
  code = jnp.where(leaf.mask, jnp.where(weights < 0, -code, code), 0)
  return jnp.where(leaf.escaped, ESCAPE, code).astype(jnp.int8)


def _compress_leaf(name: str, weights: Array, leaf: LeafState) -> Array:
  _check_leaf(name, weights, leaf)
  return _quantize(weights, leaf)


@jax.custom_jvp
def _quantize(weights: Array, leaf: LeafState) -> Array:
  as_float = weights.astype(jnp.float32)
  # a weight that finetuning has moved out of the grid may be in a cell that has no number
  value = value_of(settled(cell(jnp.abs(as_float), leaf), leaf), leaf)
  value = jnp.where(as_float < 0, -value, value)
  value = jnp.where(leaf.mask, value, jnp.zeros_like(value))
  return jnp.where(leaf.escaped, weights, value)


@_quantize.defjvp
def _straight_through(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
  weights, leaf = primals
  tangent = tangents[0]
  return _quantize(weights, leaf), jnp.where(leaf.mask, tangent, jnp.zeros_like(tangent))


def _check_shape(name: str, leaf: Array, expected: tuple[int, ...]) -> None:
  if jnp.shape(leaf) != tuple(expected):
    raise ValueError(f'{name}: found shape {jnp.shape(leaf)}, expected {tuple(expected)}')


def _check_leaf(name: str, weights: Array, leaf: LeafState) -> None:
  _check_shape(name, weights, leaf.kinds.shape)
  if weights.dtype != leaf.dtype:
    raise ValueError(f'{name}: found dtype {weights.dtype}, expected {leaf.dtype}')
