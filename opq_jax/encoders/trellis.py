r"""Codes chosen along a trellis: fewer bits at the same error, from the same kind of file."""

import dataclasses
import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float32, Int8

from opq_jax import compression
from opq_jax.coding import arrangements, context_search, trellis, viterbi
from opq_jax.coding import payload as entropy_coding
from opq_jax.compression import CompressionState, LeafState
from opq_jax.compression.cells import settled, value_table
from opq_jax.compression.records import affine_codebook, exact_grid, kinds_of_codes
from opq_jax.core import messages, native, trees
from opq_jax.core.limits import ESCAPE, MAX_LEVELS
from opq_jax.core.trees import PyTree
from opq_jax.encoders import feedback
from opq_jax.encoders.encoder import (
  DAMPING,
  Encoded,
  LeafEncoder,
  LeafToCode,
  Trial,
  encoded,
  leaves_to_code,
)
from opq_jax.encoders.trellis_grids import Fit, fit, is_beyond

_AT_ONCE = 1 << 16  # weights, where no error is pushed on
_BETWEEN = 128  # weights, at least, between which errors are pushed on
_AHEAD = 256  # weights, at least, that have a say in the ways before them
_BLOCK = 64  # inputs whose feedback is pushed on within a block that stays in the cache
# bits a weight that the trellis is worth, at least, at the rates at which its levels do not suffice
_GAIN = 0.1
_MOST_NAMED = 10  # leaves that a warning lists
_MOST_WORTH = 8.0  # of an input over the mean, and under

Rows = Float32[np.ndarray, 'inputs outputs']
Factor = Float32[np.ndarray, 'groups K K']


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trellis(LeafEncoder):
  r"""Chooses codes along a trellis: a finer grid, of which each state allows every other level.

  The codes of a leaf, in the order in which they are coded, follow the trellis of
  `opq_jax.coding.trellis`: at each weight, the codes before it say which half of the levels may be
  chosen.  Viterbi's algorithm finds the path of least

      sum_i (w_i - v_i)^2  +  (slope / h_i) bits_i

  where `bits` are those that `opq_jax.coding.contexts` charges, by scores of inputs, outputs and
  neighbouring taps, given the codes of a first walk at one price for all.  The slope is that of the
  plain grid: dD/dR of the Laplace density for which the grid is optimal.

  With moments, the errors of a row of weights are pushed on to the inputs to come as by `Feedback`,
  input after input in the order of the file.  An error of input i then costs h_i = 1 / U_ii^2 in
  the layer's output, relative to the geometric mean over inputs; h_i is 1 without moments.

  On the same plain grid, the file is smaller and errs less than one of rounded codes;
  `opq_jax.compress` searches for the grid with which it has the bits asked.  The file loads as any
  other: a leaf has one codebook and one mask.  To finetune, start from `Rounding` or `Feedback`:
  training moves weights off the trellis, and all levels then cost bits.

  Attributes:
    moments: as in `Feedback`; None, of a leaf or of all, where errors are not pushed on.
    damping: as in `Feedback`.

  >>> import opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> error = lambda network: float(jnp.square(network.params - kernel).sum())
  >>> coded = opq_jax.compress(kernel, compression_rate=16.0, encoder=Trellis())
  >>> error(coded) < 0.9 * error(opq_jax.compress(kernel, compression_rate=16.0))
  True
  """

  moments: PyTree | None = None
  damping: float = DAMPING

  def choose_codes(self, params: PyTree, grids: CompressionState) -> Encoded:
    """Chooses the codes of a tree, and the grids that the trellis refines.

    A weight beyond 127 levels of the new grid escapes.  A leaf that would have too many of them,
    or whose shape the coder has no order for, keeps its plain grid, and pushes its errors on all
    the same; a warning names it.  Runs on the host, and cannot be traced.

    Raises:
      ValueError: grids or moments were made for another tree, a matrix has another shape than its
        leaf needs, or a leaf or matrix is not finite.
    """
    return _trees(params, _coded_leaves(params, grids, self.moments, self.damping))

  def choose_leaf(
    self, weights: Array, grid: LeafState, moments: Array | None, damping: float
  ) -> tuple[Array, LeafState]:
    values, state, *_ = _coded_leaf(weights, grid, moments, damping)
    assert state is not None
    return values, state

  def trials(self) -> Callable[[PyTree, CompressionState], Trial]:
    plain: set[str] = set()  # once plain, a leaf stays so: a search would go to and fro otherwise

    def trial(params: PyTree, grids: CompressionState) -> Trial:
      coded = _coded_leaves(params, grids, self.moments, self.damping, plain)
      named = zip(trees.named_leaves(params), coded, strict=True)
      plain.update(name for name, leaf in named if leaf.is_plain)
      codes = [leaf.codes for leaf in coded if leaf.codes is not None]
      bits = sum(_bits(leaf) for leaf in coded)
      return Trial(*_trees(params, coded), bits / max(sum(code.size for code in codes), 1))

    return trial


