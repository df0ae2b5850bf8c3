"""Weights of every known framework by the name of their network."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from opq_jax import models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.importers import conversion, keras, tf_slim, torch
from opq_jax.importers.layouts import Leaf, Source, Tensors
from opq_jax.models import registry as model_registry
from opq_jax.weights import read_weights

if TYPE_CHECKING:
  import flax.linen as nn

_FAMILIES = (tf_slim.SOURCES, torch.SOURCES, keras.SOURCES)
_WRAPPER = 'module.'  # prefix of every name in a checkpoint of torch.nn.DataParallel


class Imported(NamedTuple):
  """A network with imported weights, run as `model.apply(variables, images)`.

  Attributes:
    model: the network with the padding, epsilon and stride placement of its training.
    variables: `{'params': …, 'batch_stats': …}`, float32.
    source: the framework's names, layouts and preprocessing of images.
  """

  model: 'nn.Module'
  variables: dict[str, Any]
  source: Source


def sources(name: str) -> tuple[Source, ...]:
  """Returns the sources whose weights of a network can be imported.

  Raises:
    ValueError: the name is not one of `opq_jax.models.names()`.

  >>> [source.name for source in sources('mobilenet_v1')]
  ['tf_slim', 'huggingface', 'timm', 'keras']
  """
  model_registry.check_name(name)
  return tuple(source for family in _FAMILIES for source in family.get(name, ()))


def load(
  name: str,
  path: str | os.PathLike[str],
  *,
  source: str | None = None,
  num_classes: int | None = None,
  **options: Any,
) -> Imported:
  """Returns a network with the weights of a file, from any known framework.

      model, variables, source = importers.load('resnet50', 'resnet50.pth')
      logits = model.apply(variables, source.preprocessing(image)[None])

  Args:
    name: one of `opq_jax.models.names()`.
    path: any file that `opq_jax.weights.read_weights` reads.
    source: the name of one of `sources(name)`; by default the source with the most tensor names in
      common with the file.  timm and torchvision's second set of ResNet weights use torchvision's
      names with another preprocessing: name these two sources to get their preprocessing.
    num_classes: number of logits, by default that of the file.  One fewer drops logit 0, the
      background class of TensorFlow's ImageNet networks (TF-slim, and Hugging Face's conversions).
    **options: further attributes of the model; see `opq_jax.models.create`.

  Returns:
    The model, its variables and the source.

  Raises:
    ValueError: a name is unknown, or tensors are missing, unexpected or of another shape; the
      message lists all of them.
    OSError: the file cannot be read.
  """
  tensors = trees.named_leaves(read_weights(path))
  return from_tensors(name, tensors, source=source, num_classes=num_classes, **options)


def from_tensors(
  name: str,
  tensors: Tensors,
  *,
  source: str | None = None,
  num_classes: int | None = None,
  **options: Any,
) -> Imported:
  """Returns a network with the given tensors as weights; see `load`.

  >>> from_tensors('resnet20', {'conv1.weight': np.zeros((16, 3, 3, 3))})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: the tensors are not those of akamaster's resnet20 (10 classes):
    bn1.bias: not found, expected shape (16,)
    ...
  """
  if tensors and all(key.startswith(_WRAPPER) for key in tensors):
    tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in tensors.items()}
  chosen = _detected_source(name, tensors) if source is None else _source(name, source)
  classes = _class_count(chosen, tensors)
  has_background = classes is not None and num_classes == classes - 1
  if classes is not None and (num_classes is None or has_background):
    options |= {'num_classes': classes}
  elif num_classes is not None:
    options |= {'num_classes': num_classes}
  model = models.create(name, **{**chosen.options, **options})
  variables = conversion.to_variables(model, chosen, tensors, _description(name, chosen, model))
  if has_background:
    model = model.clone(num_classes=num_classes)
    variables = conversion.without_background(variables)
  return Imported(model, variables, chosen)


def from_variables(
  name: str,
  variables: PyTree,
  *,
  source: str,
  num_classes: int | None = None,
  **options: Any,
) -> Imported:
  """Returns a network with the given Flax variables, such as those of an `.opq` file.

  Args:
    name: one of `opq_jax.models.names()`.
    variables: variables of that network, or a flat dict of them by path (`params/head/kernel`).
    source: the name of one of `sources(name)`: the framework that the weights were imported from.
    num_classes: see `load`.
    **options: further attributes of the model; see `opq_jax.models.create`.

  Raises:
    ValueError: a name is unknown, or leaves are missing, unexpected or of another shape; the
      message lists all of them.
  """
  chosen = _source(name, source)
  options |= _classes_option(variables)
  model = models.create(name, **{**chosen.options, **options})
  tree = conversion.checked(model, variables, _description(name, chosen, model))
  if num_classes is not None and num_classes == model.num_classes - 1:
    model = model.clone(num_classes=num_classes)
    tree = conversion.without_background(tree)
  elif num_classes not in (None, model.num_classes):
    raise ValueError(
      f'num_classes: found {num_classes}, expected the {model.num_classes} of the variables, or '
      'one fewer'
    )
  return Imported(model, tree, chosen)


def to_tensors(name: str, variables: PyTree, source: str, **options: Any) -> dict[str, np.ndarray]:
  """Returns variables, compressed or not, as the named tensors of a framework.

      tensors = importers.to_tensors('resnet50', compressed, 'torchvision')
      torch_model.load_state_dict({key: torch.from_numpy(t) for key, t in tensors.items()})

  Args:
    name: one of `opq_jax.models.names()`.
    variables: variables of that network, with any number of classes.
    source: the name of one of `sources(name)`.
    **options: the attributes of the model that `load` was given.

  Returns:
    The tensors by name, float32, with the bits of `variables`.  BatchNorm's `num_batches_tracked`
    is left out: PyTorch does not need it.  Tensors of Keras are named `<layer>/<weight>`, for
    `layer.set_weights([tensors[f'{layer.name}/{weight.name}'] for weight in layer.weights])`.

  Raises:
    ValueError: a name is unknown, or leaves are missing, unexpected or of another shape; the
      message lists all of them.
  """
  chosen = _source(name, source)
  options |= _classes_option(variables)
  model = models.create(name, **{**chosen.options, **options})
  return conversion.to_tensors(model, chosen, variables, _description(name, chosen, model))


def _source(name: str, source: str) -> Source:
  """Returns a source of a network by its name, checked."""
  known = {candidate.name: candidate for candidate in sources(name)}
  if source not in known:
    raise ValueError(f'source: found {source!r}, expected one of {", ".join(known)} for {name}')
  return known[source]


def _detected_source(name: str, tensors: Tensors) -> Source:
  """Returns the source with the most tensor names in common with `tensors`; on ties the first."""
  candidates = sources(name)
  shapes = models.variable_shapes(models.create(name))
  names = [[key for key, _ in source.places(shapes).values()] for source in candidates]
  shared = [len(tensors.keys() & set(keys)) for keys in names]
  if not any(shared):
    expected = '; '.join(
      f'{source.name}: {", ".join(keys[-3:])}, …'
      for source, keys in zip(candidates, names, strict=True)
    )
    some = ', '.join(sorted(tensors)[:3])
    raise ValueError(f'{name}: found tensors {some}, …, expected those of {expected}')
  return candidates[shared.index(max(shared))]


def _class_count(source: Source, tensors: Tensors) -> int | None:
  """Returns the number of logits, None if the tensors lack the bias of the last layer."""
  name, _ = source.place(source.layers['head'](), Leaf('bias', (1,)))
  shape = np.shape(tensors[name]) if name in tensors else ()
  return shape[0] if len(shape) == 1 else None


def _classes_option(variables: PyTree) -> dict[str, int]:
  """Returns the number of logits of variables as an option of their model."""
  shape = np.shape(trees.named_leaves(variables).get(conversion.HEAD_BIAS, 0))
  return {'num_classes': shape[0]} if len(shape) == 1 else {}


def _description(name: str, source: Source, model: 'nn.Module') -> str:
  """Returns the words for a source's network in error messages."""
  return f"{source.name}'s {name} ({model.num_classes} classes)"
