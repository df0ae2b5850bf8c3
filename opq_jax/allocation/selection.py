"""Choice of the leaves that are compressed, and of their output channels."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from opq_jax.allocation.leaf_names import biases_beside_kernels, kind_of_name
from opq_jax.allocation.optimizer_states import is_in_optimizer, optimizer_leaves

_MAX_LISTED = 10  # paths in the error of a tree that has nothing to compress


def is_compressible(path: str, leaf: Any) -> bool:
  """Returns whether a leaf is compressed by default, by its name and its shape.

  A leaf is compressed where all of these hold:

    dtype   floating, of a byte or more and of two bits of mantissa or more: float8_e8m0fnu holds
            scales, and a float4 is smaller than a code
    shape   two axes or more are longer than 1: (1, 1, dim) and (channels, 1, 1) are vectors
    name    it is not that of a bias, a normalization's scale, a mask, a running statistic, a table
            of positions, ... (`opq_jax.allocation.leaf_names`, a table of regular expressions)
    place   it is not in an optimizer's state: no part of its path is `opt_state`, `optimizer`, ...
            (`opq_jax.allocation.optimizer_states`).  `allocate` also leaves out what the rest of
            the tree tells: `b` beside `w`, and `mu` beside `nu`

  >>> kernel, stacked = jnp.zeros((3, 2)), jnp.zeros((12, 64))
  >>> is_compressible('params/kernel', kernel), is_compressible('layers/bias', stacked)
  (True, False)
  """
  return can_be_compressed(leaf) and kind_of_name(path) is None and not is_in_optimizer(path)


def can_be_compressed(leaf: Any) -> bool:
  """Returns whether a leaf is a matrix of floats, or of more axes, whatever its name says."""
  # np.shape also works on LeafStatistics and on leaves that are still on disk
  if sum(length > 1 for length in np.shape(leaf)) < 2 or not _is_floating(leaf):
    return False
  dtype = jnp.finfo(leaf.dtype)
  return bool(dtype.bits >= 8 and dtype.nmant >= 2)


def choose_leaves(named: dict[str, Any], compressible: Callable[[str, Any], bool]) -> list[str]:
  """Returns the paths of the leaves to compress; leaves without elements are left out.

  Args:
    named: leaves by path.
    compressible: (path, leaf) -> whether the leaf is compressed.  With `is_compressible`, leaves
      that the rest of the tree tells to be no matrices are left out too (`left_by_place`).

  Raises:
    ValueError: the choice is empty, or a chosen leaf is a scalar or not floating.
  """
  if not named:
    raise ValueError('params: found an empty tree, expected at least one array')
  chosen = []
  left = left_by_place(named) if compressible is is_compressible else set()
  for name, leaf in named.items():
    if name in left or not compressible(name, leaf) or np.size(leaf) == 0:
      continue
    if not _is_floating(leaf):
      kind = getattr(leaf, 'dtype', type(leaf).__name__)
      raise ValueError(f'{name}: found {kind}, expected a floating dtype to compress')
    if np.ndim(leaf) == 0:
      raise ValueError(f'{name}: found a scalar, expected at least one dimension to compress')
    chosen.append(name)
  if not chosen:
    raise ValueError(
      f'params: found no leaf to compress among {list(named)[:_MAX_LISTED]}, '
      'expected at least one floating matrix that is no bias, scale, mask, ... by its name '
      '(opq_jax.allocation.is_compressible), or a choice of your own: compressible='
    )
  return chosen


def left_by_place(named: dict[str, Any]) -> set[str]:
  """Returns the leaves that are no matrices of a network, by the leaves that stand beside them.

  >>> sorted(left_by_place({'net/w': np.zeros((4, 3, 2)), 'net/b': np.zeros((4, 2))}))
  ['net/b']
  """
  return {*optimizer_leaves(named), *biases_beside_kernels(named)}


def axis_of(name: str, leaf: Any, channel_axis: int | Callable[[str, Any], int]) -> int:
  """Returns the axis of a leaf's output channels, checked.

  Raises:
    ValueError: the leaf has no such axis.
  """
  axis = channel_axis(name, leaf) if callable(channel_axis) else channel_axis
  if not -leaf.ndim <= axis < leaf.ndim:
    raise ValueError(f'{name}: found channel_axis {axis}, expected an axis of shape {leaf.shape}')
  return axis


def _is_floating(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)
