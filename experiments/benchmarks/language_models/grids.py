"""Uniform grids of groups of weights: rounding to nearest (RTN), and HQQ.

A group of weights that one row has in common shares a scale s and a zero z, and a weight has the
code q = clip(round(w / s + z), 0, 2^b - 1), which is read as s (q - z).

HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023) keeps
the scale of the smallest and largest weight and fits z to the error that |.|^p with p < 1 leaves
over: with W^ = s (Q - z) it alternates

    E <- shrink(W - W^, beta)           shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    z <- mean over the group of (Q - (W - E) / s)          beta <- 1.01 beta

while the mean of |W - W^| falls.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.benchmarks.language_models.coded import Matrix

SCALE_BITS = 16  # float16
CLIPS, LEAST_CLIP, CLIP_NORM = 100, 0.2, 2.4  # of GPTQ's search: shares of the range, and |error|^p
P, BETA, BETA_FACTOR, ITERATIONS = 0.7, 10.0, 1.01, 20  # HQQ's defaults
_LARGEST_SCALE = 2e4  # codes per unit of weight, HQQ's limit


class Grid(NamedTuple):
  """Grids of the rows of a group, one a row.

  Attributes:
    scale, zero: [outputs, 1]; the scale is a float16, the zero a code.
    levels: largest code.
  """

  scale: Float[np.ndarray | Array, 'outputs 1']
  zero: Float[np.ndarray | Array, 'outputs 1']
  levels: int

  def rounded(self, weights: Any) -> Any:
    """Returns the nearest values of the grids."""
    codes = (weights / self.scale + self.zero).round().clip(0, self.levels)
    return self.scale * (codes - self.zero)


def fitted(weights: Float[np.ndarray, 'outputs n'], bits: int, clip_search: bool = False) -> Grid:
  """Returns grids from the smallest to the largest weight, 0 included, of every row.

  Args:
    weights: of one group.
    bits: of a code.
    clip_search: takes the share of that range, of 1, .99, ... .21, with the least sum of
      |error|^2.4, as GPTQ's code does.

  >>> grid = fitted(np.array([[-1.0, 0.4, 2.0]]), 2)
  >>> float(grid.scale[0, 0]), float(grid.zero[0, 0]), grid.rounded(np.array([[0.4, 1.6]])).tolist()
  (1.0, 1.0, [[0.0, 2.0]])
  """
  levels = 2**bits - 1
  scale, zero = _fitted(jnp.asarray(weights, jnp.float32), levels, clip_search)
  return Grid(np.asarray(scale), np.asarray(zero), levels)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fitted(weights: Array, levels: int, clip_search: bool) -> tuple[Array, Array]:
  low = jnp.minimum(weights.min(axis=1, keepdims=True), 0)
  high = jnp.maximum(weights.max(axis=1, keepdims=True), 0)

  def grid_of(share: Array | float) -> tuple[Array, Array]:
    scale = (share * (high - low) / levels).astype(jnp.float16).astype(jnp.float32)
    # a row of zeros, and steps below float16's range
    scale = jnp.maximum(scale, float(np.finfo(np.float16).tiny))
    return scale, jnp.clip(jnp.round(-share * low / scale), 0, levels)

  def error_of(scale: Array, zero: Array) -> Array:
    rest = Grid(scale, zero, levels).rounded(weights) - weights
    return jnp.sum(jnp.abs(rest) ** CLIP_NORM, axis=1, keepdims=True)

  def better(number: int, best: tuple[Array, ...]) -> tuple[Array, ...]:
    grid = grid_of(1 - number / CLIPS)
    found = *grid, error_of(*grid)
    return tuple(jnp.where(found[2] < best[2], x, y) for x, y in zip(found, best, strict=True))

  grid = grid_of(1.0)
  if not clip_search:
    return grid
  number = int((1 - LEAST_CLIP) * CLIPS)
  scale, zero, _ = jax.lax.fori_loop(1, number, better, (*grid, error_of(*grid)))
  return scale, zero


def stored_bits(shape: tuple[int, ...], bits: int, group: int) -> float:
  """Returns the bits of a matrix: codes, and a float16 scale and a zero of one code a group.

  >>> stored_bits((2, 256), 3, 128) / 512
  3.1484375
  """
  outputs, inputs = shape
  return outputs * inputs * bits + outputs * -(-inputs // group) * (SCALE_BITS + bits)


def rtn(
  weights: Matrix, bits: int, group: int, clip_search: bool = False
) -> tuple[np.ndarray, float]:
  """Rounds a matrix to the nearest values of its groups, along the inputs; the last may be short.

  Returns:
    The decoded matrix and its bits.
  """
  parts = [weights[:, begin : begin + group] for begin in range(0, weights.shape[1], group)]
  decoded = [fitted(part, bits, clip_search).rounded(part) for part in parts]
  return np.concatenate(decoded, axis=1), stored_bits(weights.shape, bits, group)


def hqq(
  weights: Matrix, bits: int, group: int, axis: int, zero_bits: int = 16
) -> tuple[np.ndarray, float]:
  """Codes a matrix by HQQ.

  Args:
    weights: of as many elements as fill whole groups.
    bits: of a code.
    group: weights that share a scale and a zero.
    axis: 1 for groups along the inputs; 0 for HQQ's own groups, of every `size / group`-th weight.
    zero_bits: 16, or 8: then zeros are codes of one uniform grid a matrix, from the smallest to the
      largest zero, as with HQQ's `quant_zero`.

  Returns:
    The decoded matrix and its bits, with scales of 16 bits.
  """
  if weights.size % group:
    raise ValueError(f'weights: found {weights.size}, expected a multiple of {group}')
  groups = weights.reshape((group, -1) if axis == 0 else (-1, group))
  levels = 2**bits - 1
  low, high = groups.min(axis=axis, keepdims=True), groups.max(axis=axis, keepdims=True)
  scale = np.minimum(levels / np.maximum(high - low, 1 / _LARGEST_SCALE), _LARGEST_SCALE)
  zero = -low * scale
  if bits == 4:
    zero = np.round(zero)  # so does HQQ
  best, beta, chosen = np.inf, BETA, zero
  for _ in range(ITERATIONS):
    error, following = _hqq_step(groups, scale, zero, levels, beta, axis)
    if not float(error) < best:
      break
    best, chosen, zero = float(error), zero, following
    beta *= BETA_FACTOR
  scale = scale.astype(np.float16).astype(np.float32)
  chosen = np.asarray(chosen)
  zero_levels = 2**zero_bits - 1
  if zero_bits == 8:
    step = max(float(chosen.max() - chosen.min()) / zero_levels, float(np.finfo(np.float16).tiny))
    chosen = chosen.min() + step * np.round((chosen - chosen.min()) / step)
  else:
    chosen = chosen.astype(np.float16).astype(np.float32)
  codes = np.clip(np.round(groups * scale + chosen), 0, levels)
  stored = weights.size * bits + scale.size * (SCALE_BITS + zero_bits) + (zero_bits == 8) * 32
  return ((codes - chosen) / scale).astype(np.float32).reshape(weights.shape), float(stored)


@functools.partial(jax.jit, static_argnums=(3, 5))
def _hqq_step(
  groups: Array, scale: Array, zero: Array, levels: int, beta: float, axis: int
) -> tuple[Array, Array]:
  """Returns the error with a zero, and the next zero."""
  codes = jnp.clip(jnp.round(groups * scale + zero), 0, levels)
  residual = groups - (codes - zero) / scale
  size = jnp.abs(residual)
  # |x|^(p - 1) is infinite at 0, where nothing is left anyway
  kept = jnp.maximum(size - jnp.maximum(size, 1e-30) ** (P - 1) / beta, 0)
  shrunk = jnp.sign(residual) * kept
  following = jnp.mean(codes - (groups - shrunk) * scale, axis=axis, keepdims=True)
  return jnp.mean(size), following
