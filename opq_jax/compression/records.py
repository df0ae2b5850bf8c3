"""The frozen state of a compressed tree: which weights are pruned or escaped, and the codebooks.

A weight w of a compressed leaf is of one of four kinds, and has an integer code and a value:

    pruned    code  = 0                                                       value = 0
    on grid   code  = sign(w) min(1 + floor((|w| - threshold) / step), levels)
              value = codebook[code], rounded to the leaf's dtype inside its own cell
    escaped   code  = -128                                                    value = w
    zero or   code  = 0 where |w| < threshold, elsewhere as on grid           value = codebook[code]
    on grid

No weight is of the last kind unless `opq_jax.compression.add_zero_cell` asks for it.

Cell k = 1, 2, ..., levels holds the magnitudes of [threshold + (k-1) step, threshold + k step), and
its value is the centroid of the weights in it.  This cell rule, not the nearest value, is what the
error and the entropy of `opq_jax.allocation.laplace` describe: rounding to the nearest value costs
up to 1.6 % more bits at the same squared error for Laplace weights
(`experiments.benchmarks.accuracy.cell_rule`).

A weight beyond the last cell escapes: it is stored as it is, beside the codes.  A few outliers of
1000 standard deviations then cost the bits of their values and places, and neither a wide grid for
all other weights nor an error of their own.

Kinds and codebooks are computed once, from the pretrained weights, and never change.

A leaf with slices holds many matrices, each with a grid of its own: threshold, step, levels and
codebook have the slices' axes in front.  `slice_of` takes one of them out, `stacked` joins them.

A leaf with output scales has one grid and one set of codes, and output j takes threshold, step and
values times its scale s_j.  Scales have four significant bits, and the grid so few that no product
with a scale rounds.  `in_units` divides weights by them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, UInt8

from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.coding.output_scales import GRID_BITS, SCALE_BITS
from opq_jax.core import exported_nodes, trees
from opq_jax.core.limits import ESCAPE, MAX_LEVELS, STEP_BITS
from opq_jax.core.trees import PyTree

PRUNED, ON_GRID, ESCAPED, ZERO_OR_ON_GRID = 0, 1, 2, 3
"""Kinds of weights."""

_SLACK = 2.0**-10
"""Steps beyond the last cell that still count as within it: float32 knows a place 127 steps away
only up to its own rounding."""


@exported_nodes.register
@flax.struct.dataclass
class LeafState:
  """Frozen kinds and codebook of one compressed leaf.

  Attributes:
    kinds: of every weight: 0 pruned, 1 on the grid, 2 escaped, 3 zero or on the grid; the leaf's
      shape.
    codebook: the value of every code, `codebook[code]`: entry 0 is 0.0, entries 1 ... 127 are the
      positive values and entries -1 ... -127 (counted from the end, as Python does) their
      negatives.  Past the last level the largest value repeats, so the entries are exactly the
      values that a float32 leaf can hold on its grid.
    threshold: the magnitude at which the first cell begins.
    step: the width of a cell; positive.
    levels: cells a sign, 0 ... 127 (0 where no weight is on the grid).
    dtype: the leaf's dtype; values are computed in float32 and rounded to it once, to the nearest
      number of that dtype that lies in the value's own cell.
    output_scales: of all outputs, with an axis of length 1 for each other axis that a slice has, so
      that they broadcast over the weights; None where all are 1.  Codebook, threshold and step are
      over the scale: those of a weight are `output_scales` times as large.

  With slices, grids and codebooks have the slices' axes in front.  How many these are, the arrays
  say: `jax.vmap` and `jax.lax.scan` over a state take axes from its arrays, not from static fields.

  Invariants, whatever the optimizer does to the weights:
    * `codebook[..., 1:128]` is exactly affine, `first + step * k` in float32, with products that
      never round, so that computing a value and looking it up give the same bits on every platform;
    * a value lies inside its own cell, so compressing compressed weights changes nothing;
    * a pruned weight is 0, and an escaped weight is itself.
  """

  kinds: UInt8[Array, '...']
  codebook: Float32[Array, '*slices 255']
  threshold: Float32[Array, '*slices']
  step: Float32[Array, '*slices']
  levels: Int32[Array, '*slices']
  dtype: Any = flax.struct.field(pytree_node=False)
  output_scales: Float32[Any, '...'] | None = None

  @property
  def slices(self) -> int:
    """Leading axes that count slices."""
    return np.ndim(self.threshold)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Shape of the slices' axes; () without slices."""
    return tuple(self.kinds.shape[: self.slices])

  @property
  def mask(self) -> Bool[Array, '...']:
    """True where a weight is not pruned."""
    return self.kinds != PRUNED

  @property
  def escaped(self) -> Bool[Array, '...']:
    """True where a weight is stored as it is."""
    return self.kinds == ESCAPED


