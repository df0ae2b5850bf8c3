r"""Rotations of a leaf's inputs by random signs and Hadamard matrices, undone by the decoder.

Of a leaf W with n inputs, and 2^k the largest power of two that is not above n, the rotation is

    Q = S_1 A S_2 B

where B multiplies the last 2^k inputs by the Hadamard matrix 2^(-k/2) H_k and leaves the others, A
does so with the first 2^k inputs, and S_1 and S_2 are diagonals of signs.  Where n is 2^k, Q is S_1
A alone.  The codes of the leaf are those of Q^T W, and its values Q times the values of the codes.

Q is orthogonal, so squared errors stay, and multiplying takes additions alone: all operations are
those of float32 in a fixed order, and the values are the same whoever computes them.

Why rotate: under error feedback an error in input i costs 1 / U_ii^2, with H^-1 = U^T U (see
`opq_jax.encoders.Feedback`).  One step for all inputs makes the arithmetic mean of these costs,
and their geometric mean, det(H)^(1/n), is the same for all rotations of the inputs: what a rotation
takes from the ratio of both means is won.  A few inputs with massive activations make this ratio
large; under a rotation all inputs have about the same energy.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from opq_jax.core.array_types import Float32, Shaped

_PIECE = 1 << 16  # weights that are rotated at a time: 256 KB, which stay in the processor's cache


def signs(count: int, start: int = 0) -> Float32[np.ndarray, ' count']:
  """Returns the signs number start, start + 1, ...: -1 where the highest bit of a hash is set.

  The hash of the number i is that of MurmurHash3's end, of i + 1 in 32 bits.

  >>> signs(12).tolist()
  [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
  """
  hashed = np.arange(start + 1, start + count + 1, dtype=np.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    hashed ^= hashed >> np.uint32(shift)
    hashed *= np.uint32(factor)
  return np.where(hashed >> np.uint32(31), np.float32(-1), np.float32(1))


def restored(values: Shaped[np.ndarray, '...'], axis: int) -> Float32[np.ndarray, '...']:
  """Returns Q W of W, along an axis, in float32.

  Args:
    values: W.
    axis: of the n inputs.

  >>> rows = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  >>> bool(np.abs(restored(rotated(rows, 0), 0) - rows).max() < 1e-6)
  True
  """
  return _along(values, axis, _restore)


def rotated(weights: Shaped[np.ndarray, '...'], axis: int) -> Float32[np.ndarray, '...']:
  """Returns Q^T W of W, along an axis, in float32; arguments as of `restored`."""
  return _along(weights, axis, _rotate)


def _along(
  array: Shaped[np.ndarray, '...'], axis: int, change: Callable[[Any], None]
) -> Float32[np.ndarray, '...']:
  """Changes [inputs, ...] in place, some of the other axes at a time."""
  moved = np.moveaxis(array, axis, 0)
  inputs, others = len(moved), moved.shape[1:]
  rows = moved.reshape(inputs, math.prod(others))
  result = np.empty(rows.shape, np.float32)
  columns = max(_PIECE // max(inputs, 1), 1)
  for start in range(0, rows.shape[1] if inputs else 0, columns):
    part = np.array(rows[:, start : start + columns], np.float32, order='C')
    change(part)
    result[:, start : start + columns] = part
  return np.ascontiguousarray(np.moveaxis(result.reshape(inputs, *others), 0, axis))


def _restore(rows: Float32[np.ndarray, 'inputs n']) -> None:
  inputs = len(rows)
  size = _power(inputs)
  if size < inputs:
    _hadamard(rows[inputs - size :])
    rows *= signs(inputs, inputs)[:, None]
  _hadamard(rows[:size])
  rows *= signs(inputs)[:, None]


def _rotate(rows: Float32[np.ndarray, 'inputs n']) -> None:
  inputs = len(rows)
  size = _power(inputs)
  rows *= signs(inputs)[:, None]
  _hadamard(rows[:size])
  if size < inputs:
    rows *= signs(inputs, inputs)[:, None]
    _hadamard(rows[inputs - size :])


def _power(inputs: int) -> int:
  """Returns the largest power of two that is not above a positive number."""
  return 1 << (inputs.bit_length() - 1)


def _hadamard(rows: Float32[np.ndarray, 'inputs n']) -> None:
  """Multiplies rows, as many as a power of two, by the orthonormal Hadamard matrix, in place."""
  size, half = len(rows), 1
  while half < size:
    pairs = rows.reshape(size // (2 * half), 2, half, -1)
    first, second = pairs[:, 0], pairs[:, 1]
    total = first + second
    np.subtract(first, second, out=second)
    first[...] = total
    half *= 2
  rows *= np.float32(1 / math.sqrt(size))
