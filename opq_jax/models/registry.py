"""Networks by name.  Neither Flax nor JAX is imported before a network is made."""

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import flax.linen as nn

  from opq_jax.core.trees import PyTree


class Architecture(NamedTuple):
  """A class of this room and the attributes that differ from its defaults.

  Attributes:
    module: the module of the class, relative to `opq_jax.models`.
    class_name: the name of the class.
    attributes: keyword arguments of the class.
  """

  module: str
  class_name: str
  attributes: dict[str, Any]


def _cifar_resnet(depth: int) -> Architecture:
  """Returns the ResNet of 6 n + 2 layers for CIFAR: stem, three stages of n blocks, dense layer."""
  blocks = ((depth - 2) // 6,) * 3
  attributes = {'blocks': blocks, 'cifar': True, 'width': 16, 'num_classes': 10}
  return Architecture('resnet', 'ResNet', attributes)


_NETWORKS: dict[str, Architecture] = {
  'alexnet': Architecture('alexnet', 'AlexNet', {}),
  'vgg16': Architecture('vgg', 'VGG16', {}),
  'vgg16_bn': Architecture('vgg', 'VGG16', {'batch_norm': True}),
  'mobilenet_v1': Architecture('mobilenet', 'MobileNetV1', {}),
  'mobilenet_v1_075': Architecture('mobilenet', 'MobileNetV1', {'width': 0.75}),
  'mobilenet_v1_050': Architecture('mobilenet', 'MobileNetV1', {'width': 0.5}),
  'mobilenet_v2': Architecture('mobilenet', 'MobileNetV2', {}),
  'resnet18': Architecture('resnet', 'ResNet', {'blocks': (2, 2, 2, 2)}),
  'resnet34': Architecture('resnet', 'ResNet', {'blocks': (3, 4, 6, 3)}),
  'resnet50': Architecture('resnet', 'ResNet', {'blocks': (3, 4, 6, 3), 'bottleneck': True}),
  'resnet101': Architecture('resnet', 'ResNet', {'blocks': (3, 4, 23, 3), 'bottleneck': True}),
  **{f'resnet{depth}': _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
}


def names() -> tuple[str, ...]:
  """Returns the names that `create` takes.

  `resnet20`, 32, 44, 56 and 110 are the CIFAR-10 networks of He et al. (arXiv 1512.03385).
  """
  return tuple(_NETWORKS)


def check_name(name: str) -> None:
  """Raises a ValueError that lists the known names unless `name` is one of `names()`."""
  if name not in _NETWORKS:
    raise ValueError(f'name: found {name!r}, expected one of {", ".join(_NETWORKS)}')


def create(name: str, **options: Any) -> 'nn.Module':
  """Returns a network by its name.

  Args:
    name: one of `names()`.
    **options: attributes of its class, such as `num_classes` (default 1000, or 10 for CIFAR) or
      `dtype=jnp.bfloat16` (the dtype of the computation; parameters stay float32).

  Returns:
    A Linen module, called as `model.apply(variables, images, train=False)`.

  Raises:
    ValueError: the name is unknown; the message lists the known ones.

  >>> create('resnet50', num_classes=37).num_classes
  37
  >>> create('resnet5')  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: name: found 'resnet5', expected one of alexnet, vgg16, ..., resnet110
  """
  check_name(name)
  module, class_name, attributes = _NETWORKS[name]
  family = importlib.import_module(f'opq_jax.models.{module}')
  return getattr(family, class_name)(**{**attributes, **options})


def variable_shapes(model: 'nn.Module') -> 'PyTree':
  """Returns the shapes and dtypes of a network's variables without computing any of them.

  >>> import jax
  >>> tree = variable_shapes(create('resnet20'))
  >>> sum(leaf.size for leaf in jax.tree.leaves(tree['params']))
  269722
  """
  import jax
  import jax.numpy as jnp

  example = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  if hasattr(model, 'vocabulary'):  # it reads tokens
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  try:
    hash(model)
  except TypeError:  # a list among its attributes
    return jax.eval_shape(model.init, jax.random.key(0), example)
  return _initialisation().eval_shape(model, jax.random.key(0), example)


@functools.cache
def _initialisation() -> Any:
  """Returns the traced initialisation of all networks.

  Tracing a deep network takes seconds, and an importer asks for its shapes several times: `jit`
  keeps what it has traced, by the attributes of the network.
  """
  import jax

  return jax.jit(lambda model, key, example: model.init(key, example), static_argnums=0)