class _Coded(NamedTuple):
  """A leaf: decoded, with its grid and mask, and its codes; these are None where it stays.

  Its codes are plain where the trellis does not serve it, though it has weights to code.
  """

  values: Any
  state: LeafState | None
  codes: Int8[np.ndarray, '...'] | None
  is_plain: bool = False


def _bits(leaf: _Coded) -> float:
  """Of a leaf's codes, at their entropy given the subsets, and of its escaped weights."""
  if leaf.codes is None or leaf.state is None:
    return 0.0
  is_escaped, size = leaf.codes == ESCAPE, leaf.codes.size
  bits = entropy_coding.entropy(np.where(is_escaped, np.int8(0), leaf.codes)) * size
  escaped = int(np.count_nonzero(is_escaped))
  value_bits = 8 * np.dtype(leaf.state.dtype).itemsize
  return bits + escaped * (value_bits + math.log2(size / escaped)) if escaped else bits


def _trees(params: PyTree, coded: list[_Coded]) -> Encoded:
  return encoded(params, [(leaf.values, leaf.state) for leaf in coded])


def _coded_leaves(
  params: PyTree,
  grids: CompressionState,
  moments: PyTree | None,
  damping: float,
  plain: Collection[str] = (),
) -> list[_Coded]:
  """All leaves, as `Trellis.choose_codes` has them; leaves in `plain` have plain codes."""

  def coded(leaf: LeafToCode) -> _Coded:
    if leaf.grid is None:
      return _Coded(leaf.weights, None, None)
    if not np.isfinite(np.asarray(leaf.weights, np.float32)).all():
      raise ValueError(f'{leaf.name}: found NaN or an infinity, expected finite weights')
    moments = None if leaf.moments is None else np.asarray(leaf.moments)
    return _coded_leaf(leaf.weights, leaf.grid, moments, damping, leaf.name not in plain)

  leaves = list(leaves_to_code(params, grids, moments))
  # all but Python itself runs without its lock
  with ThreadPoolExecutor() as pool:
    chosen = list(pool.map(coded, leaves))
  plain = [leaf.name for leaf, code in zip(leaves, chosen, strict=True) if code.is_plain]
  if plain:
    more = f' and {len(plain) - _MOST_NAMED} more' if len(plain) > _MOST_NAMED else ''
    messages.warn(
      f'{", ".join(plain[:_MOST_NAMED])}{more}: found leaves that the trellis does not '
      'serve, for their shape or their many weights beyond its levels: they have plain codes'
    )
  return chosen


