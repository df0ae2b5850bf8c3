"""Variables of `opq_jax.models` <-> the flat, named tensors of another framework.

A source says, for every leaf of the variables, what the framework calls it and how it lies there.
Both are written down in one direction, from Flax; the other direction follows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from opq_jax import models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.data.datasets import Preprocessing

Shape = tuple[int, ...]

HEAD_BIAS = 'params/head/bias'
_NUMBER = re.compile(r'\d+')


class Layout(NamedTuple):
  """How an array of this library lies elsewhere: seen as `view`, its axes permuted, reshaped.

  A bijection for every choice of the four.

  Attributes:
    ours: the shape here.
    view: a shape of as many elements.
    axes: a permutation of the view's axes.
    theirs: the shape there.

  >>> layout = Layout((3, 3, 8, 16), (3, 3, 8, 16), (3, 2, 0, 1), (16, 8, 3, 3))  # HWIO -> OIHW
  >>> array = np.arange(1152).reshape(3, 3, 8, 16)
  >>> layout.to_theirs(array).shape
  (16, 8, 3, 3)
  >>> bool((layout.to_ours(layout.to_theirs(array)) == array).all())
  True
  """

  ours: Shape
  view: Shape
  axes: tuple[int, ...]
  theirs: Shape

  @classmethod
  def transposed(cls, ours: Shape, axes: tuple[int, ...]) -> 'Layout':
    """The same axes in another order."""
    return cls(ours, ours, axes, tuple(ours[axis] for axis in axes))

  @classmethod
  def reshaped(cls, ours: Shape, theirs: Shape) -> 'Layout':
    """The same order of elements in another shape."""
    return cls(ours, ours, tuple(range(len(ours))), theirs)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    return array.reshape(self.view).transpose(self.axes).reshape(self.theirs)

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    permuted = array.reshape([self.view[axis] for axis in self.axes])
    return permuted.transpose(np.argsort(self.axes)).reshape(self.ours)


class Layer(NamedTuple):
  """What another framework calls a layer of ours, before the names of its tensors.

  Attributes:
    weights: the module that holds kernel and bias.
    norm: that of the BatchNorm which belongs to it.
    pixels: of the map that a dense layer reads flattened, 1 for any other layer.
  """

  weights: str
  norm: str = ''
  pixels: int = 1


class Leaf(NamedTuple):
  """One of our leaves, for a framework to place.

  Attributes:
    kind: the Flax name: kernel, bias, scale, mean or var.
    shape: of it.
    is_norm: whether it belongs to a BatchNorm.
    is_depthwise: whether it is the kernel of a depthwise convolution.
  """

  kind: str
  shape: Shape
  is_norm: bool = False
  is_depthwise: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
  """Where weights come from: their names, their layout, and what they expect of an image.

  Attributes:
    name: as users know it, such as 'torchvision'.
    layers: from the path of a layer of ours, every number in it replaced by '#', to a function of
      these numbers that says what the source calls it.
    place: the name and the layout of one leaf of a layer there.
    preprocessing: what prepares an image for these weights.
    options: attributes that the model must have to compute what the source's network does.
    ignored: ends of names of tensors that say nothing about the network.
    prepare: from the tensors as they are in a file to those that `place` names, which are as many
      as our leaves: what is no matter of names and layouts.
    restore: the way back.
  """

  name: str
  layers: Mapping[str, Callable[..., Layer]]
  place: Callable[[Layer, Leaf], tuple[str, Layout]]
  preprocessing: Preprocessing
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  prepare: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
  restore: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict

  def places(self, shapes: PyTree) -> dict[str, tuple[str, Layout]]:
    """The name and the layout of every leaf of a model's variables, by its path."""
    return {
      path: self._place(path, tuple(leaf.shape))
      for path, leaf in trees.named_leaves(shapes).items()
    }

  def _place(self, path: str, shape: Shape) -> tuple[str, Layout]:
    module, _, kind = path.partition('/')[2].rpartition('/')
    layer = module.removesuffix('_bn')
    is_norm = layer != module
    is_depthwise = not is_norm and layer.endswith('depthwise')
    named = self.layers[_NUMBER.sub('#', layer)](*map(int, _NUMBER.findall(layer)))
    return self.place(named, Leaf(kind, shape, is_norm, is_depthwise))


