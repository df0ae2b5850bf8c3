"""The networks of the paper's experiments, in Flax Linen; one module per family."""

from opq_jax.models.alexnet import AlexNet
from opq_jax.models.mobilenet import MobileNetV1, MobileNetV2
from opq_jax.models.registry import create, names, variable_shapes
from opq_jax.models.resnet import ResNet
from opq_jax.models.vgg import VGG16

__all__ = [
  'VGG16',
  'AlexNet',
  'MobileNetV1',
  'MobileNetV2',
  'ResNet',
  'create',
  'names',
  'variable_shapes',
]