def _coded_leaf(
  kernel: Array, leaf: LeafState, moments: Any, damping: float, may_have_trellis: bool = True
) -> _Coded:
  # in a unit of about a step, exactly: squares of tiny or huge weights are none of float32
  unit = np.float32(2.0 ** math.frexp(float(leaf.step))[1])
  weights = np.asarray(kernel, np.float32) / unit
  grid = [float(x) / float(unit) for x in (leaf.codebook[1], leaf.threshold, leaf.step)]
  factor = None if moments is None else _factor(np.asarray(moments, np.float32), damping)
  found = fit(weights, *grid) if int(leaf.levels) and may_have_trellis else None
  orders = arrangements.choices(weights.shape) if found else []
  if moments is not None:
    orders = [order for order in orders if order != 1]  # moments are in the order of the weights
  is_exact = _is_exact(kernel, leaf)
  if found is None or is_exact or not orders or _has_too_many_beyond(weights, found.grid, leaf):
    codes = _one_by_one(kernel, leaf, factor)
    state = dataclasses.replace(leaf, kinds=jnp.asarray(kinds_of_codes(codes)))
    is_plain = bool(codes.any()) and int(leaf.levels) > 0 and not is_exact
    return _Coded(_decoded(kernel, codes, state), state, codes, is_plain)

  step, first = exact_grid(
    unit * jnp.float32(found.grid.step),
    unit * jnp.float32(found.grid.first),
    jnp.int32(MAX_LEVELS),
  )
  codebook = affine_codebook(first, step, jnp.int32(MAX_LEVELS))
  threshold = jnp.maximum(first - step / 2, 0)
  rest = {'codebook': codebook, 'threshold': threshold, 'step': step, 'dtype': leaf.dtype}
  state = LeafState(kinds=leaf.kinds, levels=jnp.int32(MAX_LEVELS), **rest)
  found = found._replace(
    grid=trellis.Grid(float(first) / float(unit), float(step) / float(unit), MAX_LEVELS)
  )
  most = max(2 * found.grid.step, grid[1])
  values = np.asarray(_value_table(state)).astype(np.float32) / unit
  codes = _Walk(weights, found, orders[0], _usable(state), values).codes(factor, most)
  on_grid = np.where(codes == ESCAPE, 0, codes)
  levels = jnp.int32(max(int(on_grid.max()), -int(on_grid.min()), 1))
  state = dataclasses.replace(
    state,
    kinds=jnp.asarray(kinds_of_codes(codes)),
    codebook=affine_codebook(first, step, levels),
    levels=levels,
  )
  return _Coded(_decoded(kernel, codes, state), state, codes)


def _is_exact(kernel: Array, leaf: LeafState) -> bool:
  """Whether the plain grid holds the leaf exactly, and no other is better: a lattice."""
  flat, kinds = np.asarray(kernel).reshape(-1), np.asarray(leaf.kinds).reshape(-1)
  for part in (slice(0, 1 << 10), slice(None)):
    record = dataclasses.replace(leaf, kinds=jnp.asarray(kinds[part]))
    values = compression.apply_compression(flat[part].astype(leaf.dtype), CompressionState(record))
    if not np.array_equal(values, flat[part]):
      return False
  return True


def _has_too_many_beyond(
  weights: Float32[np.ndarray, '...'], grid: trellis.Grid, leaf: LeafState
) -> bool:
  """Whether what is escaped from a trellis' grid and not from the plain one costs what it gains."""
  size, plain = weights.size, int(np.count_nonzero(np.asarray(leaf.escaped)))
  escaped = int(np.count_nonzero(is_beyond(weights, grid)))
  if escaped <= plain:
    return False
  each = 8 * np.dtype(leaf.dtype).itemsize + math.log2(size / escaped) + 1.5
  return (escaped - plain) * each > _GAIN * size


def _usable(state: LeafState) -> Bool[np.ndarray, '128']:
  """Which |code| has a value of the leaf's dtype in its own cell."""
  cells = jnp.arange(MAX_LEVELS, dtype=jnp.float32)
  return np.concatenate([[True], np.asarray(settled(cells, state) == cells)])


def _decoded(kernel: Array, codes: Int8[np.ndarray, '...'], state: LeafState) -> Array:
  """As `opq_jax.decode`, without a program of XLA for every shape."""
  values = np.asarray(_value_table(state))[codes.view(np.uint8)]
  is_escaped = codes == ESCAPE
  if is_escaped.any():
    values = np.where(is_escaped, np.asarray(kernel).astype(values.dtype), values)
  return jnp.asarray(values)


_value_table = jax.jit(
  lambda state: value_table(dataclasses.replace(state, kinds=jnp.zeros(0, jnp.uint8)))
)


def _one_by_one(kernel: Array, leaf: LeafState, factor: Factor | None) -> Int8[np.ndarray, '...']:
  """Codes of the plain grid, with the errors pushed on by a factor, if there is one."""
  if factor is None:
    return np.asarray(compression.encode(kernel.astype(leaf.dtype), CompressionState(leaf)))
  weights = np.asarray(kernel, np.float32)
  rows = np.array(weights.reshape(-1, weights.shape[-1]), order='C')
  is_escaped = np.asarray(leaf.escaped).reshape(rows.shape)
  codes = np.empty(rows.shape, np.int8)
  values = np.asarray(_value_table(leaf)).astype(np.float32)
  errors = _Errors(rows, is_escaped, factor, values, max(float(leaf.step), float(leaf.threshold)))
  for i in range(len(rows)):
    codes[i] = np.where(is_escaped[i], 0, feedback.nearest(rows[i], leaf)[0])
    errors.push(i, codes[i : i + 1])
  codes[is_escaped] = ESCAPE
  return codes.reshape(weights.shape)