@exported_nodes.register
@flax.struct.dataclass
class CompressionState:
  """Frozen kinds and codebooks of a whole parameter tree.

  Attributes:
    tree: the parameters' own tree, with a `LeafState` where a leaf is compressed and None where
      it passes through bit-identical.

  The state is a pytree of JAX's arrays: replicate it, save it with Orbax, pass it beside the
  parameters, also to a function that `jax.export` has written.  It is an input of a training step
  and never an output.
  """

  tree: PyTree


def init_state(params: PyTree, allocation: Allocation) -> CompressionState:
  """Returns the kinds and codebooks that an allocation asks for; frozen from here on.

  A weight survives where |w| > threshold, and escapes where it lies beyond the leaf's last cell,
  |w| >= threshold + levels * step; with `palette_bits` none escapes.  The first value of a leaf is
  threshold + offset.  Step and first value are rounded (`exact_grid`), so that every value is the
  same on every platform.

  Args:
    params: the tree that was allocated.  Kinds lie over devices as their weights do; thresholds,
      steps and codebooks are replicated over the mesh of their leaf.
    allocation: the result of `opq_jax.allocate` for it.

  Returns:
    A `CompressionState` of the same tree.  The call is pure and may be traced.

  Raises:
    ValueError: `allocation` was made for a tree of other structure or shapes.

  >>> import opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (64, 32)), 'bias': jnp.zeros(32)}
  >>> state = init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> state.tree['bias'] is None, state.tree['kernel'].mask.shape
  (True, (64, 32))
  """
  params = jax.tree.map(trees.native, params)
  allocations = trees.records(params, allocation.tree, LeafAllocation)
  states = [
    None if record is None else _init_leaf(name, leaf, record)
    for (name, leaf), record in zip(trees.named_leaves(params).items(), allocations, strict=True)
  ]
  return CompressionState(jax.tree.unflatten(jax.tree.structure(params), states))


def _init_leaf(name: str, weights: Array, leaf: LeafAllocation) -> LeafState:
  if jnp.shape(weights) != tuple(leaf.shape):
    raise ValueError(f'{name}: found shape {jnp.shape(weights)}, expected {tuple(leaf.shape)}')
  scales = leaf.output_scales
  step, first = exact_grid(
    leaf.step, leaf.threshold + leaf.offset, leaf.levels, has_scales=scales is not None
  )
  # arrays of JAX: Orbax saves no scalars of NumPy, and a guarded step takes none
  threshold, levels = jnp.asarray(leaf.threshold), jnp.asarray(leaf.levels)
  if scales is not None:
    threshold, scales = of_few_bits(threshold), jnp.asarray(scales)
  grid = affine_codebook(first, step, levels), threshold, step, levels, scales
  sharding = None if isinstance(weights, jax.core.Tracer) else getattr(weights, 'sharding', None)
  if isinstance(sharding, NamedSharding):
    # on the mesh of the weights, so that every process has it and a checkpoint knows of one mesh
    grid = jax.device_put(grid, NamedSharding(sharding.mesh, P()))
  codebook, threshold, step, levels, scales = grid
  kinds = kinds_of(weights, threshold, step, leaf.levels, scales)
  if leaf.palette_bits is not None:
    # nothing escapes: the code of a weight beyond the last cell is that of the cell
    kinds = jnp.minimum(kinds, jnp.uint8(ON_GRID))
  return LeafState(
    kinds=kinds,
    codebook=codebook,
    threshold=threshold,
    step=step,
    levels=levels,
    dtype=weights.dtype,
    output_scales=scales,
  )


