"""MobileNets: alternating depthwise and pointwise convolutions.

MobileNet-V1 is Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
Vision Applications", 2017, arXiv 1704.04861.  MobileNet-V2 is Sandler et al., "MobileNetV2:
Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv 1801.04381.  Both exist as weights
trained in TensorFlow and as weights trained in PyTorch, which pad differently and use another
epsilon in BatchNorm: `padding` and `epsilon` select the variant.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.models import layers

# output channels (before the width multiplier) and stride of V1's 13 separable blocks (table 1)
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
_MIN_CHANNELS = 8  # of any layer, as in TF-slim's implementation

# V2's 17 bottlenecks (table 2): expansion, output channels, number of blocks, stride of the first
_INVERTED = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
_DIVISOR = 8  # V2's channel counts are multiples of it, as in TF-slim's implementation


class MobileNetV1(nn.Module):
  """MobileNet-V1: a 3x3 stem, 13 separable blocks, a global mean and one dense layer.

  The output channel is the last axis of every kernel.  Depthwise kernels are [3, 3, 1, channels].

  Attributes:
    num_classes: number of logits.
    width: the paper's multiplier of all channel counts, which are 8 or more.
    padding: 'SAME' for TensorFlow's padding, which the published TF-slim weights need, or 'HALF'
      for PyTorch's.
    epsilon: BatchNorm's addition to the variance; the default is TF-slim's.
    momentum: weight of the old running statistics in a training step of BatchNorm; the default is
      TF-slim's.
    dtype: dtype of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm
      and logits are float32.

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
    """Returns the logits of images of any size.

    Args:
      x: images in [-1, 1], prepared as by `opq_jax.data.TF_SLIM` for the published
        weights.
      train: normalises by the statistics of the batch and updates the running statistics, which
        takes `apply(..., mutable=['batch_stats'])`.
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
  """MobileNet-V2: a 3x3 stem, 17 inverted bottlenecks, a pointwise, a mean and a dense layer.

  Attributes:
    num_classes: number of logits.
    width: the paper's multiplier of all channel counts, which are rounded to multiples of 8; the
      last pointwise layer has 1280 channels or more.
    padding: 'HALF' for PyTorch's padding or 'SAME' for TensorFlow's.
    epsilon: BatchNorm's addition to the variance; the default is torchvision's.
    momentum: weight of the old running statistics in a training step of BatchNorm; the default is
      torchvision's.
    dtype: dtype of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm
      and logits are float32.

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
    """Returns the logits of images of any size.

    Args:
      x: images prepared as by `opq_jax.data.TORCHVISION` for torchvision's weights.
      train: normalises by the statistics of the batch and updates the running statistics, which
        takes `apply(..., mutable=['batch_stats'])`.  There is no dropout.
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
    """Rounds scaled channels to a multiple of 8, upwards if rounding takes more than 10 % off."""
    scaled = channels * self.width
    rounded = max(int(scaled + _DIVISOR / 2) // _DIVISOR, 1) * _DIVISOR
    return rounded if rounded >= 0.9 * scaled else rounded + _DIVISOR


class SeparableBlock(nn.Module):
  """A 3x3 depthwise convolution and a pointwise one, each made by `layer` (see `_layer`)."""

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
  """Pointwise expansion, 3x3 depthwise, pointwise projection; adds the input if shapes agree."""

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
  """Returns `layers.conv_bn` with the options of a model."""
  return functools.partial(
    layers.conv_bn,
    padding=model.padding,
    activation=nn.relu6,
    epsilon=model.epsilon,
    momentum=model.momentum,
    train=train,
    dtype=model.dtype,
  )
