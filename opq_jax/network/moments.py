"""The second moments of what every layer of a network reads, from images or without any.

A layer's output is y = x W, row by row of x: a pixel's window of a convolution, an example of a
dense layer.  Of the inputs, its squared error under other weights Q depends on one matrix alone,

    E |x W - x Q|^2 = tr((W - Q)^T H (W - Q))          H = E[x^T x]

and that matrix is all that error feedback (`opq_jax.encoders.Feedback`) needs to know.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from opq_jax.core import trees
from opq_jax.core.trees import PyTree

MAX_INPUTS = 4608  # of one output: 3 x 3 x 512, whose matrix has 85 MB
_FEW_TAPS = 9  # of a depthwise window, each pair of which is a loop of its own


@functools.partial(jax.jit, static_argnums=0)
def second_moments(
  apply_fn: Callable[..., Any], variables: Mapping[str, PyTree], inputs: Float[Array, 'batch ...']
) -> PyTree:
  """The second moments H = E[x^T x] of the inputs of every convolution and every dense layer.

  A row x holds the K numbers that one output is a weighted sum of, in the order of the kernel:
  rows, columns and input channels of the window.  The expectation is over the examples and, of a
  convolution, over all places of the window, with the zeros that it sees beyond the border.

  A network with BatchNorm runs on batch statistics, as in `opq_jax.correction.correct_batch_norm`,
  and for the same reason: then every layer sees, per channel, the first two moments that it had in
  training, even if the inputs are noise.  What noise does not know is how channels and neighbours
  go together; `natural_noise` knows it of the neighbours, `synthetic_inputs` much of both.

  Args:
    apply_fn: `model.apply` of a Flax Linen module; called as `apply_fn(variables, x)` or, if there
      are `batch_stats`, as `apply_fn(variables, x, train=True, mutable=['batch_stats'])`.
      Compiled once for each such function.
    variables: of the network.
    inputs: a batch, prepared as the network expects it, or synthetic, or noise.

  Returns:
    The tree of the variables with a matrix [groups, K, K] in float32 at the kernel of every
    `nn.Dense` and `nn.Conv`, and None elsewhere.  A depthwise convolution has as many groups as
    channels, all others one.  None too where one output has more than `MAX_INPUTS` inputs
    (4608), or where a convolution pads otherwise than with zeros or dilates its input.
    The moments of several batches are their mean, `mean_moments`.

  Raises:
    ValueError: a layer is called twice.

  >>> class Network(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(3, name='head')(x)
  >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
  >>> variables = Network().init(jax.random.key(0), x)
  >>> second_moments(Network().apply, variables, x)['params']['head']['kernel'].tolist()
  [[[5.0, 1.0], [1.0, 2.0]]]
  """
  leaves = trees.named_leaves(variables)
  found: dict[str, Array | None] = {}

  def measure(layer: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    name = '/'.join(('params', *module.path, 'kernel'))
    is_layer = isinstance(module, nn.Conv | nn.Dense) and name in leaves
    if context.method_name == '__call__' and is_layer:
      if name in found:
        raise ValueError(f'{name}: found a layer that is called twice, expected once')
      x = args[0] if args else kwargs['inputs']
      found[name] = layer_moments(module, x)
    return layer(*args, **kwargs)

  with nn.intercept_methods(measure):
    if trees.named_leaves(variables.get('batch_stats', {})):
      apply_fn(variables, inputs, train=True, mutable=['batch_stats'])
    else:
      apply_fn(variables, inputs)
  return jax.tree.unflatten(jax.tree.structure(variables), [found.get(name) for name in leaves])


def mean_moments(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, PyTree],
  batches: Iterable[Float[Array, 'batch ...']],
) -> PyTree:
  """`second_moments` of several batches of one size: the mean of theirs.

  Raises:
    ValueError: as `second_moments`, or there is no batch.
  """
  total, count = None, 0
  for batch in batches:
    found = second_moments(apply_fn, variables, batch)
    total = found if total is None else _sum(total, found)
    count += 1
  if total is None:
    raise ValueError('batches: found none, expected at least one')
  return _over(total, count)


@jax.jit
def _sum(one: PyTree, other: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, one, other)


@jax.jit
def _over(total: PyTree, count: Array) -> PyTree:
  return jax.tree.map(lambda matrix: matrix / count, total)


def layer_moments(
  module: Any,
  inputs: Float[Array, '*batch channels'],
  others: Float[Array, '*batch channels'] | None = None,
) -> Float32[Array, 'groups K K'] | None:
  """E[x^T x] of a layer's inputs x, or E[x^T y] with others y of the same shape.

  Args:
    module: an `nn.Dense` or `nn.Conv`.
    inputs: what it is given.
    others: what else it might have been given; by default the same.

  Returns:
    A matrix a group, or None: see `second_moments`.
  """
  given = [x.astype(jnp.float32) for x in (inputs, others) if x is not None]
  if isinstance(module, nn.Dense):
    if inputs.shape[-1] > MAX_INPUTS:
      return None
    examples = [[x.reshape(-1, 1, x.shape[-1])] for x in given]
    return _gram(examples[0], examples[-1]) / len(examples[0][0])

  window = _sequence(module.kernel_size, 1)
  rank = len(window)
  groups = module.feature_group_count
  padding = module.padding
  is_plain = not isinstance(padding, str) or padding in ('SAME', 'VALID')
  is_dilated = set(_sequence(module.input_dilation, rank)) != {1}
  if not is_plain or is_dilated or math.prod(window) * inputs.shape[-1] // groups > MAX_INPUTS:
    return None
  strides = _sequence(module.strides, rank)
  dilation = _sequence(module.kernel_dilation, rank)
  stacks = [x.reshape(-1, *x.shape[-rank - 1 :]) for x in given]
  images = stacks[0]
  reach = tuple((size - 1) * step + 1 for size, step in zip(window, dilation, strict=True))
  if isinstance(padding, str):
    pads = lax.padtype_to_pads(images.shape[1:-1], reach, strides, padding)
  else:
    sides = (padding,) * rank if isinstance(padding, int) else padding
    pads = [(side, side) if isinstance(side, int) else tuple(side) for side in sides]

  def taps(image: Float32[Array, '... channels']) -> list[Float32[Array, 'places groups channels']]:
    """What every place of the window sees, tap by tap."""
    padded = jnp.pad(image, (*pads, (0, 0)))
    places = [
      (size - width) // stride + 1
      for size, width, stride in zip(padded.shape[:-1], reach, strides, strict=True)
    ]
    seen = []
    for tap in np.ndindex(*window):
      start = [i * step for i, step in zip(tap, dilation, strict=True)]
      limit = [
        begin + (count - 1) * stride + 1
        for begin, count, stride in zip(start, places, strides, strict=True)
      ]
      channels = padded.shape[-1]
      part = lax.slice(padded, (*start, 0), (*limit, channels), (*strides, 1))
      seen.append(part.reshape(-1, groups, channels // groups))
    return seen

  # image after image, so that only one is ever written out as its windows
  def add(total: Array, same: list[Array]) -> tuple[Array, None]:
    seen = [taps(image) for image in same]
    return total + _gram(seen[0], seen[-1]), None

  first, *_ = seen = jax.eval_shape(taps, images[0])
  width = len(seen) * first.shape[2]
  total, _ = lax.scan(add, jnp.zeros((groups, width, width), jnp.float32), stacks)
  return total / (len(first) * len(images))


def _gram(
  first: list[Float32[Array, 'places groups channels']],
  second: list[Float32[Array, 'places groups channels']],
) -> Float32[Array, 'groups K K']:
  """The sums over all places of what the taps of two windows see, times each other."""
  if first[0].shape[2] == 1 < first[0].shape[1] and len(first) <= _FEW_TAPS:
    # of a depthwise window: loops over vectors of channels, and no array of all windows
    once, again = ([seen[..., 0] for seen in some] for some in (first, second))
    sums: dict[tuple[int, int], Array] = {}
    for i, j in itertools.product(range(len(once)), repeat=2):
      is_known = second is first and j < i
      sums[i, j] = sums[j, i] if is_known else jnp.sum(once[i] * again[j], axis=0)
    return jnp.stack(list(sums.values()), axis=-1).reshape(-1, len(once), len(once))
  rows = [jnp.concatenate(seen, axis=2) for seen in (first, second)]
  return jnp.einsum('ngk,ngl->gkl', *rows, precision=lax.Precision.HIGHEST)


def _sequence(value: Any, rank: int) -> tuple[int, ...]:
  """One number per spatial axis of what Flax takes for one: None, a number, or several."""
  if value is None or isinstance(value, int):
    return (value or 1,) * rank
  return tuple(value)
