"""Weights that were trained with TF-slim, as variables of this library's models.

TF-slim's kernels are HWIO as Flax's are; what differs is the names, the order of the axes of a
depthwise kernel, and a first logit for "background" that ImageNet does not have.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from opq_jax.data import datasets as data
from opq_jax.importers import conversion
from opq_jax.importers.conversion import Layer, Layout, Leaf, Source
from opq_jax.models import mobilenet

_ROOT = 'MobilenetV1'
_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}


def place(layer: Layer, leaf: Leaf) -> tuple[str, Layout]:
  """The name and the layout of a leaf in a checkpoint.

  >>> name, layout = place(Layer('Conv2d_1_depthwise'), Leaf('kernel', (3, 3, 1, 32), False, True))
  >>> name, layout.theirs
  ('MobilenetV1/Conv2d_1_depthwise/depthwise_weights', (3, 3, 32, 1))
  """
  if leaf.is_norm:
    name = f'{_ROOT}/{layer.weights}/BatchNorm/{_NORM[leaf.kind]}'
    return name, Layout.reshaped(leaf.shape, leaf.shape)
  if leaf.is_depthwise:
    name = f'{_ROOT}/{layer.weights}/depthwise_weights'
    return name, Layout.transposed(leaf.shape, (0, 1, 3, 2))
  name = f'{_ROOT}/{layer.weights}/' + {'kernel': 'weights', 'bias': 'biases'}[leaf.kind]
  # the head is a convolution there
  theirs = (1, 1, *leaf.shape) if len(leaf.shape) == 2 else leaf.shape
  return name, Layout.reshaped(leaf.shape, theirs)


MOBILENET_V1 = Source(
  'tf_slim',
  {
    'stem': lambda: Layer('Conv2d_0'),
    'block_#/depthwise': lambda b: Layer(f'Conv2d_{b}_depthwise'),
    'block_#/pointwise': lambda b: Layer(f'Conv2d_{b}_pointwise'),
    'head': lambda: Layer('Logits/Conv2d_1c_1x1'),
  },
  place,
  data.TF_SLIM,
  {'padding': 'SAME', 'epsilon': 0.001},
)

SOURCES: dict[str, tuple[Source, ...]] = {
  'mobilenet_v1': (MOBILENET_V1,),
  'mobilenet_v1_075': (MOBILENET_V1,),
  'mobilenet_v1_050': (MOBILENET_V1,),
}


def mobilenet_v1(
  tensors: Mapping[str, np.ndarray], *, num_classes: int = 1000, width: float = 1.0
) -> dict[str, Any]:
  """The variables of `opq_jax.models.MobileNetV1` from the tensors of a TF-slim checkpoint.

  The checkpoint counts classes from 1 and keeps logit 0 for the background: that logit is dropped.

  Args:
    tensors: every tensor of the network by its TF-slim name, such as
      `MobilenetV1/Conv2d_1_depthwise/depthwise_weights`, and nothing else; for example
      `safetensors.numpy.load_file('mobilenet_v1.safetensors')`.
    num_classes: classes without the background.
    width: the model's width multiplier.

  Returns:
    `{'params': …, 'batch_stats': …}`, float32.

  Raises:
    ValueError: tensors are missing, not expected, or of other shape; the message lists them all.

  >>> mobilenet_v1({})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: the tensors are not those of a TF-slim MobileNet-V1 (1000 classes, width 1.0):
    MobilenetV1/Conv2d_0/BatchNorm/beta: not found, expected shape (32,)
    ...
  """
  model = mobilenet.MobileNetV1(num_classes=num_classes + 1, width=width)
  what = f'a TF-slim MobileNet-V1 ({num_classes} classes, width {width})'
  return conversion.without_background(conversion.to_variables(model, MOBILENET_V1, tensors, what))
