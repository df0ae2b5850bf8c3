"""The networks of the paper's experiments, in Flax Linen; one module a family.

Flax is imported when a class of this room is first used: `names` and `create`'s errors need none.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy
from opq_jax.models.registry import create, names, variable_shapes

if TYPE_CHECKING:
  from opq_jax.models.alexnet import AlexNet
  from opq_jax.models.mobilenet import MobileNetV1, MobileNetV2
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

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'AlexNet': 'alexnet',
    'MobileNetV1': 'mobilenet',
    'MobileNetV2': 'mobilenet',
    'ResNet': 'resnet',
    'VGG16': 'vgg',
  },
)