def slice_of(state: LeafState, place: tuple[int, ...]) -> LeafState:
  """Returns the state of one slice of a leaf.

  Args:
    state: of the leaf.
    place: index of the slice along the leading axes; () returns the state itself.  Along axes that
      count no slices of this state, all slices have its one grid.

  >>> import opq_jax
  >>> stack = {'kernel': jax.random.laplace(jax.random.key(0), (3, 64, 32))}
  >>> allocation = opq_jax.allocate(stack, compression_rate=16.0, slices=lambda path, leaf: 1)
  >>> state = init_state(stack, allocation).tree['kernel']
  >>> [slice_of(state, place).kinds.shape for place in np.ndindex(state.slice_shape)]
  [(64, 32), (64, 32), (64, 32)]
  """
  if not place:
    return state
  own, scales = place[: state.slices], state.output_scales
  # along an axis of length 1 all have one scale
  scaled = () if scales is None else tuple(map(min, place, [n - 1 for n in scales.shape]))
  return LeafState(
    kinds=state.kinds[place],
    codebook=state.codebook[own],
    threshold=state.threshold[own],
    step=state.step[own],
    levels=state.levels[own],
    dtype=state.dtype,
    output_scales=None if scales is None else scales[scaled],
  )


def in_units(weights: Array, state: LeafState) -> tuple[Array, LeafState]:
  """Returns the weights of a leaf over its output scales, in float32, and their own state.

  The codes of the quotients under this state are those of the weights, up to the rounding of the
  quotients at the edges of cells.

  Args:
    weights: of the leaf, or other weights of its shape.
    state: of the leaf; that of the quotients has no scales.  Of a leaf without, both are returned
      as they are.
  """
  if state.output_scales is None:
    return weights, state
  quotients = jnp.asarray(weights, jnp.float32) / state.output_scales
  own = dataclasses.replace(state, output_scales=None, dtype=jnp.dtype(jnp.float32))
  return quotients, own


def stacked(states: Sequence[LeafState], shape: tuple[int, ...]) -> LeafState:
  """Returns the state of a leaf from those of its slices: the inverse of `slice_of`.

  Args:
    states: of all slices, in C order.
    shape: of the slices' axes; of () the one state is returned.
  """
  if not shape:
    return states[0]
  # of NumPy where values are known: XLA would compile a program for every number of slices
  numpy = jnp if trees.is_traced(states) else np
  stack = lambda *arrays: jnp.asarray(numpy.stack(arrays).reshape(*shape, *jnp.shape(arrays[0])))
  return jax.tree.map(stack, *trees.on_host(states))


def over_weights(numbers: Any, ndim: int) -> Any:
  """Returns the numbers of slices with an axis of length 1 for each axis that a slice has.

  Args:
    numbers: [*slices]; a scalar is returned as it is.
    ndim: axes of the leaf.
  """
  if not jnp.ndim(numbers):
    return numbers
  return numbers.reshape(*numbers.shape, *[1] * (ndim - numbers.ndim))


@jax.jit
def kinds_of(
  weights: Array,
  threshold: Float32[Array, '*slices'],
  step: Float32[Array, '*slices'],
  levels: Int32[Array, '*slices'],
  output_scales: Float32[Array, '...'] | None = None,
) -> UInt8[Array, '...']:
  """Returns the kind of every weight: 0 pruned, 1 on the grid, 2 escaped."""
  threshold, step, levels = (over_weights(x, weights.ndim) for x in (threshold, step, levels))
  if output_scales is not None:
    threshold, step = threshold * output_scales, step * output_scales
  magnitude = jnp.abs(weights.astype(jnp.float32))
  # without levels the grid ends at the threshold, and every survivor escapes
  end = jnp.where(levels > 0, levels.astype(jnp.float32) + _SLACK, 0)
  # the operations of `opq_jax.compression.cells`, in their order, so that both agree at edges
  is_escaped = (magnitude - threshold) * (1 / step) >= end
  return jnp.where(magnitude > threshold, 1 + is_escaped.astype(jnp.uint8), 0).astype(jnp.uint8)


def kinds_of_codes(codes: Int8[Any, '...']) -> UInt8[Any, '...']:
  """Returns the kinds of the weights that have these codes, of NumPy or of JAX as the codes are."""
  return _kinds_of_codes(codes) if isinstance(codes, jax.Array) else _counted_kinds(codes)


