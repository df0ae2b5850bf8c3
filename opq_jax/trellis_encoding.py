r"""Codes chosen along a trellis: fewer bits at the same error, for the same decoder and codebook."""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numba
import numpy as np
import scipy.linalg
from jaxtyping import Float32, Int8

from opq_jax import ans, compression, context_coding, feedback, trees, trellis
from opq_jax.allocation import MAX_LEVELS
from opq_jax.compression import CompressionState, LeafState
from opq_jax.feedback import DAMPING
from opq_jax.trees import PyTree
from opq_jax.trellis import MOST_INDEX

_SAMPLE = 1 << 16  # weights that a grid is fitted to
_FITS = 4
_AT_ONCE = 1 << 16  # weights, where no error is pushed on
_BETWEEN = 64  # weights, about, between which errors are pushed on
_AHEAD = 128  # weights to come that have a say in which way is gone
_BLOCK = 64  # inputs whose feedback is pushed on within a block that stays in the cache
_EXPONENT = 0.5
# of Laplace weights, by the share that plain codes prune: the step and first value of the best grid
# for the trellis over those of the best plain one of the same slope
_PRUNED = 0.0, 0.30, 0.54, 0.75, 0.89, 1.0
_STEP = 0.59, 0.587, 0.568, 0.53, 0.54, 0.54
_FIRST = 0.65, 0.69, 0.745, 0.813, 0.876, 0.9


class Fit(NamedTuple):
  """What the codes of a leaf are chosen by.

  Attributes:
    grid: of the trellis.
    slope: squared error that a bit is worth.
    bits: of each index + 64, in each subset.
  """

  grid: trellis.Grid
  slope: float
  bits: Float32[np.ndarray, '2 129']


