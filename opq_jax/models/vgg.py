"""VGG: stacks of 3x3 convolutions, each followed by a pooling, and three dense layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, arXiv 1409.1556; with BatchNorm as torchvision adds it.
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
  """VGG-16, with torchvision's adaptive pooling in front of the dense layers.

  Attributes:
    num_classes: logits.
    batch_norm: whether a BatchNorm follows each convolution, which keeps its bias.
    stacks: convolutions of each stack, and their channels.
    hidden: outputs of the first two dense layers.
    dropout: the rate behind them, in training; see `layers.dropout`.
    epsilon: of BatchNorm, added to the variance.
    momentum: of BatchNorm, what a training step keeps of the running statistics.
    dtype: of convolutions and dense layers, float32 or bfloat16; parameters, BatchNorm and
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
    """Logits of images of at least 32 pixels each way.

    Args:
      x: images as `opq_jax.data.datasets.TORCHVISION` prepares them.
      train: BatchNorm normalises by the batch and updates its running statistics, for which
        `apply` needs `mutable=['batch_stats']`; and dropout may take place.
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
