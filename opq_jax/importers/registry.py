"""Weights of any known source by the name of their network."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from opq_jax import models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.importers import conversion, keras, tf_slim, torch
from opq_jax.importers.conversion import Leaf, Source
from opq_jax.weights import files as weight_files

_FAMILIES = (tf_slim.SOURCES, torch.SOURCES, keras.SOURCES)
_WRAPPER = 'module.'  # how torch.nn.DataParallel begins every name


class Imported(NamedTuple):
  """A network that computes what its source's does: `model.apply(variables, images)`.

  Attributes:
    model: with the padding, epsilon and stride placement that the weights were trained with.
    variables: `{'params': …, 'batch_stats': …}`, float32.
    source: where they are from; its `preprocessing` belongs to them.
  """

  model: nn.Module
  variables: dict[str, Any]
  source: Source


def sources(name: str) -> tuple[Source, ...]:
  """Where weights of a network may come from.

  Raises:
    ValueError: the name is not one of `opq_jax.models.names()`.

  >>> [source.name for source in sources('mobilenet_v1')]
  ['tf_slim', 'huggingface', 'timm', 'keras']
  """
  models.create(name)  # which knows what names there are
  return tuple(source for family in _FAMILIES for source in family.get(name, ()))


def load(
  name: str,
  path: str | os.PathLike[str],
  *,
  source: str | None = None,
  num_classes: int | None = None,
  **options: Any,
) -> Imported:
  """A network with the weights in a file, whatever framework they are from.

      model, variables, source = importers.load('resnet50', 'resnet50.pth')
      logits = model.apply(variables, source.preprocessing(image)[None])

  Args:
    name: one of `opq_jax.models.names()`.
    path: anything that `opq_jax.read_weights` reads.
    source: the name of one of `sources(name)`; by default, the one whose names the file has most
      of.  timm and torchvision's second weights have torchvision's names in a ResNet: they differ
      in preprocessing alone, and only who says so gets theirs.
    num_classes: logits, by default as many as the file has.  One fewer drops logit 0, which
      TensorFlow's ImageNet networks (TF-slim's, and what Hugging Face has of them) keep for no
      class.
    **options: further attributes of the model; see `opq_jax.models.create`.

  Returns:
    The model, its variables and the source.

  Raises:
    ValueError: a name is not known, or tensors are missing, not expected or of other shape; the
      message lists them all.
    OSError: the file cannot be read.
  """
  tensors = trees.named_leaves(weight_files.read_weights(path))
  return from_tensors(name, tensors, source=source, num_classes=num_classes, **options)


def from_tensors(
  name: str,
  tensors: Mapping[str, np.ndarray],
  *,
  source: str | None = None,
  num_classes: int | None = None,
  **options: Any,
) -> Imported:
  """As `load`, from the tensors by their names.

  >>> from_tensors('resnet20', {'conv1.weight': np.zeros((16, 3, 3, 3))})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ValueError: the tensors are not those of akamaster's resnet20 (10 classes):
    bn1.bias: not found, expected shape (16,)
    ...
  """
  if tensors and all(key.startswith(_WRAPPER) for key in tensors):
    tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in tensors.items()}
  chosen = _recognised(name, tensors) if source is None else _named(name, source)
  found = _classes(chosen, tensors)
  has_background = found is not None and num_classes == found - 1
  if found is not None and (num_classes is None or has_background):
    options |= {'num_classes': found}
  elif num_classes is not None:
    options |= {'num_classes': num_classes}
  model = models.create(name, **{**chosen.options, **options})
  variables = conversion.to_variables(model, chosen, tensors, _what(name, chosen, model))
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
  """As `load`, from variables of this library, which a file of its own holds.

  Args:
    name: one of `opq_jax.models.names()`.
    variables: of that network; or a flat dict of them by path, `params/head/kernel`.
    source: the name of one of `sources(name)`, where they once came from.
    num_classes: as in `load`.
    **options: further attributes of the model; see `opq_jax.models.create`.

  Raises:
    ValueError: a name is not known, or leaves are missing, not expected or of other shape; the
      message lists them all.
  """
  chosen = _named(name, source)
  options |= _own_classes(variables)
  model = models.create(name, **{**chosen.options, **options})
  tree = conversion.checked(model, variables, _what(name, chosen, model))
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
  """The way back: variables, compressed ones too, as a source's named tensors.

      tensors = importers.to_tensors('resnet50', compressed, 'torchvision')
      torch_model.load_state_dict({key: torch.from_numpy(t) for key, t in tensors.items()})

  Args:
    name: one of `opq_jax.models.names()`.
    variables: of that network, with any number of classes.
    source: the name of one of `sources(name)`.
    **options: attributes of the model, if `load` was given any.

  Returns:
    The tensors by their names, float32 and bit for bit those of `variables`.  BatchNorm's
    `num_batches_tracked` is not among them; PyTorch does without.  Keras' are `<layer>/<weight>`,
    for `layer.set_weights([tensors[f'{layer.name}/{weight.name}'] for weight in layer.weights])`.

  Raises:
    ValueError: a name is not known, or leaves are missing, not expected or of other shape; the
      message lists them all.
  """
  chosen = _named(name, source)
  options |= _own_classes(variables)
  model = models.create(name, **{**chosen.options, **options})
  return conversion.to_tensors(model, chosen, variables, _what(name, chosen, model))


def _named(name: str, source: str) -> Source:
  known = {candidate.name: candidate for candidate in sources(name)}
  if source not in known:
    raise ValueError(f'source: found {source!r}, expected one of {", ".join(known)} for {name}')
  return known[source]


def _recognised(name: str, tensors: Mapping[str, np.ndarray]) -> Source:
  """The source that gives the most tensors the names which they have."""
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


def _classes(source: Source, tensors: Mapping[str, np.ndarray]) -> int | None:
  """How many logits the tensors have, None if that of their bias is not among them."""
  name, _ = source.place(source.layers['head'](), Leaf('bias', (1,)))
  shape = np.shape(tensors[name]) if name in tensors else ()
  return shape[0] if len(shape) == 1 else None


def _own_classes(variables: PyTree) -> dict[str, int]:
  """How many logits variables have, as an option of their model."""
  shape = np.shape(trees.named_leaves(variables).get(conversion.HEAD_BIAS, 0))
  return {'num_classes': shape[0]} if len(shape) == 1 else {}


def _what(name: str, source: Source, model: nn.Module) -> str:
  return f"{source.name}'s {name} ({model.num_classes} classes)"
