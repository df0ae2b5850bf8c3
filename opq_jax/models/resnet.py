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

_EXPANSION = 4  # output channels of a bottleneck over those inside


class ResNet(nn.Module):
  """A stem, stages of residual blocks that each halve the image, a global mean, one dense layer.

  Attributes:
    blocks: how many each stage has.
    bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, with four times the channels outside, in
      place of two 3x3 convolutions.
    stride_first: in a bottleneck, whether the stride is in the first 1x1 (the paper, Keras) or in
      the 3x3 ("v1.5": torchvision, timm, Hugging Face).
    cifar: the paper's form for CIFAR: a 3x3 stem with neither stride nor pooling, and shortcuts
      without parameters (its option A) in place of projections.
    width: channels of the first stage; every further stage has twice as many.
    num_classes: logits.
    epsilon: of BatchNorm, added to the variance.
    momentum: of BatchNorm, what a training step keeps of the running statistics.
    dtype: of convolutions and the dense layer, float32 or bfloat16; parameters, BatchNorm and
      logits are float32.

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
    """Logits of images of any size.

    Args:
      x: images as `opq_jax.data.datasets.TORCHVISION` or `CIFAR` prepares them.
      train: BatchNorm normalises by the batch and updates its running statistics, for which
        `apply` needs `mutable=['batch_stats']`.
    """
    layers.check_images(x)
    layer = functools.partial(
      layers.conv_bn,
      padding='HALF',
      activation=nn.relu,
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
        x = ResidualBlock(convolutions, layer, projects=not self.cifar, name=name)(x)
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
  """One layer of a residual block."""

  features: int
  kernel_size: int
  strides: int = 1


class ResidualBlock(nn.Module):
  """`relu(convolutions(x) + shortcut(x))`, each convolution with BatchNorm, and ReLU in between.

  Attributes:
    convolutions: in their order.
    layer: `layers.conv_bn` with the network's options.
    projects: where the shapes of x and the sum differ, whether the shortcut is a 1x1 convolution
      with BatchNorm, or x subsampled and padded with channels of zeros on both sides.
  """

  convolutions: Sequence[Convolution]
  layer: Callable[..., Array]
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
    return nn.relu(y + self._shortcut(x))

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
