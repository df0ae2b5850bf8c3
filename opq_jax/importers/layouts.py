"""How a framework names the leaves of a network and orders their axes.

A `Source` maps every leaf of the variables of `opq_jax.models` to the name and the `Layout` of a
tensor of the framework.  The mapping is written down once, from Flax to the framework; it is a
bijection, so the other direction follows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.data import Preprocessing

Shape = tuple[int, ...]
Tensors = Mapping[str, np.ndarray]

_NUMBER = re.compile(r'\d+')


class Layout(NamedTuple):
  """The map from a Flax leaf to a framework's tensor: reshape to `view`, permute axes, reshape.

  Attributes:
    flax_shape: shape of the Flax leaf.
    view: intermediate shape with as many elements.
    axes: permutation of the axes of the view.
    source_shape: shape of the framework's tensor.

  >>> layout = Layout((3, 3, 8, 16), (3, 3, 8, 16), (3, 2, 0, 1), (16, 8, 3, 3))  # HWIO -> OIHW
  >>> array = np.arange(1152).reshape(3, 3, 8, 16)
  >>> layout.to_source(array).shape
  (16, 8, 3, 3)
  >>> bool((layout.to_flax(layout.to_source(array)) == array).all())
  True
  """

  flax_shape: Shape
  view: Shape
  axes: tuple[int, ...]
  source_shape: Shape

  @classmethod
  def transposed(cls, flax_shape: Shape, axes: tuple[int, ...]) -> 'Layout':
    """Returns the layout that permutes the axes and nothing else."""
    return cls(flax_shape, flax_shape, axes, tuple(flax_shape[axis] for axis in axes))

  @classmethod
  def reshaped(cls, flax_shape: Shape, source_shape: Shape) -> 'Layout':
    """Returns the layout that reshapes and keeps the order of the elements."""
    return cls(flax_shape, flax_shape, tuple(range(len(flax_shape))), source_shape)

  def to_source(self, array: np.ndarray) -> np.ndarray:
    """Returns the framework's tensor of a Flax leaf."""
    return array.reshape(self.view).transpose(self.axes).reshape(self.source_shape)

  def to_flax(self, array: np.ndarray) -> np.ndarray:
    """Returns the Flax leaf of a framework's tensor; the inverse of `to_source`."""
    # `argsort` of a permutation is its inverse
    permuted = array.reshape([self.view[axis] for axis in self.axes])
    return permuted.transpose(np.argsort(self.axes)).reshape(self.flax_shape)


class Layer(NamedTuple):
  """The framework's modules of a layer; tensor names begin with them.

  Attributes:
    weights: the module of kernel and bias.
    norm: the module of the layer's BatchNorm.
    pixels: pixels of the flattened map that a dense layer reads, 1 for any other layer.
  """

  weights: str
  norm: str = ''
  pixels: int = 1


class Leaf(NamedTuple):
  """A leaf of a Flax layer.

  Attributes:
    kind: Flax's name of it: kernel, bias, scale, mean or var.
    shape: its shape.
    is_norm: whether it belongs to a BatchNorm.
    is_depthwise: whether it is the kernel of a depthwise convolution.
  """

  kind: str
  shape: Shape
  is_norm: bool = False
  is_depthwise: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
  """A framework's weights of a network: tensor names, layouts and the preprocessing of images.

  Attributes:
    name: the public name, such as 'torchvision'.
    layers: from the path of a Flax layer, with every number replaced by '#', to a function of these
      numbers that returns the framework's `Layer`.
    place: returns the tensor name and the layout of a leaf of a layer.
    preprocessing: the preprocessing that the weights were trained with.
    options: attributes of the model that reproduce the framework's network.
    ignored: suffixes of tensor names that hold no weights of the network.
    prepare: turns the tensors of a file into the tensors that `place` names, one for each Flax
      leaf: conversions beyond names and layouts, such as folding a bias into a mean.
    restore: the inverse of `prepare`.
  """

  name: str
  layers: Mapping[str, Callable[..., Layer]]
  place: Callable[[Layer, Leaf], tuple[str, Layout]]
  preprocessing: Preprocessing
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  prepare: Callable[[Tensors], dict[str, np.ndarray]] = dict
  restore: Callable[[Tensors], dict[str, np.ndarray]] = dict

  def places(self, shapes: PyTree) -> dict[str, tuple[str, Layout]]:
    """Returns the tensor name and the layout of every leaf of a model's variables, by its path."""
    return {
      path: self._place(path, tuple(leaf.shape))
      for path, leaf in trees.named_leaves(shapes).items()
    }

  def _place(self, path: str, shape: Shape) -> tuple[str, Layout]:
    # without the collection: scale and bias of a BatchNorm are params, mean and variance are not
    module, _, kind = path.partition('/')[2].rpartition('/')
    layer = module.removesuffix('_bn')
    is_norm = layer != module
    is_depthwise = not is_norm and layer.endswith('depthwise')
    names = self.layers[_NUMBER.sub('#', layer)](*map(int, _NUMBER.findall(layer)))
    return self.place(names, Leaf(kind, shape, is_norm, is_depthwise))
