"""Choice of the leaves that are compressed, and of their output channels."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax.allocation.buffers import is_buffer
from opq_jax.allocation.leaf_names import biases_beside_kernels, kind_of_name
from opq_jax.allocation.optimizer_states import is_in_optimizer, optimizer_leaves
from opq_jax.allocation.statistics import check_slices
from opq_jax.core import axes, messages
from opq_jax.core.axes import ChannelAxes

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
            the tree tells: `b` beside `w`, and `mu` beside `nu`; and what the values tell: masks of
            0 and 1, or of 0 and -infinity (`opq_jax.allocation.buffers`)

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
      that the rest of the tree or their values tell to be no matrices are left out too
      (`left_by_place`, `is_buffer`).

  Raises:
    ValueError: the choice is empty; a chosen leaf is a scalar, not floating, or of float64 where
      JAX has none; or a leaf has no values: a function, or the shape of an array.

  Warns:
    UserWarning: a leaf is a key of random numbers, which no file can hold; or is left out for its
      values.
  """
  if not named:
    raise ValueError('params: found an empty tree, expected at least one array')
  _check_values(named)
  chosen, buffers = [], []
  left = left_by_place(named) if compressible is is_compressible else set()
  for name, leaf in named.items():
    if name in left or not compressible(name, leaf) or np.size(leaf) == 0:
      continue
    if compressible is is_compressible and is_buffer(leaf):
      buffers.append(name)
      continue
    if not _is_floating(leaf):
      kind = getattr(leaf, 'dtype', type(leaf).__name__)
      raise ValueError(f'{name}: found {kind}, expected a floating dtype to compress')
    if np.ndim(leaf) == 0:
      raise ValueError(f'{name}: found a scalar, expected at least one dimension to compress')
    if leaf.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
      raise ValueError(
        f'{name}: found float64, which JAX makes float32, expected {name}.astype(np.float32), or '
        "jax.config.update('jax_enable_x64', True)"
      )
    chosen.append(name)
  if buffers:
    messages.warn(
      f'{messages.listed(buffers, _MAX_LISTED)}: found masks by their values, of 0 and 1, or of 0 '
      'and numbers that stand for -infinity: they pass through as they are'
    )
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


def axis_of(
  name: str,
  leaf: Any,
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes],
  slices: int = 0,
) -> ChannelAxes:
  """Returns the axis of a leaf's output channels, or several, checked.

  Args:
    name: the leaf's path.
    leaf: the leaf.
    channel_axis: the axis, a tuple of several, or (path, leaf) -> axis.
    slices: leading axes that count slices.

  Raises:
    ValueError: the leaf has no such axis, or it counts slices; or no axis is left for the weights
      of a channel.
  """
  axis = channel_axis(name, leaf) if callable(channel_axis) else channel_axis
  try:
    axes.numbers_of(axis, leaf.ndim)
  except ValueError as error:
    raise ValueError(
      f'{name}: found channel_axis {axis}, expected an axis of shape {leaf.shape}'
    ) from error
  with _named(name):
    check_slices(tuple(leaf.shape), axis, slices)
  return axis


def _check_values(named: dict[str, Any]) -> None:
  """Checks that leaves have values; scalars of Python and the like pass through."""
  keys = []
  for name, leaf in named.items():
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise ValueError(f'{name}: found a shape without values ({leaf}), expected an array')
    if callable(leaf) and not hasattr(leaf, 'dtype'):
      raise ValueError(
        f'{name}: found {getattr(leaf, "__name__", type(leaf).__name__)}, a function, expected '
        'arrays only: partition the module, eqx.partition(module, eqx.is_array)'
      )
    if jnp.issubdtype(getattr(leaf, 'dtype', np.int8), jax.dtypes.prng_key):
      keys.append(name)
  if keys:
    messages.warn(
      f'{", ".join(keys[:_MAX_LISTED])}: found keys of random numbers, which pass through but '
      'which opq_jax.save refuses: save the tree without them'
    )


def slices_of(name: str, leaf: Any, slices: Callable[[str, Any], int] | None) -> int:
  """Returns how many leading axes of a leaf count slices, checked.

  Args:
    name: the leaf's path.
    leaf: the leaf.
    slices: (path, leaf) -> number of axes; None for none.

  Raises:
    ValueError: no axis is left for a slice.
  """
  count = 0 if slices is None else int(slices(name, leaf))  # files know no booleans
  with _named(name):
    check_slices(tuple(leaf.shape), -1, count)
  return count


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Puts a leaf's path in front of a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error


def _is_floating(leaf: Any) -> bool:
  return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)
