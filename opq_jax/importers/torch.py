"""Weights of PyTorch networks, by the names of torchvision, timm, Hugging Face and akamaster.

PyTorch's kernels are OIHW, those of dense layers [out, in].  Before a dense layer PyTorch flattens
a map in the order [channels, rows, columns], Flax in the order [rows, columns, channels].
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

from opq_jax import data
from opq_jax.importers.layouts import Layer, Layout, Leaf, Source

_WEIGHTS = {'kernel': 'weight', 'bias': 'bias'}
_NORM = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
_HWIO_TO_OIHW = (3, 2, 0, 1)

Layers = dict[str, Callable[..., Layer]]


def place(layer: Layer, leaf: Leaf) -> tuple[str, Layout]:
  """Returns the name and the layout of a leaf in a state dict.

  >>> place(Layer('conv1', 'bn1'), Leaf('var', (64,), is_norm=True))[0]
  'bn1.running_var'
  >>> name, layout = place(Layer('classifier.1', pixels=36), Leaf('kernel', (9216, 4096)))
  >>> name, layout.view, layout.source_shape
  ('classifier.1.weight', (36, 256, 4096), (4096, 9216))
  """
  if leaf.is_norm:
    return f'{layer.norm}.{_NORM[leaf.kind]}', Layout.reshaped(leaf.shape, leaf.shape)
  name = f'{layer.weights}.{_WEIGHTS[leaf.kind]}'
  if len(leaf.shape) != 2:
    axes = _HWIO_TO_OIHW if leaf.kind == 'kernel' else (0,)
    return name, Layout.transposed(leaf.shape, axes)
  inputs, outputs = leaf.shape
  view = (layer.pixels, inputs // layer.pixels, outputs)
  return name, Layout(leaf.shape, view, (2, 1, 0), (outputs, inputs))


def _sequential(weights: str) -> Layer:
  """Returns a layer of a `torch.nn.Sequential`, whose BatchNorm has the next index."""
  module, _, index = weights.rpartition('.')
  return Layer(weights, f'{module}.{int(index) + 1}')


def _huggingface(module: str) -> Layer:
  return Layer(f'{module}.convolution', f'{module}.normalization')


_ALEXNET_LAYERS: Layers = {
  'conv_#': lambda n: Layer(f'features.{(0, 3, 6, 8, 10)[n - 1]}'),
  'dense_#': lambda n: Layer(f'classifier.{(1, 4)[n - 1]}', pixels=36 if n == 1 else 1),
  'head': lambda: Layer('classifier.6'),
}

_VGG_DENSE_LAYERS: Layers = {
  'dense_#': lambda n: Layer(f'classifier.{(0, 3)[n - 1]}', pixels=49 if n == 1 else 1),
  'head': lambda: Layer('classifier.6'),
}

# indices of a torch.nn.Sequential: convolution, (BatchNorm,) ReLU; a pooling after every stack
_VGG_LAYERS: Layers = _VGG_DENSE_LAYERS | {
  'conv_#_#': lambda s, n: Layer(f'features.{(0, 5, 10, 17, 24)[s - 1] + 2 * (n - 1)}'),
}
_VGG_BN_LAYERS: Layers = _VGG_DENSE_LAYERS | {
  'conv_#_#': lambda s, n: _sequential(f'features.{(0, 7, 14, 24, 34)[s - 1] + 3 * (n - 1)}'),
}

_RESNET_LAYERS: Layers = {
  'stem': lambda: Layer('conv1', 'bn1'),
  'stage_#_block_#/conv_#': lambda s, b, c: Layer(
    f'layer{s}.{b - 1}.conv{c}', f'layer{s}.{b - 1}.bn{c}'
  ),
  'stage_#_block_#/shortcut': lambda s, b: _sequential(f'layer{s}.{b - 1}.downsample.0'),
  'head': lambda: Layer('fc'),
}
_CIFAR_RESNET_LAYERS: Layers = _RESNET_LAYERS | {'head': lambda: Layer('linear')}
_HUGGINGFACE_RESNET_LAYERS: Layers = {
  'stem': lambda: _huggingface('resnet.embedder.embedder'),
  'stage_#_block_#/conv_#': lambda s, b, c: _huggingface(
    f'resnet.encoder.stages.{s - 1}.layers.{b - 1}.layer.{c - 1}'
  ),
  'stage_#_block_#/shortcut': lambda s, b: _huggingface(
    f'resnet.encoder.stages.{s - 1}.layers.{b - 1}.shortcut'
  ),
  'head': lambda: Layer('classifier.1'),
}

_HUGGINGFACE_V1_LAYERS: Layers = {
  'stem': lambda: _huggingface('mobilenet_v1.conv_stem'),
  'block_#/depthwise': lambda b: _huggingface(f'mobilenet_v1.layer.{2 * b - 2}'),
  'block_#/pointwise': lambda b: _huggingface(f'mobilenet_v1.layer.{2 * b - 1}'),
  'head': lambda: Layer('classifier'),
}
_TIMM_V1_LAYERS: Layers = {
  'stem': lambda: Layer('conv_stem', 'bn1'),
  'block_#/depthwise': lambda b: Layer(f'{_timm_block(b)}.conv_dw', f'{_timm_block(b)}.bn1'),
  'block_#/pointwise': lambda b: Layer(f'{_timm_block(b)}.conv_pw', f'{_timm_block(b)}.bn2'),
  'head': lambda: Layer('classifier'),
}

# block 1 has no expansion: the indices of its other layers are lower by one
_TORCHVISION_V2_LAYERS: Layers = {
  'stem': lambda: _sequential('features.0.0'),
  'block_#/expand': lambda b: _sequential(f'features.{b}.conv.0.0'),
  'block_#/depthwise': lambda b: _sequential(f'features.{b}.conv.{int(b > 1)}.0'),
  'block_#/project': lambda b: _sequential(f'features.{b}.conv.{int(b > 1) + 1}'),
  'last': lambda: _sequential('features.18.0'),
  'head': lambda: Layer('classifier.1'),
}
_HUGGINGFACE_V2_LAYERS: Layers = {
  'stem': lambda: _huggingface('mobilenet_v2.conv_stem.first_conv'),
  'block_#/expand': lambda b: _huggingface(f'{_huggingface_block(b)}.expand_1x1'),
  'block_#/depthwise': lambda b: _huggingface(f'{_huggingface_block(b)}.conv_3x3'),
  'block_#/project': lambda b: _huggingface(f'{_huggingface_block(b)}.reduce_1x1'),
  'last': lambda: _huggingface('mobilenet_v2.conv_1x1'),
  'head': lambda: Layer('classifier'),
}


def _timm_block(number: int) -> str:
  """Returns the module of a block; timm groups the 13 blocks by the size of their maps."""
  starts = (1, 2, 4, 6, 12)  # first block of each group
  group = bisect.bisect(starts, number) - 1
  return f'blocks.{group}.{number - starts[group]}'


def _huggingface_block(number: int) -> str:
  return 'mobilenet_v2.conv_stem' if number == 1 else f'mobilenet_v2.layer.{number - 2}'


def _source(name: str, layers: Layers, preprocessing: data.Preprocessing, **options: Any) -> Source:
  # BatchNorm's count of training steps is ignored
  return Source(name, layers, place, preprocessing, options, ignored=('num_batches_tracked',))


_BICUBIC = dataclasses.replace(data.TORCHVISION, resample='bicubic')
# torchvision's second set of weights (IMAGENET1K_V2) differs in preprocessing, not in names
_TORCHVISION_2 = dataclasses.replace(data.TORCHVISION, resize=232)
_TIMM = dataclasses.replace(_BICUBIC, resize=235)
_TIMM_V1 = dataclasses.replace(data.TF_SLIM, resample='bicubic')
# Hugging Face's MobileNets were converted from TensorFlow
_TENSORFLOW = {'padding': 'SAME', 'epsilon': 0.001}

_MOBILENET_V1 = (_source('huggingface', _HUGGINGFACE_V1_LAYERS, data.TF_SLIM, **_TENSORFLOW),)
_SMALL_RESNET = (
  _source('torchvision', _RESNET_LAYERS, data.TORCHVISION),
  _source('huggingface', _HUGGINGFACE_RESNET_LAYERS, _BICUBIC),
)
_LARGE_RESNET = (*_SMALL_RESNET, _source('torchvision_v2', _RESNET_LAYERS, _TORCHVISION_2))

SOURCES: dict[str, tuple[Source, ...]] = {
  'alexnet': (_source('torchvision', _ALEXNET_LAYERS, data.TORCHVISION),),
  'vgg16': (_source('torchvision', _VGG_LAYERS, data.TORCHVISION),),
  'vgg16_bn': (_source('torchvision', _VGG_BN_LAYERS, data.TORCHVISION),),
  'mobilenet_v1': (
    *_MOBILENET_V1,
    _source('timm', _TIMM_V1_LAYERS, _TIMM_V1, padding='HALF', epsilon=1e-5),
  ),
  'mobilenet_v1_075': _MOBILENET_V1,
  'mobilenet_v1_050': _MOBILENET_V1,
  'mobilenet_v2': (
    _source('torchvision', _TORCHVISION_V2_LAYERS, data.TORCHVISION),
    _source('torchvision_v2', _TORCHVISION_V2_LAYERS, _TORCHVISION_2),
    _source('huggingface', _HUGGINGFACE_V2_LAYERS, data.TF_SLIM, **_TENSORFLOW),
  ),
  'resnet18': _SMALL_RESNET,
  'resnet34': _SMALL_RESNET,
  'resnet50': (*_LARGE_RESNET, _source('timm', _RESNET_LAYERS, _TIMM)),
  'resnet101': _LARGE_RESNET,
  # names and preprocessing of akamaster/pytorch_resnet_cifar10 on GitHub
  **{
    f'resnet{depth}': (_source('akamaster', _CIFAR_RESNET_LAYERS, data.CIFAR),)
    for depth in (20, 32, 44, 56, 110)
  },
}
"""The sources of each network of `opq_jax.models`; of two with equal names the first is assumed."""
