"""MobileNets: depthwise and pointwise convolutions in turn.

MobileNet-V1 is Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
Vision Applications", 2017, arXiv 1704.04861, with the details (padding, ReLU6, BatchNorm) of the
published TF-slim weights, which `opq_jax.importers.tf_slim` reads.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# output channels before the width multiplier, and stride, of the thirteen separable blocks
_BLOCKS = (
  (64, 1),
  (128, 2),
  (128, 1),
  (256, 2),
  (256, 1),
  (512, 2),
  *[(512, 1)] * 5,
  (1024, 2),
  (1024, 1),
)
_MIN_CHANNELS = 8


class MobileNetV1(nn.Module):
  """MobileNet-V1: a 3x3 stem, thirteen separable blocks, a global mean and one dense layer.

  The output channel is the last axis of every kernel.  Depthwise kernels are [3, 3, 1, channels].

  Attributes:
    num_classes: logits.
    width: the paper's multiplier of all channel counts, which never fall below 8.
    dtype: of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm and
      logits are float32.

  >>> import jax
  >>> model = MobileNetV1(num_classes=10, width=0.25)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  >>> variables['params']['block_1']['depthwise']['kernel'].shape
  (3, 3, 1, 8)
  >>> variables['params']['head']['kernel'].shape
  (256, 10)
  """

  num_classes: int = 1000
  width: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Logits of images.

    Args:
      x: images as `opq_jax.data.TF_SLIM` prepares them for the published weights, in [-1, 1].
      train: BatchNorm normalises by the batch and updates its running statistics, for which
        `apply` needs `mutable=['batch_stats']`.
    """
    if x.ndim != 4:
      raise ValueError(f'x: found shape {x.shape}, expected [batch, height, width, channels]')
    x = conv_bn(x, 'stem', self._channels(32), strides=2, train=train, dtype=self.dtype)
    for number, (channels, strides) in enumerate(_BLOCKS, start=1):
      block = SeparableBlock(
        self._channels(channels), strides, dtype=self.dtype, name=f'block_{number}'
      )
      x = block(x, train)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    return x.astype(jnp.float32)

  def _channels(self, channels: int) -> int:
    return max(int(channels * self.width), _MIN_CHANNELS)


class SeparableBlock(nn.Module):
  """A 3x3 depthwise convolution, then a pointwise one; each with BatchNorm and ReLU6."""

  features: int
  strides: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels'], train: bool = False
  ) -> Float[Array, 'batch rows columns features']:
    layer = functools.partial(conv_bn, train=train, dtype=self.dtype)
    x = layer(x, 'depthwise', x.shape[-1], strides=self.strides, depthwise=True)
    return layer(x, 'pointwise', self.features, kernel_size=1)


def conv_bn(
  x: Float[Array, 'batch height width channels'],
  name: str,
  features: int,
  *,
  kernel_size: int = 3,
  strides: int = 1,
  depthwise: bool = False,
  activation: Callable[[Array], Array] | None = nn.relu6,
  epsilon: float = 0.001,
  momentum: float = 0.9997,
  train: bool,
  dtype: Any,
) -> Float[Array, 'batch rows columns features']:
  """`activation(BatchNorm(convolution(x)))`, for the inside of a compact `__call__`.

  A function and no module, so that the parameters lie flat in the caller: `<name>/kernel`,
  `<name>_bn/scale` and `<name>_bn/bias`.

  Args:
    x: the input.
    name: of the convolution; its BatchNorm gets the suffix `_bn`.
    features: output channels; as many as x has if `depthwise`.
    kernel_size: height and width of the kernel.
    strides: in both directions; 'SAME' padding, which for strides of 2 is asymmetric.
    depthwise: each channel is convolved for itself.
    activation: None leaves BatchNorm's output as it is.
    epsilon: added to the variance; the default is TF-slim's, as is that of `momentum`.
    momentum: what a training step keeps of the running statistics.
    train: normalise by the batch.
    dtype: of the convolution and of the result; BatchNorm computes in float32.
  """
  x = nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides,
    use_bias=False,
    dtype=dtype,
    feature_group_count=features if depthwise else 1,
    conv_general_dilated=depthwise_conv if depthwise else None,
    name=name,
  )(x)
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
