"""Weights of `keras.applications`: ResNet50, VGG16, MobileNet and MobileNetV2.

Keras' kernels are HWIO and its dense ones [in, out], as Flax's are; a depthwise kernel has its
last two axes the other way round.  Two things differ in ResNet50 and VGG16, which Keras has from
Caffe:

  * Images have blue first.  The first kernel's input channels are turned around instead, so that
    the network sees them as every other here does: exactly the same sum in another order.
  * ResNet50's convolutions have a bias b in front of a BatchNorm of running mean m.  Since
    (x + b) - m = x - (m - b), the mean takes the bias over; `opq_jax.models.ResNet` has none.
    Weights that go home have biases of zero.

MobileNet's convolutions of stride 2 pad the right and the bottom by 1, as 'SAME' does for maps of
even size: those of 224 pixels, and of all multiples of 32.
"""

from collections.abc import Callable, Mapping

import numpy as np

from opq_jax.data import datasets as data
from opq_jax.importers.conversion import Layer, Layout, Leaf, Source

_NORM = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}
_CONV, _MEAN = '_conv/', '_bn/moving_mean'

Tensors = Mapping[str, np.ndarray]


def place(layer: Layer, leaf: Leaf) -> tuple[str, Layout]:
  """The name and the layout of a leaf in a file, as `opq_jax.read_weights` names it.

  >>> place(Layer('conv1', 'conv1_bn'), Leaf('var', (32,), is_norm=True))[0]
  'conv1_bn/moving_variance'
  >>> place(Layer('conv_dw_1'), Leaf('kernel', (3, 3, 1, 32), is_depthwise=True))[1].theirs
  (3, 3, 32, 1)
  """
  if leaf.is_norm:
    return f'{layer.norm}/{_NORM[leaf.kind]}', Layout.reshaped(leaf.shape, leaf.shape)
  name = f'{layer.weights}/{leaf.kind}'
  if leaf.is_depthwise:
    return name, Layout.transposed(leaf.shape, (0, 1, 3, 2))
  # MobileNet's head is a convolution there
  is_conv = layer.weights == 'conv_preds' and leaf.kind == 'kernel'
  return name, Layout.reshaped(leaf.shape, (1, 1, *leaf.shape) if is_conv else leaf.shape)


def turned(first: str) -> Callable[[Tensors], dict[str, np.ndarray]]:
  """A function that turns the input channels of the first kernel around; its own inverse.

  >>> kernel = np.arange(6).reshape(1, 1, 3, 2)
  >>> turned('stem/kernel')({'stem/kernel': kernel})['stem/kernel'].tolist()
  [[[[4, 5], [2, 3], [0, 1]]]]
  """

  def turn(tensors: Tensors) -> dict[str, np.ndarray]:
    kernel = tensors.get(first, np.zeros(0))
    return {**tensors, first: kernel[:, :, ::-1]} if np.ndim(kernel) == 4 else dict(tensors)

  return turn


_turn_resnet, _turn_vgg = turned('conv1_conv/kernel'), turned('block1_conv1/kernel')


def without_biases(tensors: Tensors) -> dict[str, np.ndarray]:
  """ResNet50's tensors with the biases in the running means, and red first.

  >>> tensors = {'a_conv/bias': np.ones(2), 'a_bn/moving_mean': np.array([3.0, 4.0])}
  >>> without_biases(tensors)
  {'a_bn/moving_mean': array([2., 3.])}
  """
  folded = _turn_resnet(tensors)
  for name in [name for name in folded if name.endswith(f'{_CONV}bias')]:
    mean = name.removesuffix(f'{_CONV}bias') + _MEAN
    # what does not fit stays, for the importer to name it
    if mean in folded and np.shape(folded[mean]) == np.shape(folded[name]):
      folded[mean] = folded[mean] - folded.pop(name)
  return folded


def with_biases(tensors: Tensors) -> dict[str, np.ndarray]:
  """ResNet50's tensors with biases of zero, and blue first.

  >>> sorted(with_biases({'a_conv/kernel': np.ones((1, 1, 8, 2), np.float32)}))
  ['a_conv/bias', 'a_conv/kernel']
  """
  kernels = {name: kernel for name, kernel in tensors.items() if name.endswith(f'{_CONV}kernel')}
  biases = {
    name.removesuffix('kernel') + 'bias': np.zeros(np.shape(kernel)[-1:], kernel.dtype)
    for name, kernel in kernels.items()
  }
  return _turn_resnet(tensors) | biases


def _resnet(module: str) -> Layer:
  return Layer(f'{module}_conv', f'{module}_bn')


def _v2_block(number: int, layer: str) -> Layer:
  """The first block does not expand, and its name says so; the others are counted from it."""
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
  prepare=without_biases,
  restore=with_biases,
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
  prepare=_turn_vgg,
  restore=_turn_vgg,
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
