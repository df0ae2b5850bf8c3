"""Weights that were trained with TF-slim, as variables of this library's models.

TF-slim's kernels are HWIO as Flax's are; what differs is the names, the order of the axes of a
depthwise kernel, and a first logit for "background" that ImageNet does not have.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opq_jax import trees
from opq_jax.models import mobilenet

_ROOT = 'MobilenetV1'
_BATCH_NORM = {
  'scale': 'gamma',
  'bias': 'beta',
  'mean': 'moving_mean',
  'var': 'moving_variance',
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
  model = mobilenet.MobileNetV1(num_classes=num_classes, width=width)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  leaves = trees.named_leaves(variables)
  expected = {_name(path): _shape(path, leaf.shape) for path, leaf in leaves.items()}
  found = {name: np.shape(tensor) for name, tensor in tensors.items()}
  if found != expected:
    raise ValueError(
      f'the tensors are not those of a TF-slim MobileNet-V1 ({num_classes} classes, '
      f'width {width}):\n' + '\n'.join(_differences(found, expected))
    )
  arrays = [_array(path, tensors[_name(path)], leaf.shape) for path, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(variables), arrays)


def _name(path: str) -> str:
  """The TF-slim name of a variable: `params/stem/kernel` -> `MobilenetV1/Conv2d_0/weights`."""
  *module, leaf = path.split('/')[1:]
  if module == ['head']:
    return f'{_ROOT}/Logits/Conv2d_1c_1x1/' + {'kernel': 'weights', 'bias': 'biases'}[leaf]
  # stem -> Conv2d_0, block_3/pointwise -> Conv2d_3_pointwise
  layer = '_'.join(module).removesuffix('_bn').replace('stem', 'Conv2d_0')
  layer = re.sub('^block_', 'Conv2d_', layer)
  if module[-1].endswith('_bn'):
    return f'{_ROOT}/{layer}/BatchNorm/{_BATCH_NORM[leaf]}'
  return f'{_ROOT}/{layer}/' + ('depthwise_weights' if 'depthwise' in module else 'weights')


def _shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that TF-slim gives to a variable of `shape`."""
  if path == 'params/head/kernel':
    return (1, 1, shape[0], shape[1] + 1)
  if path == 'params/head/bias':
    return (shape[0] + 1,)
  if path.endswith('/depthwise/kernel'):
    return (*shape[:2], shape[3], 1)
  return shape


def _array(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
  """A TF-slim tensor as the variable of `shape`."""
  if path.startswith('params/head/'):
    tensor = tensor[..., 1:]
  # copied: jnp.asarray may share the memory of the caller's array
  return jnp.array(np.reshape(tensor, shape), jnp.float32)


def _differences(
  found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
  lines = []
  for name in sorted(found.keys() | expected.keys()):
    if name not in found:
      lines.append(f'  {name}: not found, expected shape {expected[name]}')
    elif name not in expected:
      lines.append(f'  {name}: found shape {found[name]}, expected no such tensor')
    elif found[name] != expected[name]:
      lines.append(f'  {name}: found shape {found[name]}, expected {expected[name]}')
  return lines
