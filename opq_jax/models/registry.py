"""Networks by name."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from opq_jax.core.trees import PyTree
from opq_jax.models.alexnet import AlexNet
from opq_jax.models.mobilenet import MobileNetV1, MobileNetV2
from opq_jax.models.resnet import ResNet
from opq_jax.models.vgg import VGG16


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
  """Of 6 n + 2 layers: three stages of n blocks of two, the stem and the head."""
  blocks = ((depth - 2) // 6,) * 3
  return functools.partial(ResNet, blocks=blocks, cifar=True, width=16, num_classes=10)


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
  'alexnet': AlexNet,
  'vgg16': VGG16,
  'vgg16_bn': functools.partial(VGG16, batch_norm=True),
  'mobilenet_v1': MobileNetV1,
  'mobilenet_v1_075': functools.partial(MobileNetV1, width=0.75),
  'mobilenet_v1_050': functools.partial(MobileNetV1, width=0.5),
  'mobilenet_v2': MobileNetV2,
  'resnet18': functools.partial(ResNet, blocks=(2, 2, 2, 2)),
  'resnet34': functools.partial(ResNet, blocks=(3, 4, 6, 3)),
  'resnet50': functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
  'resnet101': functools.partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True),
  **{f'resnet{depth}': _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
}


def names() -> tuple[str, ...]:
  """Every name that `create` knows; `resnet20`, 32, 44, 56 and 110 are the paper's for CIFAR."""
  return tuple(_NETWORKS)


def create(name: str, **options: Any) -> nn.Module:
  """A network by its name.

  Args:
    name: one of `names()`.
    **options: attributes of its class, such as `num_classes` (1000 by default, 10 for CIFAR's)
      or `dtype=jnp.bfloat16` (computation; parameters stay float32).

  Returns:
    A Linen module, to be called as `model.apply(variables, images, train=False)`.

  Raises:
    ValueError: the name is not known; the message lists those that are.

  >>> create('resnet50', num_classes=37).num_classes
  37
  >>> create('resnet5')  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: name: found 'resnet5', expected one of alexnet, vgg16, ..., resnet110
  """
  if name not in _NETWORKS:
    raise ValueError(f'name: found {name!r}, expected one of {", ".join(_NETWORKS)}')
  return _NETWORKS[name](**options)


def variable_shapes(model: nn.Module) -> PyTree:
  """The variables of a network as shapes and dtypes, without computing any.

  >>> tree = variable_shapes(create('resnet20'))
  >>> sum(leaf.size for leaf in jax.tree.leaves(tree['params']))
  269722
  """
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)
