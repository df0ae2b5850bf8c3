"""Weights of `keras.applications`: ResNet50, VGG16, MobileNet and MobileNetV2.

Kernels are HWIO, those of dense layers [in, out], as in Flax; a depthwise kernel has its last two
axes exchanged.  ResNet50 and VGG16 come from Caffe and differ in two more ways:

  * Their images are BGR.  The importer reverses the input channels of the first kernel instead, so
    that the network reads RGB images.
  * ResNet50's convolutions have a bias b before a BatchNorm of running mean m.  Since
    (x + b) - m = x - (m - b), the bias is subtracted from the mean; `opq_jax.models.ResNet` has no
    such bias.  Exported weights have biases of zero.

MobileNet's convolutions of stride 2 pad the right and the bottom by 1, which equals 'SAME' for maps
of even size: images of 224 pixels, or any multiple of 32.
"""

from collections.abc import Callable

import numpy as np

from opq_jax import data
from opq_jax.importers.layouts import Layer, Layout, Leaf, Source, Tensors

_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
_CONV, _MEAN = '_conv/', '_bn/moving_mean'


def place(layer: Layer, leaf: Leaf) -> tuple[str, Layout]:
  """Returns the name, as `opq_jax.weights.read_weights` returns it, and the layout of a leaf.

  >>> place(Layer('conv1', 'conv1_bn'), Leaf('var', (32,), is_norm=True))[0]
  'conv1_bn/moving_variance'
  >>> place(Layer('conv_dw_1'), Leaf('kernel', (3, 3, 1, 32), is_depthwise=True))[1].source_shape
  (3, 3, 32, 1)
  """
  if leaf.is_norm:
    return f'{layer.norm}/{_NORM[leaf.kind]}', Layout.reshaped(leaf.shape, leaf.shape)
  name = f'{layer.weights}/{leaf.kind}'
  if leaf.is_depthwise:
    return name, Layout.transposed(leaf.shape, (0, 1, 3, 2))
  # the last layer of Keras' MobileNet is a 1x1 convolution
  is_conv = layer.weights == 'conv_preds' and leaf.kind == 'kernel'
  return name, Layout.reshaped(leaf.shape, (1, 1, *leaf.shape) if is_conv else leaf.shape)


def reverse_channels(first: str) -> Callable[[Tensors], dict[str, np.ndarray]]:
  """Returns a function that exchanges BGR and RGB in a network's first kernel; its own inverse.

  >>> kernel = np.arange(6).reshape(1, 1, 3, 2)
  >>> reverse_channels('stem/kernel')({'stem/kernel': kernel})['stem/kernel'].tolist()
  [[[[4, 5], [2, 3], [0, 1]]]]
  """

  def reverse(tensors: Tensors) -> dict[str, np.ndarray]:
    kernel = tensors.get(first, np.zeros(0))
    return {**tensors, first: kernel[:, :, ::-1]} if np.ndim(kernel) == 4 else dict(tensors)

  return reverse


_reverse_resnet = reverse_channels('conv1_conv/kernel')
_reverse_vgg = reverse_channels('block1_conv1/kernel')


def prepare_resnet(tensors: Tensors) -> dict[str, np.ndarray]:
  """Returns ResNet50's tensors for RGB images, with the biases inside the running means.

  >>> tensors = {'a_conv/bias': np.ones(2), 'a_bn/moving_mean': np.array([3.0, 4.0])}
  >>> prepare_resnet(tensors)
  {'a_bn/moving_mean': array([2., 3.])}
  """
  folded = _reverse_resnet(tensors)
  for name in [name for name in folded if name.endswith(f'{_CONV}bias')]:
    mean = name.removesuffix(f'{_CONV}bias') + _MEAN
    # a bias that fits no mean stays, so that the importer's error names it
    if mean in folded and np.shape(folded[mean]) == np.shape(folded[name]):
      folded[mean] = folded[mean] - folded.pop(name)
  return folded


def restore_resnet(tensors: Tensors) -> dict[str, np.ndarray]:
  """Returns ResNet50's tensors for BGR images, with biases of zero.

  >>> sorted(restore_resnet({'a_conv/kernel': np.ones((1, 1, 8, 2), np.float32)}))
  ['a_conv/bias', 'a_conv/kernel']
  """
  kernels = {name: kernel for name, kernel in tensors.items() if name.endswith(f'{_CONV}kernel')}
  biases = {
    name.removesuffix('kernel') + 'bias': np.zeros(np.shape(kernel)[-1:], kernel.dtype)
    for name, kernel in kernels.items()
  }
  return _reverse_resnet(tensors) | biases


def _resnet(module: str) -> Layer:
  return Layer(f'{module}_conv', f'{module}_bn')


def _v2_block(number: int, layer: str) -> Layer:
  """Returns a layer of a block; Keras calls block 1 `expanded_conv` and block 2 `block_1`."""
  module = 'expanded_conv' if number == 1 else f'block_{number - 1}'
  return Layer(f'{module}_{layer}', f'{module}_{layer}_BN')


RESNET50 = Source(
  'keras',
  {
    'stem': lambda: _resnet('conv1'),
    'stage_#_block_#/conv_#': lambda s, b, c: _resnet(f'conv{s + 1}_block{b}_{c}'),
    'stage_#_block_#/shortcut': lambda s, b: _resnet(f'conv{s + 1}_block{b}_0'),
    'head': lambda: Layer('predictions'),
  },
  place,
  data.CAFFE,
  {'stride_first': True, 'epsilon': 1.001e-5},
  prepare=prepare_resnet,
  restore=restore_resnet,
)

VGG16 = Source(
  'keras',
  {
    'conv_#_#': lambda s, n: Layer(f'block{s}_conv{n}'),
    'dense_#': lambda n: Layer(f'fc{n}'),
    'head': lambda: Layer('predictions'),
  },
  place,
  data.CAFFE,
  prepare=_reverse_vgg,
  restore=_reverse_vgg,
)

_TENSORFLOW = {'padding': 'SAME', 'epsilon': 0.001}

MOBILENET_V1 = Source(
  'keras',
  {
    'stem': lambda: Layer('conv1', 'conv1_bn'),
    'block_#/depthwise': lambda b: Layer(f'conv_dw_{b}', f'conv_dw_{b}_bn'),
    'block_#/pointwise': lambda b: Layer(f'conv_pw_{b}', f'conv_pw_{b}_bn'),
    'head': lambda: Layer('conv_preds'),
  },
  place,
  data.TF_SLIM,
  _TENSORFLOW,
)

MOBILENET_V2 = Source(
  'keras',
  {
    'stem': lambda: Layer('Conv1', 'bn_Conv1'),
    'block_#/expand': lambda b: _v2_block(b, 'expand'),
    'block_#/depthwise': lambda b: _v2_block(b, 'depthwise'),
    'block_#/project': lambda b: _v2_block(b, 'project'),
    'last': lambda: Layer('Conv_1', 'Conv_1_bn'),
    'head': lambda: Layer('predictions'),
  },
  place,
  data.TF_SLIM,
  _TENSORFLOW,
)

SOURCES: dict[str, tuple[Source, ...]] = {
  'vgg16': (VGG16,),
  'mobilenet_v1': (MOBILENET_V1,),
  'mobilenet_v1_075': (MOBILENET_V1,),
  'mobilenet_v1_050': (MOBILENET_V1,),
  'mobilenet_v2': (MOBILENET_V2,),
  'resnet50': (RESNET50,),
}
"""The sources of each network of `opq_jax.models`."""
