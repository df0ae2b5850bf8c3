"""The second moments of each layer's inputs, from calibration inputs or without any data.

A layer's output is y = x W, row by row of x: a window of a convolution, an example of a dense
layer. Under other weights Q, its squared error depends on the inputs by one matrix alone,

    E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))          H = E[x^T x]

and this matrix is all that error feedback (`opq_jax.encoders.Feedback`) needs to know.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

MAX_INPUTS = 4608
"""Inputs of one output, K: those of a 3 x 3 window over 512 channels, whose matrix takes 85 MB."""

# taps of a depthwise window, up to which every pair of taps has a loop of its own: 45 loops for a
# 3 x 3 window; the program grows with the square of the taps
_FEW_TAPS = 9


@functools.partial(jax.jit, static_argnums=0)
def second_moments(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> PyTree:
  """Returns the second moments H = E[x^T x] of the inputs of every convolution and dense layer.

  A row x holds the K numbers that one output is a weighted sum of, in the order of the kernel:
  rows, columns and input channels of the window.  The expectation is over the examples and, of a
  convolution, over all places of the window, with the zeros that it sees beyond the border.

  A network with BatchNorm runs on batch statistics, as in `opq_jax.correction.correct_batch_norm`:
  then every layer sees, per channel, the first two moments that it had in training, even if the
  inputs are noise.  Noise does not know how channels and neighbours go together;
  `opq_jax.correction.natural_noise` knows it of the neighbours, and
  `opq_jax.correction.synthetic_inputs` knows much of both.

  Args:
    apply_fn: `model.apply` of a Flax Linen module; called as `apply_fn(variables, x)` or, if there
      are `batch_stats`, as `apply_fn(variables, x, train=True, mutable=['batch_stats'])`.
      Compiled once for each such function.
    variables: the variables of the network.
    inputs: a batch, prepared as the network expects it, or synthetic, or noise.

  Returns:
    The tree of the variables with a matrix [groups, K, K] in float32 at the kernel of every
    `nn.Dense` and `nn.Conv`, and None elsewhere.  A depthwise convolution has as many groups as
    channels, all others one.  None too where one output has more than `MAX_INPUTS` inputs, or where
    a convolution pads otherwise than with zeros or dilates its input.

  Raises:
    ValueError: a layer is called twice.

  >>> import flax.linen as nn
  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(3, name='head')(x)
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> variables = Network().init(jax.random.key(0), x)
  >>> second_moments(Network().apply, variables, x)['params']['head']['kernel'].tolist()
  [[[5.0, 1.0], [1.0, 2.0]]]
  """
  import flax.linen as nn

  leaves = trees.named_leaves(variables)
  moments: dict[str, Array | None] = {}

  def measure(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    name = '/'.join(('params', *module.path, 'kernel'))
    is_layer = isinstance(module, nn.Conv | nn.Dense) and name in leaves
    if context.method_name == '__call__' and is_layer:
      if name in moments:
        raise ValueError(f'{name}: found a layer that is called twice, expected once')
      moments[name] = layer_moments(module, args[0] if args else kwargs['inputs'])
    return call(*args, **kwargs)

  with nn.intercept_methods(measure):
    if trees.named_leaves(variables.get('batch_stats', {})):
      apply_fn(variables, inputs, train=True, mutable=['batch_stats'])
    else:
      apply_fn(variables, inputs)
  return jax.tree.unflatten(jax.tree.structure(variables), [moments.get(name) for name in leaves])


def mean_moments(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
) -> PyTree:
  """Returns the second moments over several batches of one size: the mean of `second_moments`.

  Raises:
    ValueError: as `second_moments`, or there is no batch.
  """
  total, count = None, 0
  for batch in batches:
    moments = second_moments(apply_fn, variables, batch)
    total = moments if total is None else _sum(total, moments)
    count += 1
  if total is None:
    raise ValueError('batches: found none, expected at least one')
  return _divided(total, count)


@jax.jit
def _sum(one: PyTree, other: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, one, other)


@jax.jit
def _divided(total: PyTree, count: Array) -> PyTree:
  return jax.tree.map(lambda matrix: matrix / count, total)


def layer_moments(
  module: Any,
  inputs: Float[Array, '*batch channels'],
  other_inputs: Float[Array, '*batch channels'] | None = None,
) -> Float32[Array, 'groups K K'] | None:
  """Returns E[x^T x] of a layer's inputs x, or E[x^T y] with other inputs y of the same shape.

  Args:
    module: an `nn.Dense` or `nn.Conv`.
    inputs: x, as the module is given them.
    other_inputs: y; by default x.

  Returns:
    A matrix for each group, or None: see `second_moments`.
  """
  import flax.linen as nn

  # x, and y where it is another; `[0]` is x and `[-1]` is y
  both = [array.astype(jnp.float32) for array in (inputs, other_inputs) if array is not None]
  if isinstance(module, nn.Dense):
    if inputs.shape[-1] > MAX_INPUTS:
      return None
    rows = [[array.reshape(-1, 1, array.shape[-1])] for array in both]
    return _gram(rows[0], rows[-1]) / len(rows[0][0])

  window = _per_axis(module.kernel_size, 1)
  rank = len(window)
  groups = module.feature_group_count
  padding = module.padding
  is_plain = not isinstance(padding, str) or padding in ('SAME', 'VALID')
  is_dilated = set(_per_axis(module.input_dilation, rank)) != {1}
  # kernels read zeros alone beyond the border; circular and reflecting inputs would have other
  # moments
  if not is_plain or is_dilated or math.prod(window) * inputs.shape[-1] // groups > MAX_INPUTS:
    return None
  strides = _per_axis(module.strides, rank)
  dilation = _per_axis(module.kernel_dilation, rank)
  stacks = [array.reshape(-1, *array.shape[-rank - 1 :]) for array in both]
  images = stacks[0]
  reach = tuple((size - 1) * step + 1 for size, step in zip(window, dilation, strict=True))
  if isinstance(padding, str):
    pads = lax.padtype_to_pads(images.shape[1:-1], reach, strides, padding)
  else:
    sides = (padding,) * rank if isinstance(padding, int) else padding
    pads = [(side, side) if isinstance(side, int) else tuple(side) for side in sides]

  def taps(image: Float32[Array, '... channels']) -> list[Float32[Array, 'places groups channels']]:
    """Returns, for every tap of the window, its inputs at all places."""
    padded = jnp.pad(image, (*pads, (0, 0)))
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
    return total + _gram(windows[0], windows[-1]), None

  tap_shapes = jax.eval_shape(taps, images[0])
  width = len(tap_shapes) * tap_shapes[0].shape[2]
  total, _ = lax.scan(add, jnp.zeros((groups, width, width), jnp.float32), stacks)
  return total / (len(tap_shapes[0]) * len(images))


def _gram(
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
  # in full float32: by default GPUs and TPUs would round the inputs, and H must stay definite
  return jnp.einsum('ngk,ngl->gkl', *rows, precision=lax.Precision.HIGHEST)


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
  """Returns one number for each spatial axis: Flax takes None, a number, or several."""
  if value is None or isinstance(value, int):
    return (value or 1,) * rank
  return tuple(value)
