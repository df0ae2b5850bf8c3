"""AlexNet: five convolutions and three dense layers.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014, arXiv
1404.5997: the variant for one device and without local response normalisation, as in torchvision.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opq_jax.models import layers


class AlexNet(nn.Module):
  """AlexNet with torchvision's adaptive pooling before the dense layers.

  Attributes:
    num_classes: number of logits.
    hidden: outputs of each of the first two dense layers.
    dropout: dropout rate before each of these two layers in training; see `layers.dropout`.
    dtype: dtype of the computation, float32 or bfloat16; parameters and logits are float32.

  >>> import jax
  >>> image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  >>> variables = jax.eval_shape(AlexNet().init, jax.random.key(0), image)
  >>> variables['params']['dense_1']['kernel'].shape  # the last map is [6, 6, 256]
  (9216, 4096)
  """

  num_classes: int = 1000
  hidden: int = 4096
  dropout: float = 0.5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width 3'], train: bool = False
  ) -> Float[Array, 'batch classes']:
    """Returns the logits of images of at least 63 x 63 pixels.

    Args:
      x: images prepared as by `opq_jax.data.TORCHVISION`.
      train: enables dropout if `apply` gets `rngs={'dropout': key}`.
    """
    layers.check_images(x)
    layer = functools.partial(layers.conv, padding='HALF', use_bias=True, dtype=self.dtype)
    pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
    x = pool(nn.relu(layer(x, 'conv_1', 64, kernel_size=11, strides=4, padding=2)))
    x = pool(nn.relu(layer(x, 'conv_2', 192, kernel_size=5)))
    x = nn.relu(layer(x, 'conv_3', 384))
    x = nn.relu(layer(x, 'conv_4', 256))
    x = pool(nn.relu(layer(x, 'conv_5', 256)))
    x = layers.adaptive_average_pool(x, 6, 6)
    x = x.reshape(x.shape[0], -1)
    for name in ('dense_1', 'dense_2'):
      x = layers.dropout(self, x, self.dropout, train)
      x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)
