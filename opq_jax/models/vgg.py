"""VGG: stacks of 3x3 convolutions with max pooling after each stack, and three dense layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, arXiv 1409.1556; BatchNorm is placed as in torchvision.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.models import layers

# configuration D of the paper
_VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG16(nn.Module):
  """VGG-16 with torchvision's adaptive pooling before the dense layers.

  Attributes:
    num_classes: number of logits.
    batch_norm: adds a BatchNorm after each convolution; the convolution keeps its bias.
    stacks: number of convolutions and output channels of each stack.
    hidden: outputs of each of the first two dense layers.
    dropout: dropout rate after each of these two layers in training; see `layers.dropout`.
    epsilon: BatchNorm's addition to the variance.
    momentum: weight of the old running statistics in a training step of BatchNorm.
    dtype: dtype of convolutions and dense layers, float32 or bfloat16; parameters, BatchNorm and
      logits are float32.

  >>> import jax
  >>> image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  >>> variables = jax.eval_shape(VGG16().init, jax.random.key(0), image)
  >>> variables['params']['conv_5_3']['kernel'].shape
  (3, 3, 512, 512)
  >>> variables['params']['dense_1']['kernel'].shape  # the last map is [7, 7, 512]
  (25088, 4096)
  """

  num_classes: int = 1000
  batch_norm: bool = False
  stacks: tuple[tuple[int, int], ...] = _VGG16
  hidden: int = 4096
  dropout: float = 0.5
  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Returns the logits of images of at least 32 x 32 pixels.

    Args:
      x: images prepared as by `opq_jax.data.TORCHVISION`.
      train: normalises by the statistics of the batch and updates the running statistics, which
        takes `apply(..., mutable=['batch_stats'])`; enables dropout if `apply` gets
        `rngs={'dropout': key}`.
    """
    layers.check_images(x)
    options: dict[str, Any] = {'padding': 'HALF', 'use_bias': True, 'dtype': self.dtype}
    layer: Callable[..., Array] = functools.partial(layers.conv, **options)
    if self.batch_norm:
      options |= {'epsilon': self.epsilon, 'momentum': self.momentum, 'train': train}
      layer = functools.partial(layers.conv_bn, activation=None, **options)
    for stack, (count, features) in enumerate(self.stacks, start=1):
      for number in range(1, count + 1):
        x = nn.relu(layer(x, f'conv_{stack}_{number}', features))
      x = layers.max_pool_by_two(x)
    x = layers.adaptive_average_pool(x, 7, 7)
    x = x.reshape(x.shape[0], -1)
    for name in ('dense_1', 'dense_2'):
      x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
      x = layers.dropout(self, x, self.dropout, train)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)
