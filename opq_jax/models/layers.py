"""Building blocks that all families share.

They are functions, called inside a compact `__call__`, and not Linen modules, so that the
parameters lie flat in the caller: `<name>/kernel`, `<name>_bn/scale`.  The output channel is the
last axis of every kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = int | Literal['SAME', 'HALF']


def check_images(x: Array) -> None:
  """Raises a ValueError unless x is a batch of images."""
  if x.ndim != 4:
    raise ValueError(f'x: found shape {x.shape}, expected [batch, height, width, channels]')


def conv(
  x: Float[Array, 'batch height width channels'],
  name: str,
  features: int,
  *,
  kernel_size: int = 3,
  strides: int = 1,
  padding: Padding,
  depthwise: bool = False,
  use_bias: bool = False,
  dtype: Any,
) -> Float[Array, 'batch rows columns features']:
  """Applies a convolution with a square kernel.

  Args:
    x: the input.
    name: name of the parameters in the calling module.
    features: output channels; equal to the channels of x if `depthwise`.
    kernel_size: height and width of the kernel in pixels.
    strides: stride in both directions.
    padding: rows and columns of zeros on every side of the image: a number; 'HALF' for
      kernel_size // 2, as in PyTorch's networks; or 'SAME' for TensorFlow's rule, which is
      asymmetric for strides of 2.
    depthwise: convolves each channel by itself; the kernel is [rows, columns, 1, channels].
    use_bias: adds a bias.
    dtype: dtype of the computation and of the result.
  """
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides,
    padding=kernel_size // 2 if padding == 'HALF' else padding,
    use_bias=use_bias,
    dtype=dtype,
    feature_group_count=features if depthwise else 1,
    conv_general_dilated=depthwise_conv if depthwise else None,
    name=name,
  )(x)


def conv_bn(
  x: Float[Array, 'batch height width channels'],
  name: str,
  features: int,
  *,
  activation: Callable[[Array], Array] | None,
  epsilon: float,
  momentum: float,
  train: bool,
  dtype: Any,
  **convolution: Any,
) -> Float[Array, 'batch rows columns features']:
  """Computes `activation(BatchNorm(convolution(x)))`.

  Args:
    x: the input.
    name: name of the convolution; its BatchNorm has the suffix `_bn`.
    features: output channels.
    activation: applied to BatchNorm's output; None for no activation.
    epsilon: added to the variance.
    momentum: weight of the old running statistics in a training step.
    train: normalises by the statistics of the batch instead of the running ones.
    dtype: dtype of the convolution and of the result; BatchNorm computes in float32.
    **convolution: the other arguments of `conv`.
  """
  x = conv(x, name, features, dtype=dtype, **convolution)
  x = nn.BatchNorm(
    use_running_average=not train,
    momentum=momentum,
    epsilon=epsilon,
    dtype=jnp.float32,
    name=f'{name}_bn',
  )(x.astype(jnp.float32))
  return (x if activation is None else activation(x)).astype(dtype)


def relu(x: Array, *, train: bool) -> Array:
  """Returns max(x, 0).  A training step on the CPU computes it once, and its gradient once.

  XLA's CPU backend fuses elementwise operations into every operation that reads them.  The sum of a
  residual block is read three times, and contains the sum of the block before: without a barrier
  the gradient of every kernel adds up the whole stage again.

  Args:
    x: any shape.
    train: whether the network is trained; inference needs no barrier.
  """
  x = nn.relu(x)
  if not train:
    return x
  return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def depthwise_conv(
  x: Float[Array, 'batch height width channels'],
  kernel: Float[Array, 'rows columns 1 channels'],
  window_strides: tuple[int, int],
  padding: Any,
  **options: Any,
) -> Float[Array, 'batch rows_out columns_out channels']:
  """Computes a depthwise `jax.lax.conv_general_dilated` in NHWC, efficiently on the CPU too.

  XLA's CPU backend computes grouped convolutions in scalar loops.  On the CPU the sum over the
  kernel's positions is therefore written as shifted products, which XLA fuses into one loop that
  is vectorised over the channels.  Other platforms get the convolution itself.

  Args:
    x: the input.
    kernel: one filter a channel.
    window_strides: strides along rows and columns.
    padding: 'SAME', 'VALID' or a pair of amounts for each direction.
    **options: options of `jax.lax.conv_general_dilated`, as `flax.linen.Conv` passes them.

  Returns:
    The output in the dtype of x; on the CPU it is summed in float32.

  Raises:
    ValueError: a dilation is not 1.
  """
  for name in ('lhs_dilation', 'rhs_dilation'):
    if set(options.get(name) or [1]) != {1}:
      raise ValueError(f'{name}: found {options[name]}, expected no dilation')

  def shifted_products(x: Array, kernel: Array) -> Array:
    window = kernel.shape[:2]
    pads = padding
    if isinstance(pads, str):
      pads = lax.padtype_to_pads(x.shape[1:3], window, window_strides, pads)
    rows, columns = (
      (size + sum(pad) - width) // stride
      for size, pad, width, stride in zip(x.shape[1:3], pads, window, window_strides, strict=True)
    )
    # float32: a bfloat16 sum would be rounded after every position
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0))).astype(jnp.float32)
    weights = kernel.astype(jnp.float32)
    down, right = window_strides
    total = jnp.float32(0)
    for i in range(window[0]):
      for j in range(window[1]):
        seen = padded[:, i : i + down * rows + 1 : down, j : j + right * columns + 1 : right]
        total += seen * weights[i : i + 1, j : j + 1]
    return total.astype(x.dtype)

  def grouped(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)

  return lax.platform_dependent(x, kernel, cpu=shifted_products, default=grouped)


def max_pool_by_two(
  x: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch rows columns channels']:
  """Returns the maximum of each 2x2 pixels; a last odd row or column is dropped.

  XLA's CPU backend fuses a pooling and the dense layer after it into one call of the library
  YNNPACK, which takes many times as long as the two calls (the benchmark `inference_layers`).  On
  the CPU the maximum is therefore taken over four subsampled images, which XLA does not fuse this
  way.  Other platforms get the pooling itself.

  >>> max_pool_by_two(jnp.arange(15.0).reshape(1, 3, 5, 1)).ravel().tolist()
  [6.0, 8.0]
  """

  def subsampled(x: Array) -> Array:
    rows, columns = (size // 2 * 2 for size in x.shape[1:3])
    corners = (x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1))
    return functools.reduce(jnp.maximum, corners)

  def pooled(x: Array) -> Array:
    return nn.max_pool(x, (2, 2), (2, 2))

  return lax.platform_dependent(x, cpu=subsampled, default=pooled)


def adaptive_average_pool(
  x: Float[Array, 'batch height width channels'], rows: int, columns: int
) -> Float[Array, 'batch rows columns channels']:
  """Averages over rows x columns windows that cover the image, like `adaptive_avg_pool2d`.

  The definition is PyTorch's: window i of n along a side of s pixels is [floor(i s / n),
  ceil((i + 1) s / n)).  The windows have one size if n divides s, overlap if it does not, and
  repeat single pixels if s < n.

  >>> x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  >>> adaptive_average_pool(x, 2, 1).ravel().tolist()
  [1.0, 3.0]
  """
  if x.shape[1:3] == (rows, columns):
    return x
  down, right = (_averages(size, n) for size, n in zip(x.shape[1:3], (rows, columns), strict=True))
  # the default precision of a TPU would round the image to bfloat16
  pooled = jnp.einsum(
    'bhwc,ih,jw->bijc', x.astype(jnp.float32), down, right, precision=lax.Precision.HIGHEST
  )
  return pooled.astype(x.dtype)


def _averages(size: int, windows: int) -> Float[np.ndarray, 'windows size']:
  """Returns the matrix that averages a side of `size` pixels over the windows."""
  matrix = np.zeros((windows, size), np.float32)
  for i in range(windows):
    begin, end = i * size // windows, -(-(i + 1) * size // windows)
    matrix[i, begin:end] = 1 / (end - begin)
  return matrix


def dropout(
  module: nn.Module, x: Float[Array, '...'], rate: float, train: bool
) -> Float[Array, '...']:
  """Applies dropout if `train` is set and `apply` got `rngs={'dropout': key}`.

  Without a key there is no dropout, in training too: `opq_jax.correction.correct_batch_norm` runs
  networks with `train=True` for their batch statistics alone, and has no key.
  """
  return nn.Dropout(rate, deterministic=not (train and module.has_rng('dropout')))(x)
