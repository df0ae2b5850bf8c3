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
from opq_jax.network.views import REPEATED, Axis

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


class Reading(NamedTuple):
  """How a product reads its rows; equal, and so one compiled program, for layers that are alike.

  Attributes:
    axes: of the leaf, as the operation sees it.
    contracted: axes of the leaf's operand over which the operation sums; of a convolution, those of
      the window first.
    others: the same axes of the other operand, of a dot.
    batch: axes of the other operand that are slices, in the order of the leaf's.
    convolution: parameters of a convolution, or None.
  """

  axes: tuple[Axis, ...]
  contracted: tuple[int, ...]
  others: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  convolution: '_Convolution | None' = None


class _Convolution(NamedTuple):
  """Parameters of a convolution, as `jax.lax.conv_general_dilated` has them.

  Attributes:
    layout: axes of the images: batch, channels, then space.
    window: shape of the window.
    places: of the window, in one image.
  """

  layout: tuple[int, ...]
  window: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  stretch: tuple[int, ...]
  dilation: tuple[int, ...]
  groups: int
  places: int


def reading_of(product: Product) -> Reading:
  """Returns how a dot or a convolution with a leaf reads its rows."""
  parameters, axes = product.equation.params, product.view.axes
  if product.operation == 'dot_general':
    contracted, batch = parameters['dimension_numbers']
    ours, other = product.operand, 1 - product.operand
    order = np.argsort([axes[axis][0].axis for axis in batch[ours]])
    slices = tuple(batch[other][place] for place in order)
    return Reading(axes, tuple(contracted[ours]), tuple(contracted[other]), slices)
  numbers, kernel = parameters['dimension_numbers'], product.values[product.operand]
  _, of_inputs, *spatial = numbers.rhs_spec
  output = product.equation.outvars[0].aval
  convolution = _Convolution(
    tuple(numbers.lhs_spec),
    tuple(kernel.shape[axis] for axis in spatial),
    tuple(parameters['window_strides']),
    tuple(map(tuple, parameters['padding'])),
    tuple(parameters['lhs_dilation']),
    tuple(parameters['rhs_dilation']),
    parameters['feature_group_count'],
    math.prod(output.shape[axis] for axis in numbers.out_spec[2:]),
  )
  return Reading(axes, (*spatial, of_inputs), convolution=convolution)


def sums_of(reading: Reading, inputs: Array, other_inputs: Array | None = None) -> Sums:
  """Returns the sum of x^T x over all rows of a product with a leaf.

  Args:
    reading: of an exact product, whose slices are leading axes of the leaf.
    inputs: the operand that is multiplied with the leaf.
    other_inputs: of the same shape: the sum is then that of x^T y, with y the rows of this.
  """
  both = [array.astype(jnp.float32) for array in (inputs, other_inputs) if array is not None]
  sums = (_of_dot if reading.convolution is None else _of_convolution)(reading, both)
  order = order_of(reading)
  if order is None:
    return sums
  places = np.array(order)
  return sums._replace(total=sums.total[..., places, :][..., places])


def _of_dot(reading: Reading, both: list[Array]) -> Sums:
  theirs, slices = reading.others, reading.batch
  rest = [axis for axis in range(both[0].ndim) if axis not in (*theirs, *slices)]
  shape = [both[0].shape[axis] for axis in slices]
  width = math.prod(both[0].shape[axis] for axis in theirs)
  rows = [array.transpose(*slices, *rest, *theirs).reshape(*shape, -1, 1, width) for array in both]
  return Sums(_gram_of_rows(rows[0], rows[-1]), rows[0].shape[-3])


def _of_convolution(reading: Reading, both: list[Array]) -> Sums:
  convolution = reading.convolution
  assert convolution is not None
  window, dilation, groups = convolution.window, convolution.dilation, convolution.groups
  images = [
    jnp.moveaxis(x, convolution.layout, (0, x.ndim - 1, *range(1, x.ndim - 1))) for x in both
  ]
  reach = [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]
  # a transposed convolution reads its inputs with zeros between them
  pads = [
    (*sides, step - 1) for sides, step in zip(convolution.padding, convolution.stretch, strict=True)
  ]

  def taps(image: Float32[Array, '... channels']) -> list[Float32[Array, 'places groups channels']]:
    """Returns, for every tap of the window, its inputs at all places."""
    padded = lax.pad(image, jnp.float32(0), (*pads, (0, 0, 0)))
    places = [
      (size - width) // stride + 1
      for size, width, stride in zip(padded.shape[:-1], reach, convolution.strides, strict=True)
    ]
    tap_inputs = []
    for tap in np.ndindex(*window):
      start = [i * step for i, step in zip(tap, dilation, strict=True)]
      limit = [
        begin + (count - 1) * stride + 1
        for begin, count, stride in zip(start, places, convolution.strides, strict=True)
      ]
      channels = padded.shape[-1]
      part = lax.slice(padded, (*start, 0), (*limit, channels), (*convolution.strides, 1))
      tap_inputs.append(part.reshape(-1, groups, channels // groups))
    return tap_inputs

  # image after image, so that only one is ever written out as its windows
  def add(total: Array, images: list[Array]) -> tuple[Array, None]:
    windows = [taps(image) for image in images]
    return total + _gram_of_taps(windows[0], windows[-1]), None

  width = math.prod(window) * images[0].shape[-1] // groups
  total, _ = lax.scan(add, jnp.zeros((groups, width, width), jnp.float32), images)
  return Sums(total, convolution.places * images[0].shape[0])


def inputs_of(reading: Reading) -> tuple[int, ...]:
  """Returns the axes of the leaf that a product sums over, in the order of K.

  Ascending; of a convolution those of the window first, wherever they stand in the leaf: a kernel
  [outputs, inputs, 3, 3] is read as [3, 3, inputs, outputs] is.
  """
  found = (factor.axis for axis in reading.contracted for factor in reading.axes[axis])
  axes = tuple(dict.fromkeys(axis for axis in found if axis != REPEATED))
  return tuple(sorted(axes)) if reading.convolution is None else axes


def order_of(reading: Reading) -> tuple[int, ...] | None:
  """Returns which of an operation's inputs comes first in the order of K (`inputs_of`), and so on.

  None where both have one order.
  """
  inputs = inputs_of(reading)
  factors = [factor for axis in reading.contracted for factor in reading.axes[axis]]
  lengths: dict[int, int] = {}
  for factor in factors:
    lengths[factor.axis] = lengths.get(factor.axis, 1) * factor.size
  # where each input lies along the leaf's axes
  place = np.zeros([factor.size for factor in factors], np.int64)
  for number, factor in enumerate(factors):
    steps = np.arange(factor.size)
    if factor.stride < 0:
      steps = steps[::-1]
    later = inputs[inputs.index(factor.axis) + 1 :] if factor.axis in inputs else inputs
    after = math.prod(lengths[axis] for axis in later)
    along = [1] * len(factors)
    along[number] = factor.size
    place += (steps * abs(factor.stride) * after).reshape(along)
  order = np.argsort(place.reshape(-1))
  return None if np.array_equal(order, np.arange(len(order))) else tuple(order.tolist())


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
