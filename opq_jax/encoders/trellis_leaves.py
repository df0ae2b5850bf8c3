"""One leaf or slice coded along a trellis, or on its plain grid where a trellis does not serve."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int8

from opq_jax import compression
from opq_jax.coding import arrangements, axis_orders, trellis
from opq_jax.coding import payload as entropy_coding
from opq_jax.coding.output_scales import OCTAVE
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.cells import settled, value_table
from opq_jax.compression.records import (
  ESCAPED,
  affine_codebook,
  exact_grid,
  in_units,
  kinds_of_codes,
  of_few_bits,
)
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.encoders import feedback, trellis_grids
from opq_jax.encoders.encoder import LeafToCode, Moments
from opq_jax.encoders.factors import Factor, Factored, factor_of
from opq_jax.encoders.host_feedback import RowFeedback
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.encoders.trellis_walk import Walk

# bits per weight that the trellis gains, at least, at the rates at which 127 levels do not suffice
_GAIN = 0.1


class CodedLeaf(NamedTuple):
  """A leaf with the codes that were chosen.

  Attributes:
    values: decoded weights, or the leaf as it came.
    state: its grid and mask; None where it is not compressed.
    codes: None where it is not compressed.
    is_served: False where the leaf has weights to code, and the trellis does not serve it.
  """

  values: Any
  state: LeafState | None = None
  codes: Int8[np.ndarray, '...'] | None = None
  is_served: bool = True


def check_finite(leaf: LeafToCode) -> None:
  """Raises ValueError where a weight is not finite."""
  if not np.isfinite(np.asarray(leaf.weights, np.float32)).all():
    raise ValueError(f'{leaf.name}: found NaN or an infinity, expected finite weights')


def factored(moments: Moments, damping: float, version: int) -> Factored | None:
  """Returns the factor of the moments of a leaf without slices, as a version of the encoder has it.

  Raises:
    IndefiniteMomentsError: damped moments are not positive definite.
  """
  if moments is None or isinstance(moments, Factored):
    return moments
  matrix = np.asarray(moments.matrix, np.float32)
  return Factored(factor_of(matrix, damping, version), moments.inputs)


def code_leaf(
  weights: Array,
  plain: LeafState,
  moments: Factored | None,
  may_follow_trellis: bool = True,
  fitted_to: int = trellis_grids.SAMPLE,
) -> CodedLeaf:
  """Chooses the codes of a leaf without slices.

  Args:
    weights: of the leaf.
    plain: its plain grid.
    moments: of its inputs, or None.
    may_follow_trellis: False where codes of the plain grid are wanted.
    fitted_to: weights that the grid of the trellis is fitted to.
  """
  options = _Options(may_follow_trellis, fitted_to, plain.dtype, plain.output_scales is not None)
  # codes follow one trellis through all outputs: each weight over the scale of its own
  coded = _code_in_order(*in_units(weights, plain), moments, options)
  if plain.output_scales is None:
    return coded
  assert coded.state is not None and coded.codes is not None
  state = dataclasses.replace(coded.state, dtype=plain.dtype, output_scales=plain.output_scales)
  exact = jnp.asarray(weights).astype(plain.dtype)
  values = compression.decode(coded.codes, CompressionState(state), exact)
  return coded._replace(values=values, state=state)


class _Options(NamedTuple):
  """How a leaf is coded.

  Attributes:
    may_follow_trellis, fitted_to: as for `code_leaf`.
    dtype: of the leaf; its weights are float32 here where its outputs have scales.
    has_scales: whether they have.
  """

  may_follow_trellis: bool
  fitted_to: int
  dtype: Any
  has_scales: bool


def _code_in_order(
  weights: Array, plain: LeafState, moments: Factored | None, options: _Options
) -> CodedLeaf:
  """Codes a leaf, with its inputs first where errors are pushed on."""
  axes = None if moments is None else _axes_of_walk(weights.shape, moments)
  if moments is None or axes is None:
    return _code(weights, plain, moments, options)
  # one input after the other: as the same kernel with its inputs first
  coded = _code(
    _moved(weights, axes),
    dataclasses.replace(plain, kinds=_moved(plain.kinds, axes)),
    Factored(moments.factor, tuple(range(len(moments.inputs)))),
    options,
  )
  back = axis_orders.inverse(axes)
  assert coded.state is not None and coded.codes is not None
  return CodedLeaf(
    jnp.asarray(_moved(coded.values, back)),
    dataclasses.replace(coded.state, kinds=jnp.asarray(_moved(coded.state.kinds, back))),
    _moved(coded.codes, back),
    coded.is_served,
  )


def _axes_of_walk(shape: tuple[int, ...], moments: Factored) -> tuple[int, ...] | None:
  """Returns the order of axes in which a leaf is walked; None where its own serves, or none."""
  layout = MatrixLayout(shape, moments.inputs)
  if _orders_of_rows(layout):
    return None
  axes = (*layout.inputs, *layout.outputs)
  moved = MatrixLayout(tuple(shape[axis] for axis in axes), tuple(range(len(layout.inputs))))
  return axes if len(axes) <= axis_orders.MAX_AXES and _orders_of_rows(moved) else None


def _moved(array: Any, axes: tuple[int, ...]) -> Any:
  """Returns an array with its axes in another order, without a program of XLA for its shape."""
  return np.ascontiguousarray(np.asarray(array).transpose(axes))


def _code(
  weights: Array, plain: LeafState, moments: Factored | None, options: _Options
) -> CodedLeaf:
  # in a unit of about a step, because squares of tiny or huge weights do not fit float32; it is a
  # power of two, which changes no digit
  unit = np.float32(2.0 ** math.frexp(float(plain.step))[1])
  scaled = np.asarray(weights, np.float32) / unit
  first, threshold, step = (
    float(x) / float(unit) for x in (plain.codebook[1], plain.threshold, plain.step)
  )
  factor = layout = None
  if moments is not None:
    factor = moments.factor
    layout = MatrixLayout(scaled.shape, moments.inputs)
  fit = None
  if int(plain.levels) and options.may_follow_trellis:
    fit = trellis_grids.fit(scaled, first, threshold, step, options.fitted_to)
  orders = _orders_of_rows(layout) if layout else arrangements.choices(scaled.shape)
  is_lattice = _is_exact(weights, plain)
  if (
    fit is None
    or is_lattice
    or not orders
    or _has_too_many_beyond(scaled, fit.grid, plain, options.dtype)
  ):
    codes = _code_on_plain_grid(weights, plain, factor, layout)
    state = dataclasses.replace(plain, kinds=jnp.asarray(kinds_of_codes(codes)))
    is_served = not codes.any() or int(plain.levels) == 0 or is_lattice
    return CodedLeaf(_decoded(weights, codes, state), state, codes, is_served)

  # rounded before the walk: codes are chosen for the very values that a file will hold
  grid_step, grid_first = exact_grid(
    unit * jnp.float32(fit.grid.step),
    unit * jnp.float32(fit.grid.first),
    jnp.int32(MAX_LEVELS),
    has_scales=options.has_scales,
  )
  # a level's cell reaches half a step to either side, so that a value keeps its code; the cells
  # have no other part, since codes are chosen by error and price
  edge = jnp.maximum(grid_first - grid_step / 2, 0)
  fit = fit._replace(
    grid=trellis.Grid(float(grid_first) / float(unit), float(grid_step) / float(unit), MAX_LEVELS)
  )
  state = LeafState(
    kinds=plain.kinds,
    codebook=affine_codebook(grid_first, grid_step, jnp.int32(MAX_LEVELS)),
    threshold=of_few_bits(edge) if options.has_scales else edge,
    step=grid_step,
    levels=jnp.int32(MAX_LEVELS),
    dtype=plain.dtype,
  )
  values = np.asarray(_value_table(state)).astype(np.float32) / unit
  # in one order: every other one would be a walk of its own
  walk = Walk(scaled, fit, orders[0], _usable(state, options), values)
  # of two steps, since a state allows every other level
  codes = walk.codes(factor, limit=max(2 * fit.grid.step, threshold))
  on_grid = np.where(codes == ESCAPE, 0, codes)
  # the walk had all levels; the state ends at the last that a weight has
  levels = jnp.int32(max(int(on_grid.max()), -int(on_grid.min()), 1))
  state = dataclasses.replace(
    state,
    kinds=jnp.asarray(kinds_of_codes(codes)),
    codebook=affine_codebook(grid_first, grid_step, levels),
    levels=levels,
  )
  return CodedLeaf(_decoded(weights, codes, state), state, codes)


def _orders_of_rows(layout: MatrixLayout) -> list[int]:
  """Returns the arrangements of a leaf that code one input after the other, each whole."""

  def has_rows_of_inputs(order: int) -> bool:
    if order == arrangements.JOINED_OUTPUTS:
      return layout.inputs == (0,)
    # in PyTorch's arrangement, rows are of outputs
    return order != arrangements.TORCH and layout.inputs == tuple(range(len(layout.shape) - 1))

  return [order for order in arrangements.choices(layout.shape) if has_rows_of_inputs(order)]


def _code_on_plain_grid(
  weights: Array, plain: LeafState, factor: Factor | None, layout: MatrixLayout | None
) -> Int8[np.ndarray, '...']:
  """Returns codes of the plain grid, with errors pushed on where there is a factor."""
  if factor is None or layout is None:
    return np.asarray(compression.encode(weights.astype(plain.dtype), CompressionState(plain)))
  rows = np.array(layout.rows(np.asarray(weights, np.float32)), order='C')
  is_escaped = layout.rows(np.asarray(plain.escaped))
  codes = np.empty(rows.shape, np.int8)
  values = np.asarray(_value_table(plain)).astype(np.float32)
  limit = max(float(plain.step), float(plain.threshold))
  row_feedback = RowFeedback(rows, is_escaped, factor, values, limit)
  for i in range(len(rows)):
    codes[i] = np.where(is_escaped[i], 0, feedback.codes_in_cells(rows[i], plain).codes)
    row_feedback.push(i, codes[i : i + 1])
  codes[is_escaped] = ESCAPE
  return np.ascontiguousarray(layout.leaf(codes))


def _is_exact(weights: Array, plain: LeafState) -> bool:
  """Returns whether the plain grid holds every weight exactly: a lattice, which cannot be improved.

  A thousand weights are looked at first, because hardly any leaf is one.
  """
  flat, kinds = np.asarray(weights).reshape(-1), np.asarray(plain.kinds).reshape(-1)
  for part in (slice(0, 1 << 10), slice(None)):
    grid = dataclasses.replace(plain, kinds=jnp.asarray(kinds[part]))
    values = compression.apply_compression(flat[part].astype(plain.dtype), CompressionState(grid))
    if not np.array_equal(values, flat[part]):
      return False
  return True


def _has_too_many_beyond(
  scaled: Float32[np.ndarray, '...'], grid: trellis.Grid, plain: LeafState, dtype: Any
) -> bool:
  """Returns whether weights that escape from the trellis' grid alone cost more than it gains."""
  size, escaped_on_plain = scaled.size, int(np.count_nonzero(np.asarray(plain.kinds) == ESCAPED))
  escaped = int(np.count_nonzero(trellis_grids.is_beyond(scaled, grid)))
  if escaped <= escaped_on_plain:
    return False
  # bits of the value, and of its place: m of n places take m log2(e n / m)
  each = 8 * np.dtype(dtype).itemsize + math.log2(size / escaped) + 1.5
  return (escaped - escaped_on_plain) * each > _GAIN * size


