"""Images: datasets from disk, network inputs, augmented views, and the stream of training batches.

TensorFlow Datasets, grain and Pillow are imported by the functions that use them; the `data` extra
installs what the first of them needs beside itself.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.data.augmentation import UNIFORMS, Augmentation, PadCropFlip, RandomResizedCrop
  from opq_jax.data.datasets import batches, source
  from opq_jax.data.preprocessing import CAFFE, CIFAR, TF_SLIM, TORCHVISION, Preprocessing
  from opq_jax.data.streams import Examples, fake, in_memory, in_order, stream

__all__ = [
  'CAFFE',
  'CIFAR',
  'TF_SLIM',
  'TORCHVISION',
  'UNIFORMS',
  'Augmentation',
  'Examples',
  'PadCropFlip',
  'Preprocessing',
  'RandomResizedCrop',
  'batches',
  'fake',
  'in_memory',
  'in_order',
  'source',
  'stream',
]

_MODULES = {
  'augmentation': ('UNIFORMS', 'Augmentation', 'PadCropFlip', 'RandomResizedCrop'),
  'datasets': ('batches', 'source'),
  'preprocessing': ('CAFFE', 'CIFAR', 'TF_SLIM', 'TORCHVISION', 'Preprocessing'),
  'streams': ('Examples', 'fake', 'in_memory', 'in_order', 'stream'),
}

__getattr__, __dir__ = lazy.attributes(
  __name__, {name: module for module, names in _MODULES.items() for name in names}
)
