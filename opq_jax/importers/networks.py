"""Networks of `opq_jax.models` with weights from any file, and what a file says of its network.

The metadata of an `.opq` file that `opq compress --model` wrote name the network, the source of its
weights and the number of its classes.  With the file alone the network can be run, images can be
prepared for it, and its weights can be written under the names of the framework they came from.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from opq_jax import correction, importers
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.importers.named_networks import CLASSES, NAME, SOURCE, identity_of
from opq_jax.weights import read_weights

if TYPE_CHECKING:
  import flax.linen as nn
  import jax

  from opq_jax.importers.layouts import Source

_CIFAR_SIDE = 32  # pixels: images of a preprocessing without resizing and cropping
_CIFAR_BATCH = 128  # images of 32 pixels, about the arithmetic of three of 224
_LARGE_BATCH = 16  # images of 224 pixels
_RAW_STD = 1 / 255  # std of a preprocessing that keeps an image in units of its bytes
_IMAGE_STD = 0.226  # std of photographs where white is 1: the mean of ImageNet's three channels


class Network(NamedTuple):
  """A network that can be run: `model.apply(variables, images)`.

  Attributes:
    name: one of `opq_jax.models.names()`.
    model: the module, with the padding, epsilon and strides that the weights were trained with.
    variables: `{'params': …, 'batch_stats': …}`.
    source: origin of the weights, with their `preprocessing`.
  """

  name: str
  model: 'nn.Module'
  variables: Any
  source: 'Source'


def metadata(network: Network) -> dict[str, str]:
  """Returns the metadata from which `named_networks.identity` finds the network again."""
  return {
    NAME: network.name,
    SOURCE: network.source.name,
    CLASSES: str(network.model.num_classes),
  }


def load(
  path: str | os.PathLike[str],
  *,
  name: str | None = None,
  source: str | None = None,
  num_classes: int | None = None,
) -> Network:
  """Loads a network from any file: an `.opq` file, or a file that `importers.load` reads.

      network = networks.load('resnet50.opq')
      network = networks.load('resnet50.pth', name='resnet50')

  Args:
    path: a file that `opq_jax.weights.read_weights` reads, under the names of a source or Flax's.
    name: name of the network; not needed for an `.opq` file that names it.
    source: name of the weights' source.  By default the one in the `.opq` file's metadata, else
      the source whose tensor names the file has; for Flax's names, which belong to no source, the
      first of `importers.sources(name)`.
    num_classes: number of logits, by default that of the file; one fewer drops logit 0, as in
      `importers.load`.

  Returns:
    The network: float32 from another framework's weights, bit for bit from Flax's.

  Raises:
    ValueError: neither `name` nor the file names the network; a name is not known; or weights are
      missing, not expected or of other shape, and the message lists them all.
    OSError: the file cannot be read.
  """
  named = identity_of(path)
  if name is None and named is None:
    raise ValueError(
      f'{os.fspath(path)}: found no name of a network in it, expected one to be given (--model)'
    )
  if named is not None and name in (None, named.name):
    name, source = named.name, source or named.source
  assert name is not None
  leaves = trees.named_leaves(read_weights(path))
  if not any(leaf.startswith('params/') for leaf in leaves):
    imported = importers.from_tensors(name, leaves, source=source, num_classes=num_classes)
    return Network(name, *imported)
  source = source or importers.sources(name)[0].name
  return Network(
    name, *importers.from_variables(name, leaves, source=source, num_classes=num_classes)
  )


def noise_shape(source: 'Source') -> tuple[int, int, int, int]:
  """Returns the shape of the noise batch for the BatchNorm correction.

  16 images of 224 pixels, or 128 of CIFAR's 32.

  >>> noise_shape(importers.sources('resnet50')[0])
  (16, 224, 224, 3)
  """
  side = source.preprocessing.crop or _CIFAR_SIDE
  # below 128 images of 32 pixels the variances of the last, smallest maps are noisy
  return (_CIFAR_BATCH if side <= 2 * _CIFAR_SIDE else _LARGE_BATCH, side, side, 3)


def correct_batch_norm(
  network: Network,
  compressed: PyTree,
  seed: int = 0,
  *,
  images: 'Iterable[jax.Array] | None' = None,
) -> PyTree:
  """Corrects the BatchNorm statistics of a compressed network.

  `opq_jax.correction.correct_batch_norm` with noise of the network's own size and units, or
  `opq_jax.correction.correct_on_images`.

  Args:
    network: the network before compression, with BatchNorm.
    compressed: the variables after compression.
    seed: seed of the noise.
    images: batches of images, as the network reads them, in the place of the noise.

  Returns:
    `compressed` with corrected statistics and a corrected bias of the last layer.
  """
  import jax

  if images is not None:
    return correction.correct_on_images(network.model.apply, network.variables, compressed, images)
  noise_key = jax.random.key(seed)
  shape = noise_shape(network.source)
  return correction.correct_batch_norm(
    _apply_to_noise(network), network.variables, compressed, noise_key, shape
  )


def noise_images(network: Network, seed: int = 0) -> 'jax.Array':
  """Returns a batch of `opq_jax.correction.natural_noise` in a network's own size and units.

  Args:
    network: the network that will read the batch.
    seed: seed of the noise.
  """
  import jax

  images = correction.natural_noise(jax.random.key(seed), noise_shape(network.source))
  return images * _noise_scale(network)


def synthetic_batches(network: Network, seed: int = 0) -> 'list[jax.Array]':
  """Returns batches of synthetic calibration images in a network's own units.

  128 images of `opq_jax.correction.synthetic_inputs`, or 256 of CIFAR's size.  Large images have
  5/7 of the network's own side, 160 pixels of 224, which is half of the pixels, and take
  two steps: a layer behind the pooling reads one row of an image, and may have 1,280 inputs, whose
  moments are estimated better from many rough images than from few exact ones
  (`experiments/benchmarks/accuracy/synthetic_images.py`).
  A network without BatchNorm stores no statistics of its inputs, so its batch is `noise_images`.

  Args:
    network: the network before compression.
    seed: seed of the noise that the images begin as.
  """
  import jax

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
    correction.synthetic_inputs(apply_fn, network.variables, key, shape, steps=steps)
    * _noise_scale(network)
    for key in jax.random.split(jax.random.key(seed), count)
  ]


def for_inference(network: Network, variables: PyTree) -> PyTree:
  """Returns variables for inference only, whose file is smaller: a fifth for a small network.

  Applies `opq_jax.correction.fold_batch_norm`, where there is BatchNorm, and `round_uncompressed`.

  Args:
    network: the network that the variables belong to.
    variables: its variables, compressed or not, with BatchNorm already corrected.
  """
  if has_batch_norm(variables):
    variables = correction.fold_batch_norm(variables, epsilon=network.model.epsilon)
  return correction.round_uncompressed(variables)


def _apply_to_noise(network: Network) -> Callable[..., Any]:
  """Returns the network's `apply` for inputs of variance 1."""
  apply_fn, scale = network.model.apply, _noise_scale(network)
  # `model.apply` itself hashes alike in every call, so that it is compiled once
  if (scale == 1).all():
    return apply_fn
  return lambda tree, x, **options: apply_fn(tree, x * scale, **options)


def _noise_scale(network: Network) -> np.ndarray:
  """Returns the factor from inputs of variance 1 to the network's units, [1, 1, 1, 3]."""
  std = np.asarray(network.source.preprocessing.std)
  # in units of bytes, noise of variance 1 is so faint that BatchNorm's epsilon distorts it
  scale = _IMAGE_STD / std if (std <= _RAW_STD).all() else np.ones(3)
  return scale.astype(np.float32).reshape(1, 1, 1, 3)


def has_batch_norm(variables: Mapping[str, PyTree]) -> bool:
  """Returns whether variables have BatchNorm statistics."""
  return bool(trees.named_leaves(variables.get('batch_stats', {})))
