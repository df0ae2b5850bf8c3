"""Codes of one leaf, computed in pieces of one size: one compiled program, little memory."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int8, Shaped

from opq_jax import compression
from opq_jax.allocation import Allocation, LeafAllocation
from opq_jax.compression import LeafState
from opq_jax.compression.records import kinds_of
from opq_jax.file import writer
from opq_jax.report import leaf_sizes

_PIECE = 1 << 20  # weights coded at a time (4 MiB of float32): large enough to hide JAX's overhead

_kinds_of = jax.jit(kinds_of)


class CodedLeaf(NamedTuple):
  """A leaf and its codes.

  Attributes:
    record: its state, without the kinds of its weights.
    codes: its codes, in its shape.
    escaped: its escaped weights, in C order.
    largest: see `opq_jax.report.leaf_sizes.largest_on_grid`.
  """

  record: LeafState
  codes: Int8[np.ndarray, '...']
  escaped: Shaped[np.ndarray, ' m']
  largest: Float32[np.ndarray, ' channels']


def coded_leaf(
  name: str, array: Shaped[np.ndarray, '...'], allocated: LeafAllocation, axis: int
) -> CodedLeaf:
  """Codes a leaf like `opq_jax.encode(params, opq_jax.init_state(params, allocation))`.

  Args:
    name: the leaf's name, for error messages.
    array: its weights.
    allocated: its allocation.
    axis: the axis of its output channels.

  Raises:
    ValueError: the leaf is not of finite floats, or a grid is too fine for its dtype.
  """
  array = writer.host_array(name, array)
  # the grid of a leaf does not depend on its weights: the state of an empty leaf has it
  empty = dataclasses.replace(allocated, shape=(0,), channel_axis=0)
  tree = {name: np.zeros(0, array.dtype)}
  record = compression.init_state(tree, Allocation({name: empty})).tree[name]
  flat, codes = array.reshape(-1), np.empty(array.size, np.int8)
  # of a small leaf the next power of two: few sizes, few programs
  size = min(_PIECE, 1 << max(flat.size - 1, 0).bit_length())
  for start in range(0, flat.size, size):
    piece = flat[start : start + size]
    # padded with zeros, which every threshold prunes
    padded = np.pad(piece, (0, size - piece.size))
    kinds = _kinds_of(padded, record.threshold, record.step, record.levels)
    state = dataclasses.replace(record, kinds=np.asarray(kinds))
    codes[start : start + size] = writer.checked_codes(name, padded, state)[: piece.size]
  shaped = codes.reshape(array.shape)
  largest = leaf_sizes.largest_on_grid(array, shaped, axis)
  return CodedLeaf(record, shaped, writer.escaped_values(shaped, array), largest)
