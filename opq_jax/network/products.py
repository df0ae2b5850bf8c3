"""The rows that a product sums over, and their second moments.

A dot or a convolution with a kernel W is y = x W, row by row of x.  Here x is taken from the other
operand, whatever its layout, and E[x^T x] is brought into the order of the kernel's own axes.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from opq_jax.network.interpreter import Product

# taps of a depthwise window, up to which every pair of taps has a loop of its own: 45 loops for a
# 3 x 3 window; the program grows with the square of the taps
_FEW_TAPS = 9

Matrix = Float32[Array, '*slices groups K K']


class Sums(NamedTuple):
  """Sums over rows.

  Attributes:
    total: sum of x^T x, or of x^T y.
    rows: how many rows.
  """

  total: Matrix
  rows: int | Array


def sums_of(product: Product, inputs: Array, other_inputs: Array | None = None) -> Sums:
  """Returns the sum of x^T x over all rows of a product with a leaf.

  Args:
    product: an exact dot or convolution, whose slices are leading axes of the leaf.
    inputs: the operand that is multiplied with the leaf.
    other_inputs: of the same shape: the sum is then that of x^T y, with y the rows of this.
  """
  both = [array.astype(jnp.float32) for array in (inputs, other_inputs) if array is not None]
  of_kind = _of_dot if product.operation == 'dot_general' else _of_convolution
  return of_kind(product, both)


def _of_dot(product: Product, both: list[Array]) -> Sums:
  contracted, batch = product.equation.params['dimension_numbers']
  ours, other = product.operand, 1 - product.operand
  theirs = contracted[other]
  # slices in the order of the leaf's axes
  order = np.argsort([product.view.axes[axis][0].axis for axis in batch[ours]])
  slices = [batch[other][i] for i in order]
  rest = [axis for axis in range(both[0].ndim) if axis not in (*theirs, *slices)]
  shape = [both[0].shape[axis] for axis in slices]
  width = math.prod(both[0].shape[axis] for axis in theirs)
  rows = [array.transpose(*slices, *rest, *theirs).reshape(*shape, -1, 1, width) for array in both]
  return Sums(_in_leaf_order(product, _gram_of_rows(rows[0], rows[-1])), rows[0].shape[-3])


def _of_convolution(product: Product, both: list[Array]) -> Sums:
  parameters, kernel = product.equation.params, product.values[product.operand]
  numbers = parameters['dimension_numbers']
  _, _of_inputs, *spatial = numbers.rhs_spec
  window = [kernel.shape[axis] for axis in spatial]
  groups = parameters['feature_group_count']
  strides, dilation = parameters['window_strides'], parameters['rhs_dilation']
  images = [jnp.moveaxis(x, numbers.lhs_spec, (0, -1, *range(1, x.ndim - 1))) for x in both]
  reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]
  # a transposed convolution reads its inputs with zeros between them
  pads = [
    (*sides, step - 1)
    for sides, step in zip(parameters['padding'], parameters['lhs_dilation'], strict=True)
  ]

  def taps(image: Float32[Array, '... channels']) -> list[Float32[Array, 'places groups channels']]:
    """Returns, for every tap of the window, its inputs at all places."""
    padded = lax.pad(image, jnp.float32(0), (*pads, (0, 0, 0)))
    places = [
      (size - width) // stride + 1
      for size, width, stride in zip(padded.shape[:-1], reach, strides, strict=True)
    ]
    tap_inputs = []
    for tap in np.ndindex(*window):
      start = [i * step for i, step in zip(tap, dilation, strict=True)]
      limit = [
        begin + (count - 1) * stride + 1
        for begin, count, stride in zip(start, places, strides, strict=True)
      ]
      channels = padded.shape[-1]
      part = lax.slice(padded, (*start, 0), (*limit, channels), (*strides, 1))
      tap_inputs.append(part.reshape(-1, groups, channels // groups))
    return tap_inputs

  # image after image, so that only one is ever written out as its windows
  def add(total: Array, images: list[Array]) -> tuple[Array, None]:
    windows = [taps(image) for image in images]
    return total + _gram_of_taps(windows[0], windows[-1]), None

  width = math.prod(window) * images[0].shape[-1] // groups
  total, _ = lax.scan(add, jnp.zeros((groups, width, width), jnp.float32), images)
  places = math.prod(product.equation.outvars[0].aval.shape[axis] for axis in numbers.out_spec[2:])
  return Sums(_in_leaf_order(product, total), places * images[0].shape[0])


def order_of(product: Product) -> tuple[int, ...] | None:
  """Returns which of an operation's inputs comes first in the leaf's order, and so on.

  None where both have one order.
  """
  parameters = product.equation.params
  if product.operation == 'dot_general':
    contracted = parameters['dimension_numbers'][0][product.operand]
  else:
    _, of_inputs, *spatial = parameters['dimension_numbers'].rhs_spec
    contracted = (*spatial, of_inputs)
  factors = [factor for axis in contracted for factor in product.view.axes[axis]]
  lengths: dict[int, int] = {}
  for factor in factors:
    lengths[factor.axis] = lengths.get(factor.axis, 1) * factor.size
  # where each input lies along the leaf's axes
  place = np.zeros([factor.size for factor in factors], np.int64)
  for number, factor in enumerate(factors):
    steps = np.arange(factor.size)
    if factor.stride < 0:
      steps = steps[::-1]
    after = math.prod(length for axis, length in lengths.items() if axis > factor.axis)
    along = [1] * len(factors)
    along[number] = factor.size
    place += (steps * abs(factor.stride) * after).reshape(along)
  order = np.argsort(place.reshape(-1))
  return None if np.array_equal(order, np.arange(len(order))) else tuple(order.tolist())


def _in_leaf_order(product: Product, matrix: Matrix) -> Matrix:
  """Returns a matrix with its inputs in the order of the leaf's axes."""
  order = order_of(product)
  if order is None:
    return matrix
  places = np.array(order)
  return matrix[..., places, :][..., places]


def _gram_of_taps(
  first: list[Float32[Array, 'places groups channels']],
  second: list[Float32[Array, 'places groups channels']],
) -> Float32[Array, 'groups K K']:
  """Returns the sums over all places of x^T y, for windows x and y given tap by tap."""
  if first[0].shape[2] == 1 < first[0].shape[1] and len(first) <= _FEW_TAPS:
    # a depthwise window: loops over vectors of channels, without an array of all windows
    x, y = ([tap[..., 0] for tap in taps] for taps in (first, second))
    sums: dict[tuple[int, int], Array] = {}
    for i, j in itertools.product(range(len(x)), repeat=2):
      is_known = second is first and j < i
      sums[i, j] = sums[j, i] if is_known else jnp.sum(x[i] * y[j], axis=0)
    return jnp.stack(list(sums.values()), axis=-1).reshape(-1, len(x), len(x))
  rows = [jnp.concatenate(taps, axis=2) for taps in (first, second)]
  return _gram_of_rows(rows[0], rows[1])


def _gram_of_rows(first: Array, second: Array) -> Matrix:
  # in full float32: by default GPUs and TPUs would round the inputs, and H must stay definite
  return jnp.einsum('...ngk,...ngl->...gkl', first, second, precision=lax.Precision.HIGHEST)
