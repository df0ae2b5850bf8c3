"""Choice of the leaves that are compressed, and of their output channels."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

_MAX_LISTED = 10  # paths in the error of a tree that has nothing to compress


def is_compressible(path: str, leaf: Any) -> bool:
  """Returns whether a leaf is compressed by default: floats of two or more dimensions.

  A dtype needs a byte or more and a mantissa of two bits or more: float8_e8m0fnu holds scales, and
  a float4 is smaller than a code.

  >>> is_compressible('params/kernel', jnp.zeros((3, 2))), is_compressible('bias', jnp.zeros(2))
  (True, False)
  """
  del path
  # np.ndim also works on LeafStatistics and on leaves that are still on disk
  if np.ndim(leaf) < 2 or not _is_floating(leaf):
    return False
  dtype = jnp.finfo(leaf.dtype)
  return bool(dtype.bits >= 8 and dtype.nmant >= 2)


def choose_leaves(named: dict[str, Any], compressible: Callable[[str, Any], bool]) -> list[str]:
  """Returns the paths of the leaves to compress; leaves without elements are left out.

  Args:
    named: leaves by path.
    compressible: (path, leaf) -> whether the leaf is compressed.

  Raises:
    ValueError: the choice is empty, or a chosen leaf is a scalar or not floating.
  """
  if not named:
    raise ValueError('params: found an empty tree, expected at least one array')
  chosen = []
  for name, leaf in named.items():
    if not compressible(name, leaf) or np.size(leaf) == 0:
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
      'expected at least one floating leaf of two or more dimensions'
    )
  return chosen


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
