"""MobileNets: depthwise and pointwise convolutions in turn.

MobileNet-V1 is Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
Vision Applications", 2017, arXiv 1704.04861.  MobileNet-V2 is Sandler et al., "MobileNetV2:
Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv 1801.04381.  Both were published with
TensorFlow's padding and were trained again with PyTorch's: `padding` and `epsilon` say which.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.models import layers

# output channels before the width multiplier, and stride, of V1's thirteen separable blocks
_SEPARABLE = (
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

# V2's bottlenecks, seventeen: expansion, output channels, how many, stride of the first (table 2)
_INVERTED = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
_DIVISOR = 8  # of V2's channel counts


class MobileNetV1(nn.Module):
  """MobileNet-V1: a 3x3 stem, thirteen separable blocks, a global mean and one dense layer.

  The output channel is the last axis of every kernel.  Depthwise kernels are [3, 3, 1, channels].

  Attributes:
    num_classes: logits.
    width: the paper's multiplier of all channel counts, which never fall below 8.
    padding: 'SAME' as TensorFlow pads, which the published TF-slim weights expect, or 'HALF' as
      PyTorch does.
    epsilon: of BatchNorm, added to the variance; the default is TF-slim's.
    momentum: of BatchNorm, what a training step keeps of the running statistics; likewise.
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
  padding: Literal['SAME', 'HALF'] = 'SAME'
  epsilon: float = 0.001
  momentum: float = 0.9997
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Logits of images of any size.

    Args:
      x: images as `opq_jax.data.datasets.TF_SLIM` prepares them for the published weights, in [-1,
      1]. train: BatchNorm normalises by the batch and updates its running statistics, for which
        `apply` needs `mutable=['batch_stats']`.
    """
    layers.check_images(x)
    layer = _layer(self, train)
    x = layer(x, 'stem', self._channels(32), strides=2)
    for number, (channels, strides) in enumerate(_SEPARABLE, start=1):
      features = self._channels(channels)
      x = SeparableBlock(features, layer, strides, name=f'block_{number}')(x)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)

  def _channels(self, channels: int) -> int:
    return max(int(channels * self.width), _MIN_CHANNELS)


class MobileNetV2(nn.Module):
  """MobileNet-V2: a 3x3 stem, seventeen inverted bottlenecks, a pointwise layer, mean and dense.

  Attributes:
    num_classes: logits.
    width: the paper's multiplier of all channel counts, which are rounded to multiples of 8; the
      last pointwise layer never falls below its 1280.
    padding: 'HALF' as PyTorch pads, or 'SAME' as TensorFlow does.
    epsilon: of BatchNorm, added to the variance; the default is torchvision's.
    momentum: of BatchNorm, what a training step keeps of the running statistics; likewise.
    dtype: of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm and
      logits are float32.

  >>> import jax
  >>> model = MobileNetV2(num_classes=10)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  >>> sorted(variables['params']['block_1'])  # does not expand
  ['depthwise', 'depthwise_bn', 'project', 'project_bn']
  >>> variables['params']['block_17']['project']['kernel'].shape
  (1, 1, 960, 320)
  """

  num_classes: int = 1000
  width: float = 1.0
  padding: Literal['SAME', 'HALF'] = 'HALF'
  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Logits of images of any size.

    Args:
      x: images as `opq_jax.data.datasets.TORCHVISION` prepares them for torchvision's weights.
      train: BatchNorm normalises by the batch and updates its running statistics, for which
        `apply` needs `mutable=['batch_stats']`.  There is no dropout.
    """
    layers.check_images(x)
    layer = _layer(self, train)
    x = layer(x, 'stem', self._channels(32), strides=2)
    number = 0
    for expansion, channels, count, first_strides in _INVERTED:
      for strides in (first_strides, *[1] * (count - 1)):
        number += 1
        features = self._channels(channels)
        x = InvertedBottleneck(features, layer, strides, expansion, name=f'block_{number}')(x)
    x = layer(x, 'last', max(1280, self._channels(1280)), kernel_size=1)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)

  def _channels(self, channels: int) -> int:
    """The nearest multiple of 8, but never a tenth less than asked."""
    asked = channels * self.width
    rounded = max(int(asked + _DIVISOR / 2) // _DIVISOR, 1) * _DIVISOR
    return rounded if rounded >= 0.9 * asked else rounded + _DIVISOR


class SeparableBlock(nn.Module):
  """A 3x3 depthwise convolution, then a pointwise one; each as `layer` has it."""

  features: int
  layer: Callable[..., Array]
  strides: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch rows columns features']:
    x = self.layer(x, 'depthwise', x.shape[-1], strides=self.strides, depthwise=True)
    return self.layer(x, 'pointwise', self.features, kernel_size=1)


class InvertedBottleneck(nn.Module):
  """Pointwise to more channels, 3x3 depthwise, pointwise to fewer; plus the input where it fits."""

  features: int
  layer: Callable[..., Array]
  strides: int = 1
  expansion: int = 6

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch rows columns features']:
    hidden = self.expansion * x.shape[-1]
    y = x if self.expansion == 1 else self.layer(x, 'expand', hidden, kernel_size=1)
    y = self.layer(y, 'depthwise', hidden, strides=self.strides, depthwise=True)
    y = self.layer(y, 'project', self.features, kernel_size=1, activation=None)
    return x + y if x.shape == y.shape else y


def _layer(model: MobileNetV1 | MobileNetV2, train: bool) -> Callable[..., Array]:
  """`layers.conv_bn` with the options of a model."""
  return functools.partial(
    layers.conv_bn,
    padding=model.padding,
    activation=nn.relu6,
    epsilon=model.epsilon,
    momentum=model.momentum,
    train=train,
    dtype=model.dtype,
  )
