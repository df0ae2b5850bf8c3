"""The building blocks that all families share.

Functions and no modules, for the inside of a compact `__call__`, so that the parameters lie flat
in the caller: `<name>/kernel`, `<name>_bn/scale`.  The output channel is the last axis of every
kernel.
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
  """A convolution with a square window.

  Args:
    x: the input.
    name: of its parameters.
    features: output channels; as many as x has if `depthwise`.
    kernel_size: height and width of the kernel.
    strides: in both directions.
    padding: zeros around the image: so many on every side; 'HALF' for kernel_size // 2, as in
      PyTorch's networks; or 'SAME', TensorFlow's, which for strides of 2 is asymmetric.
    depthwise: each channel is convolved for itself; the kernel is [rows, columns, 1, channels].
    use_bias: add one.
    dtype: of the computation and of the result.
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
  """`activation(BatchNorm(convolution(x)))`.

  Args:
    x: the input.
    name: of the convolution; its BatchNorm gets the suffix `_bn`.
    features: output channels.
    activation: None leaves BatchNorm's output as it is.
    epsilon: added to the variance.
    momentum: what a training step keeps of the running statistics.
    train: normalise by the batch.
    dtype: of the convolution and of the result; BatchNorm computes in float32.
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


def depthwise_conv(
  x: Float[Array, 'batch height width channels'],
  kernel: Float[Array, 'rows columns 1 channels'],
  window_strides: tuple[int, int],
  padding: Any,
  **options: Any,
) -> Float[Array, 'batch rows_out columns_out channels']:
  """`jax.lax.conv_general_dilated` of one NHWC channel at a time, quick on the CPU too.

  XLA's CPU backend walks grouped convolutions one number after the other.  There, the same sum
  over the kernel's positions is written as shifted products, which XLA fuses into one loop over
  vectors of channels.  Other platforms get the convolution itself.

  Args:
    x: the input.
    kernel: one filter per channel.
    window_strides: of the output's rows and columns.
    padding: 'SAME', 'VALID' or a pair of amounts per direction.
    **options: of `jax.lax.conv_general_dilated`, as `flax.linen.Conv` passes them.

  Returns:
    The output, in the dtype of x; on the CPU summed in float32.

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
    # in bfloat16 the sum would be rounded after every position
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
  """The largest of every 2x2 pixels; a last odd row or column is left out.

  XLA's CPU backend fuses a pooling with the dense layer that reads it into one call of the library
  YNNPACK, which takes many times as long as both do apart
  (`experiments/benchmarks/inference_layers.py`).  There, the same maximum is written as that of
  four subsampled images, which is not fused so.  Other platforms get the pooling itself.

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
  """PyTorch's `adaptive_avg_pool2d`: means over rows x columns windows that cover the image.

  Window i of n over a side of s pixels is [floor(i s / n), ceil((i + 1) s / n)): windows of one
  size where n divides s, overlapping ones elsewhere, and single pixels again where s < n.

  >>> x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  >>> adaptive_average_pool(x, 2, 1).ravel().tolist()
  [1.0, 3.0]
  """
  if x.shape[1:3] == (rows, columns):
    return x
  down, right = (_averages(size, n) for size, n in zip(x.shape[1:3], (rows, columns), strict=True))
  # on a TPU, the default precision would round the image to bfloat16
  pooled = jnp.einsum(
    'bhwc,ih,jw->bijc', x.astype(jnp.float32), down, right, precision=lax.Precision.HIGHEST
  )
  return pooled.astype(x.dtype)


def _averages(size: int, windows: int) -> Float[np.ndarray, 'windows size']:
  """The matrix that averages a side of `size` pixels over the windows."""
  matrix = np.zeros((windows, size), np.float32)
  for i in range(windows):
    begin, end = i * size // windows, -(-(i + 1) * size // windows)
    matrix[i, begin:end] = 1 / (end - begin)
  return matrix


def dropout(
  module: nn.Module, x: Float[Array, '...'], rate: float, train: bool
) -> Float[Array, '...']:
  """Dropout where `module` is trained and its `apply` was given `rngs={'dropout': key}`.

  Without that key, training is without dropout: what only wants the batch statistics of a
  network, as `opq_jax.correct_batch_norm` does, calls it with `train=True` and has no key.
  """
  return nn.Dropout(rate, deterministic=not (train and module.has_rng('dropout')))(x)