def to_variables(
  model: nn.Module, source: Source, tensors: Mapping[str, np.ndarray], what: str
) -> dict[str, Any]:
  """The variables of `model` from the tensors of `source`.

  Args:
    model: the network, with as many logits as the tensors have.
    source: where they are from.
    tensors: all of the network's by their names there, and nothing else but what is ignored.
    what: the tensors ought to be, for the message of an error.

  Returns:
    `{'params': …}`, and `'batch_stats'` if there is a BatchNorm; float32.

  Raises:
    ValueError: tensors are missing, not expected, or of other shape; the message lists them all.
  """
  shapes = models.variable_shapes(model)
  places = source.places(shapes)
  tensors = source.prepare(tensors)
  found = {name: np.shape(tensor) for name, tensor in tensors.items()}
  found = {name: shape for name, shape in found.items() if not name.endswith(source.ignored)}
  expected = {name: layout.theirs for name, layout in places.values()}
  if found != expected:
    lines = differences(found, expected)
    raise ValueError('\n'.join([f'the tensors are not those of {what}:', *lines]))
  # copied: jnp.asarray may share the memory of the caller's array
  arrays = [
    jnp.array(layout.to_ours(np.asarray(tensors[name])), jnp.float32)
    for name, layout in places.values()
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def to_tensors(
  model: nn.Module, source: Source, variables: PyTree, what: str
) -> dict[str, np.ndarray]:
  """The tensors that `source` has for `variables`: the inverse of `to_variables`, bit for bit.

  But for what `prepare` took out for good: Keras' biases in front of a BatchNorm.

  Raises:
    ValueError: leaves are missing, not expected, or of other shape; the message lists them all.
  """
  shapes = models.variable_shapes(model)
  leaves = trees.named_leaves(checked(model, variables, what))
  tensors = source.restore(
    {
      name: layout.to_theirs(np.asarray(leaves[path]))
      for path, (name, layout) in source.places(shapes).items()
    }
  )
  # copied: an array of JAX's memory is read-only, and one of permuted axes is out of order
  return {name: np.array(tensor, order='C') for name, tensor in tensors.items()}


def checked(model: nn.Module, variables: PyTree, what: str) -> dict[str, Any]:
  """The variables, or a flat dict of them by path, as the tree that `model` has.

  Raises:
    ValueError: leaves are missing, not expected, or of other shape; the message lists them all.
  """
  shapes = models.variable_shapes(model)
  leaves = trees.named_leaves(variables)
  found = {path: np.shape(leaf) for path, leaf in leaves.items()}
  expected = {path: tuple(leaf.shape) for path, leaf in trees.named_leaves(shapes).items()}
  if found != expected:
    lines = differences(found, expected)
    raise ValueError('\n'.join([f'the variables are not those of {what}:', *lines]))
  return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[path] for path in expected])


def without_background(variables: dict[str, Any]) -> dict[str, Any]:
  """The variables without logit 0, which TensorFlow's ImageNet networks keep for no class."""
  head = {name: leaf[..., 1:] for name, leaf in variables['params']['head'].items()}
  return variables | {'params': variables['params'] | {'head': head}}


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
  """A line for every name that is missing, not expected, or of other shape."""
  lines = []
  for name in sorted(found.keys() | expected.keys()):
    if name not in found:
      lines.append(f'  {name}: not found, expected shape {expected[name]}')
    elif name not in expected:
      lines.append(f'  {name}: found shape {found[name]}, expected no such tensor')
    elif found[name] != expected[name]:
      lines.append(f'  {name}: found shape {found[name]}, expected {expected[name]}')
  return lines