def fit(weights: Float32[np.ndarray, ' n'], leaf: LeafState) -> Fit | None:
  first, threshold, step = (float(x) for x in (leaf.codebook[1], leaf.threshold, leaf.step))
  magnitude = np.abs(weights)
  largest = float(magnitude.max(initial=0))
  pruned = np.mean(magnitude <= threshold)
  many = np.mean(magnitude > threshold + step)
  if int(leaf.levels) == 0 or pruned == 1:
    return None
  one = 1 - pruned - many
  slope = math.log(2) * step**2 / 6
  if pruned > 0 and one > 0:
    bits = math.log2(pruned) - math.log2(one / 2)
    found = (threshold**2 - (first - threshold) ** 2) / bits if bits > 0 else 0
    slope = found if found > 0 else slope
  grid = trellis.Grid(
    first * float(np.interp(pruned, _PRUNED, _FIRST)),
    min(step, 1.05 * first) * float(np.interp(pruned, _PRUNED, _STEP)),
    MAX_LEVELS,
  )
  more = np.clip(many / (1 - pruned), 0.01, 0.99)
  index = np.abs(np.arange(-MOST_INDEX, MOST_INDEX + 1))
  share = np.where(index == 0, max(pruned, 0.01), (1 - pruned) / 2 * (1 - more) * more ** (index - 1.0))
  bits = np.tile(-np.log2(np.maximum(share, 1e-9)), (2, 1)).astype(np.float32)
  sample = weights
  if weights.size > _SAMPLE:
    sample = np.ascontiguousarray(weights[: weights.size // 256 * 256].reshape(-1, 256)[:: weights.size // _SAMPLE]).reshape(-1)
  for _ in range(_FITS):
    codes = np.empty(sample.size, np.int8)
    _search(sample, slope, bits[None], grid, codes)
    indices, subsets = trellis.indices_and_subsets(codes)
    size = np.abs(codes).astype(np.float64)
    grid = _refitted(grid, codes, np.abs(sample))
    counts = np.stack([ans.histogram(indices[subsets == q]) for q in (0, 1)])
    counts = counts[:, index_bytes()].astype(np.float64)
    counts = np.maximum(counts, 0.1)
    bits = np.log2(counts.sum(1, keepdims=True) / counts).astype(np.float32)
  if (largest - grid.first) / grid.step > MAX_LEVELS - 1:
    return None
  return Fit(grid, slope, bits)


def index_bytes():
  return np.arange(-MOST_INDEX, MOST_INDEX + 1).astype(np.int8).view(np.uint8)


def _refitted(grid, codes, magnitude):
  used = codes != 0
  x, y = np.abs(codes[used].astype(np.float64)) - 1, magnitude[used].astype(np.float64)
  if x.size == 0:
    return grid
  spread = x.var()
  step = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > 0 else grid.step
  first = y.mean() - step * x.mean()
  return grid._replace(first=first, step=step) if step > 0 and first > 0 else grid


def _search(weights, slope, bits, grid, codes, models=None, is_turned=None, state=0):
  n = weights.size
  slopes = np.full(n, slope, np.float32) if np.ndim(slope) == 0 else slope
  models = np.zeros(n, np.uint8) if models is None else models
  is_turned = np.zeros(n, bool) if is_turned is None else is_turned
  return trellis.search(weights, slopes, models, is_turned, bits, *grid, state, codes)


def codes_of_leaf(kernel, leaf: LeafState, moments, damping, exponent=None, refits=True):
  """Codes and grid; None where the leaf keeps plain ones."""
  exponent = _EXPONENT if exponent is None else exponent
  arrangements = context_coding.choices(kernel.shape)
  if not arrangements:
    return None
  arrangement = arrangements[0] if moments is None else 0
  view, window = context_coding.arranged(kernel, arrangement)
  taps, inputs, outputs = view.shape
  weights = np.array(view, np.float32, order='C').reshape(taps * inputs, outputs)
  found = fit(weights.reshape(-1), leaf)
  if found is None:
    return None
  grid, slope, bits = found
  codes = np.empty(kernel.shape, np.int8)
  target, _ = context_coding.arranged(codes, arrangement)
  order = np.empty(target.shape, np.int8)
  flat, flat_w, state = order.reshape(-1), weights.reshape(-1), 0
  for start in range(0, flat.size, _AT_ONCE):
    part = slice(start, start + _AT_ONCE)
    state = _search(flat_w[start : start + _AT_ONCE + _AHEAD], slope, bits[None], grid, flat[part], state=state)
  target[...] = order
  prices = context_coding.prices(codes, arrangement)

  groups, factor = 1, None
  slopes = np.full((taps * inputs, outputs), slope, np.float32)
  if moments is not None:
    matrix = np.asarray(moments, np.float32)
    groups = len(matrix)
    factor = _factors(matrix, damping)
    worth = 1 / np.square(np.diagonal(factor, axis1=1, axis2=2).astype(np.float64))  # [groups, K]
    relative = (worth / np.exp(np.mean(np.log(worth)))) ** -exponent
    slopes *= np.repeat(np.clip(relative, 1 / 8, 8).T, outputs // groups, 1).astype(np.float32)
  original = weights.copy()
  indices = np.zeros(order.shape, np.int8)
  most = np.float32(max(2 * grid.step, float(leaf.threshold)))
  rows = max(1, (_AT_ONCE if factor is None else _BETWEEN) // outputs)
  ahead = -(-_AHEAD // outputs)
  errors = np.zeros(weights.shape, np.float32)
  state = 0
  for tap in range(taps):
    ranges, is_turned = prices.of_tap(indices, window, tap)
    at, zero = 0, tap * inputs
    while at < inputs:
      begin = zero + at
      block_end = min((begin // _BLOCK + 1) * _BLOCK, taps * inputs)
      stop = min(at + rows, inputs)
      if factor is not None:
        stop = min(stop, block_end - zero)
      seen = min(stop + ahead, inputs)
      out = order[tap, at:stop].reshape(-1)
      state = _search(
        weights[begin : zero + seen].reshape(-1),
        slopes[begin : zero + seen].reshape(-1),
        prices.bits,
        grid,
        out,
        ranges[at:seen].reshape(-1),
        is_turned[at:seen].reshape(-1),
        state,
      )
      chosen = order[tap, at:stop]
      indices[tap, at:stop] = np.sign(chosen) * ((np.abs(chosen) + 1) >> 1)
      if factor is not None:
        _push(weights, chosen, factor, errors, begin, block_end, grid.first, grid.step, most)
        end = zero + stop
        if end == block_end and end < taps * inputs:
          done = slice(begin // _BLOCK * _BLOCK, end)
          shape = (-1, groups, outputs // groups)
          theirs = errors[done].reshape(shape).transpose(1, 0, 2)
          push = np.matmul(factor[:, done, end:].transpose(0, 2, 1), theirs)
          weights[end:] -= push.transpose(1, 0, 2).reshape(-1, outputs)
      at = stop
  target[...] = order
  if refits:
    grid = _refit_moments(grid, order.reshape(original.shape), original, None if moments is None else matrix)
  return codes, grid


def _factors(matrix, damping):
  """The upper triangular U of (matrix + damping)^-1 = U^T U of each group."""
  groups, width, _ = matrix.shape
  mean = np.mean(np.diagonal(matrix, axis1=1, axis2=2), axis=1)
  scaled = matrix / np.where(mean > 0, mean, 1)[:, None, None]
  scaled = scaled + np.float32(damping) * np.eye(width, dtype=np.float32)
  lower = np.linalg.cholesky(scaled[:, ::-1, ::-1])
  if groups == 1:
    inverse = scipy.linalg.solve_triangular(lower[0], np.eye(width, dtype=np.float32), lower=True)[None]
  else:
    inverse = np.linalg.inv(lower)
  return np.ascontiguousarray(inverse[:, ::-1, ::-1])


@numba.njit(cache=True, nogil=True)
def _push(weights, codes, factor, errors, begin, end, first, step, most):
  groups = factor.shape[0]
  channels = weights.shape[1] // groups
  for row in range(codes.shape[0]):
    i = begin + row
    for g in range(groups):
      own = np.float32(1) / factor[g, i, i]
      for o in range(g * channels, (g + 1) * channels):
        c = int(codes[row, o])
        value = np.float32(0)
        if c:
          value = np.float32(first + step * (abs(c) - 1))
          if c < 0:
            value = -value
        errors[i, o] = min(max(weights[i, o] - value, -most), most) * own
      for j in range(i + 1, end):
        by = factor[g, i, j]
        for o in range(g * channels, (g + 1) * channels):
          weights[j, o] -= by * errors[i, o]


def _refit_moments(grid, codes, weights, matrix):
  """first and step of least tr (W - Q)^T H (W - Q)."""
  if matrix is None:
    return _refitted(grid, codes, np.abs(weights))
  groups = len(matrix)
  sign = np.sign(codes).astype(np.float32)
  place = sign * (np.abs(codes).astype(np.float32) - 1)
  split = lambda x: x.reshape(len(x), groups, -1).transpose(1, 0, 2)
  s, t, w = split(sign), split(place), split(weights)
  hs, ht = np.matmul(matrix, s), np.matmul(matrix, t)
  dot = lambda a, b: float(np.sum(a * b, dtype=np.float64))
  a = np.array([[dot(s, hs), dot(s, ht)], [dot(s, ht), dot(t, ht)]])
  b = np.array([dot(w, hs), dot(w, ht)])
  if np.linalg.det(a) <= 1e-9 * a[0, 0] * a[1, 1]:
    return grid
  first, step = np.linalg.solve(a, b)
  return grid._replace(first=first, step=step) if step > 0 and first > 0 else grid


def encode_with_trellis(params, state, moments=None, *, damping=DAMPING, exponent=None, refits=True):
  leaves = trees.named_leaves(params)
  records = trees.records(params, state.tree, LeafState)
  matrices = [None] * len(records) if moments is None else jax.tree.structure(params).flatten_up_to(moments)
  values, masks = [], []
  def one(item):
    (name, leaf), record, matrix = item
    if record is None:
      return leaf, None
    return coded_leaf(leaf, record, matrix, damping, exponent, refits)
  with ThreadPoolExecutor(2) as pool:
    found = list(pool.map(one, zip(leaves.items(), records, matrices, strict=True)))
  values, masks = zip(*found)
  structure = jax.tree.structure(params)
  return jax.tree.unflatten(structure, values), CompressionState(jax.tree.unflatten(structure, masks))


def coded_leaf(leaf, record, matrix, damping, exponent=None, refits=True):
  found = codes_of_leaf(np.asarray(leaf, np.float32), record, matrix, damping, exponent, refits)
  if found is None:
    if matrix is None:
      codes = compression.encode(leaf, CompressionState(record))
    else:
      codes = feedback.codes_of_leaf(jnp.asarray(leaf), jnp.asarray(matrix), record, damping)
    new = dataclasses.replace(record, mask=codes != 0)
  else:
    codes, grid = found
    levels = jnp.int32(max(int(np.abs(codes).max(initial=0)), 1))
    step, first = compression._exact_grid(jnp.float32(grid.step), jnp.float32(grid.first), levels)
    threshold = jnp.maximum(first - step / 2, 0)
    codes = jnp.asarray(codes)
    new = dataclasses.replace(record, mask=codes != 0, codebook=compression.affine_codebook(first, step, levels), threshold=threshold, step=step, levels=levels)
  return compression.decode(codes, CompressionState(new)), new
