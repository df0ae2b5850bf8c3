"""Weights of TF-slim (TensorFlow's research models).

Kernels are HWIO as in Flax.  The names differ, the axes of a depthwise kernel have another order,
and logit 0 is a background class that ImageNet does not have.
"""

from typing import Any

from opq_jax import data, models
from opq_jax.importers import conversion
from opq_jax.importers.layouts import Layer, Layout, Leaf, Source, Tensors

_ROOT = 'MobilenetV1'
_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}


def place(layer: Layer, leaf: Leaf) -> tuple[str, Layout]:
  """Returns the name and the layout of a leaf in a checkpoint.

  >>> name, layout = place(Layer('Conv2d_1_depthwise'), Leaf('kernel', (3, 3, 1, 32), False, True))
  >>> name, layout.source_shape
  ('MobilenetV1/Conv2d_1_depthwise/depthwise_weights', (3, 3, 32, 1))
  """
  if leaf.is_norm:
    name = f'{_ROOT}/{layer.weights}/BatchNorm/{_NORM[leaf.kind]}'
    return name, Layout.reshaped(leaf.shape, leaf.shape)
  if leaf.is_depthwise:
    name = f'{_ROOT}/{layer.weights}/depthwise_weights'
    return name, Layout.transposed(leaf.shape, (0, 1, 3, 2))
  name = f'{_ROOT}/{layer.weights}/' + {'kernel': 'weights', 'bias': 'biases'}[leaf.kind]
  # TF-slim's last layer is a 1x1 convolution
  shape = (1, 1, *leaf.shape) if len(leaf.shape) == 2 else leaf.shape
  return name, Layout.reshaped(leaf.shape, shape)


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
"""The sources of each network of `opq_jax.models`."""


def mobilenet_v1(
  tensors: Tensors, *, num_classes: int = 1000, width: float = 1.0
) -> dict[str, Any]:
  """Returns the variables of `opq_jax.models.MobileNetV1` from a TF-slim checkpoint.

  Logit 0 of the checkpoint, the background class, is dropped.

  Args:
    tensors: all tensors of the network, and no others, by TF-slim's names, such as
      `MobilenetV1/Conv2d_1_depthwise/depthwise_weights`; for example
      `safetensors.numpy.load_file('mobilenet_v1.safetensors')`.
    num_classes: classes without the background.
    width: the model's width multiplier.

  Returns:
    `{'params': …, 'batch_stats': …}`, float32.

  Raises:
    ValueError: tensors are missing, unexpected or of another shape; the message lists all of them.

  >>> mobilenet_v1({})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: the tensors are not those of a TF-slim MobileNet-V1 (1000 classes, width 1.0):
    MobilenetV1/Conv2d_0/BatchNorm/beta: not found, expected shape (32,)
    ...
  """
  model = models.create('mobilenet_v1', num_classes=num_classes + 1, width=width)
  description = f'a TF-slim MobileNet-V1 ({num_classes} classes, width {width})'
  variables = conversion.to_variables(model, MOBILENET_V1, tensors, description)
  return conversion.without_background(variables)
