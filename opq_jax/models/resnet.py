"""Residual networks, for ImageNet and for CIFAR.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.models import layers

_EXPANSION = 4  # output channels of a bottleneck / channels of its 3x3 convolution (the paper)


class ResNet(nn.Module):
  """A stem, stages of residual blocks, a global mean and one dense layer.

  Each stage after the first halves height and width.

  Attributes:
    blocks: number of residual blocks of each stage.
    bottleneck: makes a block of 1x1, 3x3 and 1x1 convolutions, the last with four times the
      channels, instead of two 3x3 convolutions.
    stride_first: puts the stride of a bottleneck into its first 1x1 convolution (the paper, Keras)
      instead of its 3x3 convolution ("v1.5": torchvision, timm, Hugging Face).
    cifar: selects the paper's variant for CIFAR: a 3x3 stem without stride and pooling, and
      shortcuts without parameters (the paper's option A) instead of projections.
    width: channels of the first stage; they double from stage to stage.
    num_classes: number of logits.
    epsilon: BatchNorm's addition to the variance.
    momentum: weight of the old running statistics in a training step of BatchNorm.
    dtype: dtype of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm
      and logits are float32.

  >>> import jax
  >>> model = ResNet((3, 4, 6, 3), bottleneck=True)
  >>> image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), image)
  >>> sorted(variables['params']['stage_1_block_1'])  # doctest: +ELLIPSIS
  ['conv_1', 'conv_1_bn', ..., 'conv_3_bn', 'shortcut', 'shortcut_bn']
  >>> variables['params']['head']['kernel'].shape
  (2048, 1000)
  """

  blocks: Sequence[int]
  bottleneck: bool = False
  stride_first: bool = False
  cifar: bool = False
  width: int = 64
  num_classes: int = 1000
  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Returns the logits of images of any size.

    Args:
      x: images prepared as by `opq_jax.data.TORCHVISION` or `CIFAR`.
      train: normalises by the statistics of the batch and updates the running statistics, which
        takes `apply(..., mutable=['batch_stats'])`.
    """
    layers.check_images(x)
    relu = functools.partial(layers.relu, train=train)
    layer = functools.partial(
      layers.conv_bn,
      padding='HALF',
      activation=relu,
      epsilon=self.epsilon,
      momentum=self.momentum,
      train=train,
      dtype=self.dtype,
    )
    if self.cifar:
      x = layer(x, 'stem', self.width)
    else:
      x = layer(x, 'stem', self.width, kernel_size=7, strides=2)
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, count in enumerate(self.blocks, start=1):
      for number in range(1, count + 1):
        strides = 2 if number == 1 and stage > 1 else 1
        convolutions = self._convolutions(self.width * 2 ** (stage - 1), strides)
        name = f'stage_{stage}_block_{number}'
        x = ResidualBlock(convolutions, layer, relu, projects=not self.cifar, name=name)(x)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)

  def _convolutions(self, features: int, strides: int) -> 'tuple[Convolution, ...]':
    if not self.bottleneck:
      return Convolution(features, 3, strides), Convolution(features, 3)
    first, second = (strides, 1) if self.stride_first else (1, strides)
    return (
      Convolution(features, 1, first),
      Convolution(features, 3, second),
      Convolution(_EXPANSION * features, 1),
    )


class Convolution(NamedTuple):
  """Output channels, kernel side and stride of one convolution of a residual block."""

  features: int
  kernel_size: int
  strides: int = 1


class ResidualBlock(nn.Module):
  """Computes `relu(convolutions(x) + shortcut(x))`.

  Every convolution has a BatchNorm; there is a ReLU after each but the last.

  Attributes:
    convolutions: the convolutions in their order.
    layer: `layers.conv_bn` with the network's options.
    relu: `layers.relu`, in training or not.
    projects: selects the shortcut where the shapes of x and of the convolutions' output differ: a
      1x1 convolution with BatchNorm if True, else x subsampled and padded with channels of zeros
      on both sides.
  """

  convolutions: Sequence[Convolution]
  layer: Callable[..., Array]
  relu: Callable[[Array], Array]
  projects: bool = True

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch rows columns features']:
    y = x
    for number, convolution in enumerate(self.convolutions, start=1):
      is_last = number == len(self.convolutions)
      options = {'activation': None} if is_last else {}
      y = self.layer(y, f'conv_{number}', **convolution._asdict(), **options)
    return self.relu(y + self._shortcut(x))

  def _shortcut(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch rows columns features']:
    features = self.convolutions[-1].features
    strides = math.prod(convolution.strides for convolution in self.convolutions)
    missing = features - x.shape[-1]
    if strides == 1 and missing == 0:
      return x
    if self.projects:
      options = {'kernel_size': 1, 'strides': strides, 'activation': None}
      return self.layer(x, 'shortcut', features, **options)
    channels = (missing // 2, missing - missing // 2)
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), channels))
