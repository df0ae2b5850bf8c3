r"""Codes chosen along a trellis: fewer bits at the same error, from the same kind of file."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float32, Int8

from opq_jax import (
  compression,
  context_coding,
  entropy_coding,
  feedback,
  native,
  trees,
  trellis,
)
from opq_jax.allocation import Allocation
from opq_jax.compression import CompressionState, LeafState
from opq_jax.feedback import DAMPING
from opq_jax.trees import PyTree
from opq_jax.trellis_grids import Fit, fit

_AT_ONCE = 1 << 16  # weights, where no error is pushed on
_BETWEEN = 128  # weights, at least, between which errors are pushed on
_AHEAD = 256  # weights, at least, that have a say in the ways before them
_BLOCK = 64  # inputs whose feedback is pushed on within a block that stays in the cache
_MOST_WORTH = 8.0  # of an input over the mean, and under

Rows = Float32[np.ndarray, 'inputs outputs']
Factor = Float32[np.ndarray, 'groups K K']


def encode_with_trellis(
  params: PyTree,
  state: CompressionState,
  moments: PyTree | None = None,
  *,
  damping: float = DAMPING,
) -> tuple[PyTree, CompressionState]:
  r"""Grids twice as fine, of which the codes before a weight leave it every other level.

  The codes of a leaf, in the order in which they are coded, follow the trellis of
  `opq_jax.trellis`.  Of all ways through it those codes are taken that make

      sum_i (w_i - v_i)^2  +  (slope / h_i) bits_i

  small, by Viterbi's algorithm; `bits` are those that `opq_jax.context_coding` charges, by scores
  of inputs, outputs and neighbouring taps, for codes chosen a first time at one price for all.
  The slope is that of the plain grid, dD/dR of the Laplace density that it is the best one for.

  With moments the errors of a row of weights are pushed on to the inputs to come, as
  `opq_jax.encode_with_feedback` does, input after input in the order of the file.  An error of
  input i costs h_i = 1 / U_ii^2 in what the layer gives, once those to come have made good what
  they can; h_i is that over the geometric mean of all inputs, and 1 without moments.

  A file of such codes is smaller and errs less than that of the plain codes of `state`;
  `allocate_with_trellis` asks for a grid with which it has the size of those instead.  It loads
  as any other: a leaf has one codebook and one mask.  Whoever trains on, though, moves weights out
  of the trellis, and pays the bits of all levels: finetune from plain codes.

  Args:
    params: the original weights.
    state: their plain grids, from `opq_jax.init_state`.
    moments: as for `encode_with_feedback`; None, of all leaves or of one, where there are none.
    damping: as for `encode_with_feedback`.

  Returns:
    `(params, state)`: the decoded values, and the new grids with the masks of these codes.  A leaf
    whose weights reach beyond 127 such levels, or whose shape the coder has no order for, keeps its
    grid, and its errors are pushed on all the same.  Runs on the host, and cannot be traced.

  Raises:
    ValueError: a tree is made for another one, a matrix has another shape than its kernel needs,
      or a leaf or matrix is not finite.

  >>> import opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> state = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  >>> coded, coded_state = encode_with_trellis(kernel, state)
  >>> error = lambda values: float(jnp.square(values - kernel).sum())
  >>> error(coded) < 0.95 * error(opq_jax.apply_compression(kernel, state))
  True
  >>> size = lambda *network: len(opq_jax.artifact.serialize(*network))
  >>> size(coded, coded_state) < 0.98 * size(kernel, state)
  True
  """
  return _trees(params, _coded_leaves(params, state, moments, damping))


def allocate_with_trellis(
  params: PyTree,
  moments: PyTree | None = None,
  *,
  compression_rate: float,
  damping: float = DAMPING,
  **options: Any,
) -> tuple[Allocation, PyTree, CompressionState]:
  """Allocates such that codes along a trellis have the rate that is asked.

  Args:
    params, moments, damping: as for `encode_with_trellis`.
    compression_rate: 32 bits over the entropy of the codes, given their subsets, as plain codes of
      that rate have it.
    **options: of `opq_jax.allocate`, such as `objective`.

  Returns:
    The allocation of plain grids that was found, and `(params, state)` of `encode_with_trellis`.

  Raises:
    ValueError: as `allocate` and `encode_with_trellis`.

  >>> import opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (256, 256))
  >>> _, coded, state = allocate_with_trellis(kernel, compression_rate=16.0)
  >>> plain = opq_jax.init_state(kernel, opq_jax.allocate(kernel, compression_rate=16.0))
  >>> error = lambda values: float(jnp.square(values - kernel).sum())
  >>> error(coded) < 0.9 * error(opq_jax.apply_compression(kernel, plain))
  True
  """

  def encoder(params: PyTree, state: CompressionState) -> tuple[PyTree, CompressionState, float]:
    coded = _coded_leaves(params, state, moments, damping)
    codes = [leaf.codes for leaf in coded if leaf.codes is not None]
    bits = sum(entropy_coding.entropy(c) * c.size for c in codes) / sum(c.size for c in codes)
    return *_trees(params, coded), bits

  return feedback.allocate_for(encoder, params, compression_rate, **options)


class _Coded(NamedTuple):
  """A leaf: decoded, with its grid and mask, and its codes; these are None where it stays."""

  values: Any
  state: LeafState | None
  codes: Int8[np.ndarray, '...'] | None


def _trees(params: PyTree, coded: list[_Coded]) -> tuple[PyTree, CompressionState]:
  """Values and state of all leaves, as trees like the params."""
  structure = jax.tree.structure(params)
  return (
    jax.tree.unflatten(structure, [leaf.values for leaf in coded]),
    CompressionState(jax.tree.unflatten(structure, [leaf.state for leaf in coded])),
  )


def _coded_leaves(
  params: PyTree, state: CompressionState, moments: PyTree | None, damping: float
) -> list[_Coded]:
  """All leaves, as `encode_with_trellis` has them."""
  leaves = trees.named_leaves(params)
  records = trees.records(params, state.tree, LeafState)
  matrices: list[Any] = [None] * len(records)
  if moments is not None:
    matrices = feedback.matrices_of(params, moments)

  def coded(item: tuple[tuple[str, Array], LeafState | None, Any]) -> _Coded:
    (name, leaf), record, matrix = item
    if record is None:
      return _Coded(leaf, None, None)
    if not np.isfinite(np.asarray(leaf, np.float32)).all():
      raise ValueError(f'{name}: found NaN or an infinity, expected finite weights')
    if matrix is not None:
      matrix = np.asarray(matrix)
      feedback.check_moments(name, leaf, matrix)
    return _coded_leaf(leaf, record, matrix, damping)

  # all but Python itself runs without its lock
  with ThreadPoolExecutor() as pool:
    return list(pool.map(coded, zip(leaves.items(), records, matrices, strict=True)))


def encode_leaf(
  kernel: Array, leaf: LeafState, moments: Array | None, damping: float
) -> tuple[Array, LeafState]:
  """Values and grid of one kernel, as `encode_with_trellis` has them."""
  values, state, _ = _coded_leaf(kernel, leaf, moments, damping)
  assert state is not None
  return values, state


def _coded_leaf(kernel: Array, leaf: LeafState, moments: Any, damping: float) -> _Coded:
  # in a unit of about a step, exactly: squares of tiny or huge weights are none of float32
  unit = np.float32(2.0 ** math.frexp(float(leaf.step))[1])
  weights = np.asarray(kernel, np.float32) / unit
  grid = [float(x) / float(unit) for x in (leaf.codebook[1], leaf.threshold, leaf.step)]
  factor = None if moments is None else _factor(np.asarray(moments, np.float32), damping)
  found = fit(weights, *grid) if int(leaf.levels) else None
  orders = context_coding.choices(weights.shape) if found else []
  if moments is not None:
    orders = [order for order in orders if order != 1]  # moments are in the order of the weights
  if found is None or not orders:
    codes = _one_by_one(kernel, leaf, factor)
    state = dataclasses.replace(leaf, mask=jnp.asarray(codes != 0))
    return _Coded(_decoded(codes, state), state, codes)

  most = max(2 * found.grid.step, grid[1])
  codes = _Walk(weights, found, orders[0]).codes(factor, most)
  levels = jnp.int32(max(int(np.abs(codes).max()), 1))
  step, first = compression.exact_grid(
    unit * jnp.float32(found.grid.step), unit * jnp.float32(found.grid.first), levels
  )
  state = LeafState(
    mask=jnp.asarray(codes != 0),
    codebook=compression.affine_codebook(first, step, levels),
    threshold=jnp.maximum(first - step / 2, 0),
    step=step,
    levels=levels,
    dtype=leaf.dtype,
  )
  return _Coded(_decoded(codes, state), state, codes)


def _decoded(codes: Int8[np.ndarray, '...'], state: LeafState) -> Array:
  """As `opq_jax.decode`, without a program of XLA for every shape."""
  values = np.asarray(state.codebook)[np.abs(codes)]
  return jnp.asarray(np.where(codes < 0, -values, values).astype(state.dtype))


def _one_by_one(kernel: Array, leaf: LeafState, factor: Factor | None) -> Int8[np.ndarray, '...']:
  """Codes of the plain grid, with the errors pushed on by a factor, if there is one."""
  if factor is None:
    return np.asarray(compression.encode(kernel, CompressionState(leaf)))
  weights = np.asarray(kernel, np.float32)
  rows = np.array(weights.reshape(-1, weights.shape[-1]), order='C')
  codes = np.empty(rows.shape, np.int8)
  first, step, threshold = (float(x) for x in (leaf.codebook[1], leaf.step, leaf.threshold))
  errors = _Errors(rows, factor, first, step, max(step, threshold))
  for i in range(len(rows)):
    codes[i] = feedback.nearest(rows[i], leaf)[0]
    errors.push(i, codes[i : i + 1])
  return codes.reshape(weights.shape)


class _Walk:
  """A leaf's weights in the order of its codes, and the codes that are chosen for them.

  Args:
    weights: of the leaf.
    by: what to choose by.
    arrangement: of the coder; 0 and 2 have the order of the weights.
  """

  def __init__(self, weights: Float32[np.ndarray, '...'], by: Fit, arrangement: int):
    self._by, self._arrangement = by, arrangement
    self._codes = np.empty(weights.shape, np.int8)
    view, self._window = context_coding.arranged(weights, arrangement)
    self._shape = view.shape
    self._rows = np.array(view, order='C').reshape(-1, view.shape[-1])
    self._chosen = np.zeros(view.shape, np.int8)
    self._indices = np.zeros(view.shape, np.int8)

  def codes(self, factor: Factor | None, most: float) -> Int8[np.ndarray, '...']:
    """The codes, with the errors pushed on by a factor, if there is one, and none beyond `most`."""
    taps, inputs, outputs = self._shape
    self._without_contexts()
    prices = context_coding.prices(self._in_place(), self._arrangement)
    slopes = np.full(self._rows.shape, self._by.slope, np.float32)
    errors = None
    if factor is not None:
      slopes *= np.repeat(_worth(factor).T, outputs // len(factor), 1)
      grid = self._by.grid
      errors = _Errors(self._rows, factor, grid.first, grid.step, most)
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
        state = trellis.search(
          self._rows[seen].reshape(-1),
          slopes[seen].reshape(-1),
          ranges[of_tap].reshape(-1),
          is_turned[of_tap].reshape(-1),
          prices.bits,
          *self._by.grid,
          state,
          chosen.reshape(-1),
        )
        self._indices[tap, start:stop] = np.sign(chosen) * ((np.abs(chosen) + 1) >> 1)
        if errors is not None:
          errors.push(seen.start, chosen)
        start = stop
    return self._in_place()

  def _without_contexts(self) -> None:
    flat, codes = self._rows.reshape(-1), self._chosen.reshape(-1)
    state = 0
    for start in range(0, flat.size, _AT_ONCE):
      stop = start + _AT_ONCE
      part = flat[start : stop + _AHEAD]
      slopes, models = np.full(part.size, self._by.slope, np.float32), np.zeros(part.size, np.uint8)
      is_turned = np.zeros(part.size, bool)
      state = trellis.search(
        part, slopes, models, is_turned, self._by.bits, *self._by.grid, state, codes[start:stop]
      )

  def _in_place(self) -> Int8[np.ndarray, '...']:
    """The codes with the axes of the leaf."""
    view, _ = context_coding.arranged(self._codes, self._arrangement)
    view[...] = self._chosen
    return self._codes


class _Errors:
  """What the codes of inputs err, made good by the inputs to come, as far as these can.

  Args:
    rows: the weights, inputs by outputs; those to come are changed.
    factor: of the moments.
    first, step: of the grid.
    most: no error is pushed on as more.
  """

  def __init__(self, rows: Rows, factor: Factor, first: float, step: float, most: float):
    self._rows, self._factor = rows, factor
    self._grid = first, step, most
    self._scaled = np.zeros(rows.shape, np.float32)

  def end_of_block(self, begin: int) -> int:
    """Up to which input codes may be chosen before errors are pushed on."""
    return min((begin // _BLOCK + 1) * _BLOCK, len(self._rows))

  def push(self, begin: int, codes: Int8[np.ndarray, 'inputs outputs']) -> None:
    """Takes the codes of the inputs from `begin` on, all of one block."""
    end, stop = self.end_of_block(begin), begin + len(codes)
    _push(self._rows, codes, self._factor, self._scaled, begin, end, *self._grid)
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
  # as in `opq_jax.feedback`: with J the reversal, J H J = L L^T and U = J L^-1 J
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
def _push(rows, codes, factor, errors, begin, end, first, step, most):  # type: ignore[no-untyped-def]
  """Errors of the codes of some inputs, made good by those after them and before `end`."""
  groups = factor.shape[0]
  channels = rows.shape[1] // groups
  for i in range(begin, begin + codes.shape[0]):
    for group in range(groups):
      scale = np.float32(1) / factor[group, i, i]
      for o in range(group * channels, (group + 1) * channels):
        code = int(codes[i - begin, o])
        value = np.float32(first + step * (abs(code) - 1)) if code else np.float32(0)
        error = rows[i, o] - (value if code > 0 else -value)
        errors[i, o] = np.float32(min(max(error, -most), most)) * scale
      for j in range(i + 1, end):
        by = factor[group, i, j]
        for o in range(group * channels, (group + 1) * channels):
          rows[j, o] -= by * errors[i, o]