class _Walk:
  """A leaf's weights in the order of its codes, and the codes that are chosen for them.

  Args:
    weights: of the leaf.
    by: what to choose by.
    arrangement: of the coder; 0 and 2 have the order of the weights.
    usable: which |code| may be chosen.
    values: of every code; a negative one counts from the end.
  """

  def __init__(
    self,
    weights: Float32[np.ndarray, '...'],
    by: Fit,
    arrangement: int,
    usable: Bool[np.ndarray, '128'],
    values: Float32[np.ndarray, '256'],
  ):
    self._by, self._arrangement = by, arrangement
    self._usable, self._values = usable, values
    self._codes = np.empty(weights.shape, np.int8)
    view, self._window = arrangements.arranged(weights, arrangement)
    self._shape = view.shape
    self._rows = np.array(view, order='C').reshape(-1, view.shape[-1])
    self._is_escaped = is_beyond(self._rows, by.grid)
    self._has_escapes = bool(self._is_escaped.any())
    self._chosen = np.zeros(view.shape, np.int8)
    self._indices = np.zeros(view.shape, np.int8)

  def codes(self, factor: Factor | None, most: float) -> Int8[np.ndarray, '...']:
    """The codes, with the errors pushed on by a factor, if there is one, and none beyond `most`."""
    taps, inputs, outputs = self._shape
    self._without_contexts()
    prices = context_search.prices(self._in_place(), self._arrangement)
    slopes = np.full(self._rows.shape, self._by.slope, np.float32)
    errors = None
    if factor is not None:
      slopes *= np.repeat(_worth(factor).T, outputs // len(factor), 1)
      errors = _Errors(self._rows, self._is_escaped, factor, self._values, most)
    at_once = -(-(_AT_ONCE if factor is None else _BETWEEN) // outputs)
    ahead = -(-_AHEAD // outputs)
    state = 0
    for tap in range(taps):
      ranges, is_turned = prices.of_tap(self._indices, self._window, tap)
      zero, start = tap * inputs, 0
      while start < inputs:
        stop = min(start + at_once, inputs)
        if errors is not None:
          stop = min(stop, errors.end_of_block(zero + start) - zero)
        seen = slice(zero + start, zero + min(stop + ahead, inputs))
        of_tap = slice(start, seen.stop - zero)
        chosen = self._chosen[tap, start:stop]
        state = viterbi.search(
          self._to_code(seen),
          slopes[seen].reshape(-1),
          ranges[of_tap].reshape(-1),
          is_turned[of_tap].reshape(-1),
          prices.bits,
          self._usable,
          *self._by.grid,
          state,
          chosen.reshape(-1),
        )
        self._indices[tap, start:stop] = np.sign(chosen) * ((np.abs(chosen) + 1) >> 1)
        if errors is not None:
          errors.push(seen.start, chosen)
        start = stop
    codes = self._in_place()
    if self._has_escapes:
      is_escaped, _ = arrangements.arranged(codes, self._arrangement)
      is_escaped[self._is_escaped.reshape(self._shape)] = ESCAPE
    return codes

  def _to_code(self, rows: slice) -> Float32[np.ndarray, ' n']:
    """The weights of these rows, NaN where they are escaped."""
    weights = self._rows[rows]
    if self._has_escapes:
      weights = np.where(self._is_escaped[rows], np.float32(np.nan), weights)
    return weights.reshape(-1)

  def _without_contexts(self) -> None:
    flat, codes = self._to_code(slice(None)), self._chosen.reshape(-1)
    state = 0
    for start in range(0, flat.size, _AT_ONCE):
      stop = start + _AT_ONCE
      part = flat[start : stop + _AHEAD]
      slopes, models = np.full(part.size, self._by.slope, np.float32), np.zeros(part.size, np.uint8)
      is_turned = np.zeros(part.size, bool)
      state = viterbi.search(
        part,
        slopes,
        models,
        is_turned,
        self._by.bits,
        self._usable,
        *self._by.grid,
        state,
        codes[start:stop],
      )

  def _in_place(self) -> Int8[np.ndarray, '...']:
    """The codes with the axes of the leaf."""
    view, _ = arrangements.arranged(self._codes, self._arrangement)
    view[...] = self._chosen
    return self._codes


class _Errors:
  """What the codes of inputs err, made good by the inputs to come, as far as these can.

  Args:
    rows: the weights, inputs by outputs; those to come are changed.
    is_escaped: where a weight stays what it is.
    factor: of the moments.
    values: of every code; a negative one counts from the end.
    most: no error is pushed on as more.
  """

  def __init__(
    self,
    rows: Rows,
    is_escaped: Bool[np.ndarray, 'inputs outputs'],
    factor: Factor,
    values: Float32[np.ndarray, '256'],
    most: float,
  ):
    self._rows, self._factor, self._is_escaped = rows, factor, is_escaped
    # the values of escaped weights, without the errors pushed on to them
    self._exact = rows.copy() if is_escaped.any() else rows
    self._by = values, most
    self._scaled = np.zeros(rows.shape, np.float32)

  def end_of_block(self, begin: int) -> int:
    """Up to which input codes may be chosen before errors are pushed on."""
    return min((begin // _BLOCK + 1) * _BLOCK, len(self._rows))

  def push(self, begin: int, codes: Int8[np.ndarray, 'inputs outputs']) -> None:
    """Takes the codes of the inputs from `begin` on, all of one block."""
    end, stop = self.end_of_block(begin), begin + len(codes)
    rows = self._rows, self._exact, self._is_escaped
    _push(*rows, codes, self._factor, self._scaled, begin, end, *self._by)
    if stop == end < len(self._rows):
      block = slice((begin // _BLOCK) * _BLOCK, end)
      groups, outputs = len(self._factor), self._rows.shape[1]
      theirs = self._scaled[block].reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
      push = np.matmul(self._factor[:, block, end:].transpose(0, 2, 1), theirs)
      self._rows[end:] -= push.transpose(1, 0, 2).reshape(-1, outputs)


def _factor(moments: Factor, damping: float) -> Factor:
  """The upper triangular U of H^-1 = U^T U, of each group, H damped and over its mean energy."""
  groups, width, _ = moments.shape
  energy = np.mean(np.diagonal(moments, axis1=1, axis2=2), axis=1)[:, None, None]
  matrix = moments / np.where(energy > 0, energy, 1) + damping * np.eye(width)
  lower = np.linalg.cholesky(matrix.astype(np.float32)[:, ::-1, ::-1])
  # as in `opq_jax.encoders.feedback`: with J the reversal, J H J = L L^T and U = J L^-1 J
  if groups == 1:
    one = np.eye(width, dtype=np.float32)
    inverse = scipy.linalg.solve_triangular(lower[0], one, lower=True)[None]
  else:
    inverse = np.linalg.inv(lower)
  return np.ascontiguousarray(inverse[:, ::-1, ::-1])


def _worth(factor: Factor) -> Float32[np.ndarray, 'groups K']:
  """U_ii^2 of each input over the geometric mean of all."""
  logarithm = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2))
  relative = np.exp(logarithm - logarithm.mean())
  return np.clip(relative, 1 / _MOST_WORTH, _MOST_WORTH).astype(np.float32)


@native.compiled
def _push(rows, exact, is_escaped, codes, factor, errors, begin, end, values, most):  # type: ignore[no-untyped-def]
  """Errors of the codes of some inputs, made good by those after them and before `end`."""
  groups = factor.shape[0]
  channels = rows.shape[1] // groups
  for i in range(begin, begin + codes.shape[0]):
    for group in range(groups):
      scale = np.float32(1) / factor[group, i, i]
      for o in range(group * channels, (group + 1) * channels):
        value = exact[i, o] if is_escaped[i, o] else values[codes[i - begin, o]]
        error = rows[i, o] - value
        errors[i, o] = np.float32(min(max(error, -most), most)) * scale
      for j in range(i + 1, end):
        by = factor[group, i, j]
        for o in range(group * channels, (group + 1) * channels):
          rows[j, o] -= by * errors[i, o]