def _counted_kinds(codes: Any) -> Any:
  return (codes != 0).astype(np.uint8) + (codes == ESCAPE).astype(np.uint8)


_kinds_of_codes = jax.jit(_counted_kinds)  # one program for each shape, where JAX would make five


@jax.jit
def affine_codebook(
  first: Float[Array, '*slices'], step: Float[Array, '*slices'], levels: Int32[Array, '*slices']
) -> Float32[Array, '*slices 255']:
  """Returns the codebook of `levels` values a sign, `first + step * k`; entry 0 is 0.0.

  >>> book = affine_codebook(jnp.float32(0.5), jnp.float32(0.25), jnp.int32(3))
  >>> [float(v) for v in book[jnp.array([0, 1, 2, 3, 4, -1, -3])]]
  [0.0, 0.5, 0.75, 1.0, 1.0, -0.5, -1.0]
  """
  first, step, levels = (over_weights(x, jnp.ndim(x) + 1) for x in (first, step, levels))
  index = jnp.arange(MAX_LEVELS, dtype=jnp.float32).reshape(*[1] * (jnp.ndim(step) - 1), -1)
  last = jnp.maximum(levels.astype(jnp.float32) - 1, 0)
  # one product and one sum a level, as in `value_of`: running sums would round differently
  positive = jnp.asarray(first, jnp.float32) + jnp.asarray(step, jnp.float32) * jnp.minimum(
    index, last
  )
  positive = jnp.where(levels > 0, positive, 0)
  zero = jnp.zeros((*positive.shape[:-1], 1), jnp.float32)
  return jnp.concatenate([zero, positive, -positive[..., ::-1]], axis=-1)


@functools.partial(jax.jit, static_argnames='has_scales')
def exact_grid(
  step: Float32[Array, '*slices'],
  first: Float32[Array, '*slices'],
  levels: Int32[Array, '*slices'],
  *,
  has_scales: bool = False,
) -> tuple[Float32[Array, '*slices'], Float32[Array, '*slices']]:
  """Rounds `step` and `first` so that `first + step * k`, k < levels, is exact in float32.

  Both become multiples of one unit, a power of two: at most 2**17 units make a step, and at most
  2**24 the largest value, so neither product nor sum rounds, with or without a fused
  multiply-add.  Of at most two levels no product can round, and both are left as they are: their
  sum is rounded once, in the same way everywhere.

  With output scales, of four significant bits, at most 2**13 units make a step and at most 2**20
  the largest value; of at most two levels, both are rounded to 20 bits.

  Returns:
    Step and first value.

  >>> step, first = exact_grid(jnp.float32(0.1), jnp.float32(0.7), jnp.int32(127))
  >>> float(step * 2**20).is_integer(), float(first * 2**20).is_integer()
  (True, True)
  """
  spare = SCALE_BITS if has_scales else 0
  last = first + step * jnp.maximum(levels.astype(jnp.float32) - 1, 0)
  exponent = jnp.maximum(jnp.frexp(step)[1] - STEP_BITS, jnp.frexp(last)[1] - 24) + spare
  # 2**-126 is the smallest normal float32: below it XLA flushes to 0
  unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -126))
  is_exact = levels <= 2
  # at least one unit: where the first value is huge beside the step, levels must still differ
  rounded = jnp.maximum(jnp.round(step / unit), 1) * unit, jnp.round(first / unit) * unit
  if has_scales:
    step, first = of_few_bits(step), of_few_bits(first)
  return jnp.where(is_exact, step, rounded[0]), jnp.where(is_exact, first, rounded[1])


def of_few_bits(numbers: Float32[Array, '...']) -> Float32[Array, '...']:
  """Rounds numbers to as many significant bits as float32 holds once they are times a scale.

  >>> float(of_few_bits(jnp.float32(1 + 2**-19))), float(of_few_bits(jnp.float32(1 + 2**-21)))
  (1.0000019073486328, 1.0)
  """
  unit = jnp.ldexp(jnp.float32(1), jnp.maximum(jnp.frexp(numbers)[1] - GRID_BITS, -126))
  return jnp.round(numbers / unit) * unit