def _usable(state: LeafState, options: _Options) -> Bool[np.ndarray, '128']:
  """Returns which magnitudes of codes have a value of the leaf's dtype in their own cell.

  Of a leaf with output scales, in the cells of all outputs.
  """
  cells = jnp.arange(MAX_LEVELS, dtype=jnp.float32)
  # which numbers of a dtype there are is the same in all octaves
  scales = OCTAVE[:, None] if options.has_scales else None
  state = dataclasses.replace(state, dtype=options.dtype, output_scales=scales)
  is_settled = np.atleast_2d(np.asarray(settled(cells, state) == cells))
  return np.concatenate([[True], is_settled.all(axis=0)])


def bits_of(leaf: CodedLeaf) -> float:
  """Returns the bits of a leaf: its codes, at their entropy given the subsets, and its escapes."""
  if leaf.codes is None or leaf.state is None:
    return 0.0
  slices = leaf.codes.reshape(-1, *leaf.codes.shape[leaf.state.slices :])
  return sum(entropy_bits(codes, leaf.state.dtype) for codes in slices)


def entropy_bits(codes: Int8[np.ndarray, '...'], dtype: Any) -> float:
  """Returns the bits of the codes of a leaf without slices, and of its escaped values."""
  is_escaped = codes == ESCAPE
  bits = entropy_coding.entropy(np.where(is_escaped, np.int8(0), codes)) * codes.size
  escaped = int(np.count_nonzero(is_escaped))
  if not escaped:
    return bits
  return bits + escaped * (8 * np.dtype(dtype).itemsize + math.log2(codes.size / escaped))


