"""A network of `opq_jax.models` with weights in any file, and `.opq` files that say which it is.

An `.opq` file that `opq compress --model` wrote has the network's name, the source of its weights
and the number of its classes among its metadata: whoever has the file needs nothing else to run
it, to prepare images for it, or to hand it back to the framework that it came from.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from opq_jax import importers
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.correction import batch_norm, inference, noise, synthetic
from opq_jax.file.reader import OpqFile
from opq_jax.importers import Source
from opq_jax.weights import read_weights

KEYS = _NAME, _SOURCE, _CLASSES = 'model', 'source', 'num_classes'
"""What the metadata of a file call the three."""

_CIFAR_SIDE = 32  # pixels of images that no preprocessing resizes or crops
_CIFAR_BATCH = 128
_RAW_STD = 1 / 255  # of a preprocessing that leaves an image in units of its bytes
_IMAGE_STD = 0.226  # of photographs, in units where white is 1: the mean of ImageNet's three


class Network(NamedTuple):
  """A network that can be run: `model.apply(variables, images)`.

  Attributes:
    name: one of `opq_jax.models.names()`.
    model: with the padding, epsilon and stride placement that the weights were trained with.
    variables: `{'params': …, 'batch_stats': …}`.
    source: where the weights are from; its `preprocessing` belongs to them.
  """

  name: str
  model: nn.Module
  variables: Any
  source: Source


class Identity(NamedTuple):
  """What a file says about the network in it."""

  name: str
  source: str
  num_classes: int


def metadata(network: Network) -> dict[str, str]:
  """What a file must say for `identity` to find the network again."""
  return {
    _NAME: network.name,
    _SOURCE: network.source.name,
    _CLASSES: str(network.model.num_classes),
  }


def identity(found: Mapping[str, str]) -> Identity | None:
  """The network that the metadata of a file name, None where they name none.

  Raises:
    ValueError: they name one by halves, or its classes are no number.

  >>> identity({'model': 'resnet50', 'source': 'timm', 'num_classes': '1000'})
  Identity(name='resnet50', source='timm', num_classes=1000)
  >>> identity({'weights': 'net.npz'}) is None
  True
  """
  if _NAME not in found:
    return None
  missing = [key for key in KEYS if key not in found]
  classes = found.get(_CLASSES, '')
  if missing or not classes.isdecimal():
    shown = {key: found[key] for key in KEYS if key in found}
    raise ValueError(f'metadata: found {shown}, expected a name for each of {", ".join(KEYS)}')
  return Identity(found[_NAME], found[_SOURCE], int(classes))


def identity_of(path: str | os.PathLike[str]) -> Identity | None:
  """The network that a file names, None where it names none or is no `.opq` file.

  Raises:
    ValueError: as `identity`, or the file is damaged.
    OSError: it cannot be read.
  """
  if not os.fspath(path).lower().endswith('.opq'):
    return None
  with OpqFile(path) as file:
    try:
      return identity(file.metadata)
    except ValueError as error:
      raise ValueError(f'{os.fspath(path)}: {error}') from error


def load(
  path: str | os.PathLike[str],
  *,
  name: str | None = None,
  source: str | None = None,
  num_classes: int | None = None,
) -> Network:
  """A network with the weights of any file: an `.opq` file, or what `importers.load` reads.

      network = networks.load('resnet50.opq')
      network = networks.load('resnet50.pth', name='resnet50')

  Args:
    path: anything that `opq_jax.read_weights` reads, by the names of a source or by Flax's.
    name: of the network; an `.opq` file may know it.
    source: of its weights; by default what the `.opq` file says, or the one whose names the file
      has.  Flax's names belong to no source: then it is the first of `importers.sources(name)`.
    num_classes: logits, by default as many as the file has; one fewer drops logit 0, as in
      `importers.load`.

  Returns:
    The network, float32 where its weights were another framework's and bit for bit otherwise.

  Raises:
    ValueError: nobody says which network it is; a name is not known; or weights are missing, not
      expected or of other shape, all of which the message lists.
    OSError: the file cannot be read.
  """
  said = identity_of(path)
  if name is None and said is None:
    raise ValueError(
      f'{os.fspath(path)}: found no name of a network in it, expected one to be given (--model)'
    )
  if said is not None and name in (None, said.name):
    name, source = said.name, source or said.source
  assert name is not None
  leaves = trees.named_leaves(read_weights(path))
  if not any(leaf.startswith('params/') for leaf in leaves):
    imported = importers.from_tensors(name, leaves, source=source, num_classes=num_classes)
    return Network(name, *imported)
  source = source or importers.sources(name)[0].name
  return Network(
    name, *importers.from_variables(name, leaves, source=source, num_classes=num_classes)
  )


def noise_shape(source: Source) -> tuple[int, int, int, int]:
  """The noise that `opq_jax.correct_batch_norm` wants: 16 images at 224 pixels, 128 at CIFAR's 32.

  >>> noise_shape(importers.sources('resnet50')[0])
  (16, 224, 224, 3)
  """
  side = source.preprocessing.crop or _CIFAR_SIDE
  # as many pixels cost about as much; below 128 the variances of the last maps are noisy at 32
  return (_CIFAR_BATCH if side <= 2 * _CIFAR_SIDE else 16, side, side, 3)


def correct_batch_norm(
  network: Network,
  compressed: PyTree,
  seed: int = 0,
  *,
  images: Iterable[jax.Array] | None = None,
) -> PyTree:
  """`opq_jax.correct_batch_norm` of a network, with noise of its own size and units.

  Args:
    network: before compression, with BatchNorm.
    compressed: its variables after.
    seed: of the noise.
    images: batches in the place of the noise, for `opq_jax.correct_on_images`.
  """
  if images is not None:
    return batch_norm.correct_on_images(network.model.apply, network.variables, compressed, images)
  noise_key = jax.random.key(seed)
  shape = noise_shape(network.source)
  return batch_norm.correct_batch_norm(
    _apply_to_noise(network), network.variables, compressed, noise_key, shape
  )


def noise_images(network: Network, seed: int = 0) -> jax.Array:
  """`opq_jax.natural_noise` of a network's own size and units.

  Args:
    network: whose images they are to stand for.
    seed: of the noise.
  """
  images = noise.natural_noise(jax.random.key(seed), noise_shape(network.source))
  return images * _noise_scale(network)


def synthetic_batches(network: Network, seed: int = 0) -> list[jax.Array]:
  """Batches of `opq_jax.synthetic_inputs` in a network's own units: 128 images, or 256 of CIFAR's.

  Large images have 5/7 of its own side, 160 pixels of 224, which is half of the pixels, and take
  two steps: a layer behind the pooling reads one row of an image, and may have 1,280 inputs whose
  moments many rough images tell better than few exact ones
  (`experiments/benchmarks/synthetic_images.py`).  A network without BatchNorm has stored nothing of
  its inputs: then they are one of `noise_images`.

  Args:
    network: before compression.
    seed: of the noise at the start.
  """
  if not has_batch_norm(network.variables):
    return [noise_images(network, seed)]
  examples, side, _, channels = noise_shape(network.source)
  count, steps = 2, 5
  if examples != _CIFAR_BATCH:
    # a whole number of places in the last maps, which are 32 times smaller
    side = 32 * round(side * 5 / 7 / 32)
    count, steps = 8, 2
  shape, apply_fn = (examples, side, side, channels), _apply_to_noise(network)
  return [
    synthetic.synthetic_inputs(apply_fn, network.variables, key, shape, steps=steps)
    * _noise_scale(network)
    for key in jax.random.split(jax.random.key(seed), count)
  ]


def for_inference(network: Network, variables: PyTree) -> PyTree:
  """Variables of a network whose file is only to be used: a fifth less of a small network's.

  `opq_jax.fold_batch_norm`, where there is a BatchNorm, and `opq_jax.round_uncompressed`.

  Args:
    network: what the variables are of.
    variables: float or compressed, with BatchNorm as it is to be.
  """
  if has_batch_norm(variables):
    variables = inference.fold_batch_norm(variables, epsilon=network.model.epsilon)
  return inference.round_uncompressed(variables)


def _apply_to_noise(network: Network) -> Callable[..., Any]:
  """The network's `apply` for inputs of variance 1."""
  apply_fn, scale = network.model.apply, _noise_scale(network)
  # one that is recognised, so that it is compiled once
  if (scale == 1).all():
    return apply_fn
  return lambda tree, x, **options: apply_fn(tree, x * scale, **options)


def _noise_scale(network: Network) -> np.ndarray:
  """What inputs of variance 1 are to be multiplied by, [1, 1, 1, 3]."""
  std = np.asarray(network.source.preprocessing.std)
  # in units of bytes, noise of variance 1 would be so faint that BatchNorm's epsilon weighs
  scale = _IMAGE_STD / std if (std <= _RAW_STD).all() else np.ones(3)
  return scale.astype(np.float32).reshape(1, 1, 1, 3)


def has_batch_norm(variables: Mapping[str, PyTree]) -> bool:
  """Whether there is a BatchNorm to correct."""
  return bool(jax.tree.leaves(variables.get('batch_stats', {})))
