"""The order of a kernel's axes in which its codes follow the trellis.

An encoder that pushes errors on codes one input after the other, and so does a payload of codes
along a trellis.  Where the inputs are not the first axes, as in kernels of outputs by inputs
(Equinox, PyTorch), the codes follow the trellis once the axes are moved.  A file then names the
order of the axes.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from opq_jax.coding import arrangements, trellis
from opq_jax.core.array_types import Int8

MAX_AXES = 5
"""Axes of an array that may be moved: outputs, inputs and a window of three axes."""

# codes but 0 that tell: as many follow the trellis by chance in one of 2**32 orders
_LEAST = 32
# codes that are looked at first: all orders but one leave the trellis within a few of them
_HEAD = 1 << 10

Axes = tuple[int, ...]


def of_trellis(codes: Int8[np.ndarray, '...']) -> Axes:
  """Returns the order of axes in which codes from -127 to 127 follow the trellis.

  The axes stay as they are where codes follow it in one of their own arrangements, or in no order,
  or are hardly any but 0.

  >>> state, codes = 0, []
  >>> for index in np.random.default_rng(0).integers(-2, 3, 96).tolist():
  ...   codes.append(2 * index - np.sign(index) * int(trellis.SUBSET_OF[state]))
  ...   state = trellis.NEXT[state, index & 1]
  >>> kernel = np.array(codes, np.int8).reshape(8, 12)
  >>> of_trellis(kernel), of_trellis(kernel.T)
  ((0, 1), (1, 0))
  """
  own = tuple(range(codes.ndim))
  if not 2 <= codes.ndim <= MAX_AXES or codes.size == 0:
    return own
  for arrangement in arrangements.choices(codes.shape):
    if trellis.indices_and_subsets(arrangements.arranged(codes, arrangement).kernel) is not None:
      return own
  if np.count_nonzero(codes) < _LEAST:
    return own
  for axes in _orders(codes.ndim):
    moved = codes.transpose(axes)
    if not arrangements.choices(moved.shape):
      continue
    if trellis.indices_and_subsets(moved.flat[:_HEAD]) is None:
      continue
    # in C order, which three of the four arrangements have
    if trellis.indices_and_subsets(np.ascontiguousarray(moved)) is not None:
      return axes
  return own


def inverse(axes: Axes) -> Axes:
  """Returns the order that undoes an order.

  >>> inverse((2, 0, 1))
  (1, 2, 0)
  """
  return tuple(np.argsort(axes).tolist())


def _orders(count: int) -> Iterator[Axes]:
  """Yields all orders of axes but the own one, those of PyTorch's convolutions first."""
  # first, since an axis of length 1 may stand anywhere in C order, and belongs to the window
  window = tuple(range(2, count))
  likely = [(*window, 1, 0), (*window, 0, 1)]
  own = tuple(range(count))
  yield from (
    axes for axes in dict.fromkeys([*likely, *itertools.permutations(own)]) if axes != own
  )