def rounded_codes(weights: Float32[np.ndarray, '...'], plain: LeafState) -> Int8[np.ndarray, '...']:
  """Returns the codes of the cells that weights lie in, without a program of XLA for a shape."""
  magnitude = np.abs(np.asarray(weights, np.float32))
  cell = np.floor((magnitude - np.float32(plain.threshold)) / np.float32(plain.step)) + 1
  cell = np.clip(cell, 1, max(int(plain.levels), 1))
  survives = (magnitude > np.float32(plain.threshold)) & (int(plain.levels) > 0)
  codes = np.where(survives, np.copysign(cell, weights), 0).astype(np.int8)
  codes[np.asarray(plain.kinds) == ESCAPED] = ESCAPE
  return codes


def _decoded(weights: Array, codes: Int8[np.ndarray, '...'], state: LeafState) -> Array:
  """Returns what `opq_jax.decode` returns, without a program of XLA for every shape."""
  values = np.asarray(_value_table(state))[codes.view(np.uint8)]
  is_escaped = codes == ESCAPE
  if is_escaped.any():
    values = np.where(is_escaped, np.asarray(weights).astype(values.dtype), values)
  return jnp.asarray(values)


# without the kinds, whose shape would make a program of every leaf
_value_table = jax.jit(
  lambda state: value_table(dataclasses.replace(state, kinds=jnp.zeros(0, jnp.uint8)))
)
