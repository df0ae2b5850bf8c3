"""Steps that `opq compress` takes and `opq verify` repeats, as an `Encoding` describes them."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opq_jax import encoders
from opq_jax.cli.encoding import (
  FEEDBACK,
  IMAGES,
  LAYER_BY_LAYER,
  SYNTHETIC,
  TRELLIS,
  UNCORRECTED,
  Encoding,
)
from opq_jax.cli.images import FolderImages, read_images
from opq_jax.cli.stages import Stage
from opq_jax.core import temporaries
from opq_jax.core.trees import PyTree
from opq_jax.importers import networks
from opq_jax.importers.networks import Network
from opq_jax.network import mean_moments, moment_bytes

MOMENTS_IN_MEMORY = 2**28
"""Bytes of moments beyond which they lie on disk, where temporary files do: those of ResNet-50 take
half a gigabyte, those of VGG-16 two and a half."""


class Calibration(NamedTuple):
  """Calibration images of a network, and the moments that they give its layers.

  Attributes:
    batches: of one size, as the network reads them.
    moments: as `opq_jax.network.mean_moments` returns them, None where no encoder reads them.
  """

  batches: Sequence[Any]
  moments: PyTree | None


def folder_images(network: Network, folder: str, max_images: int) -> FolderImages:
  """Reads images from a folder as a network needs them."""
  batch_size, side, _, _ = networks.noise_shape(network.source)
  return read_images(
    folder,
    network.source.preprocessing,
    side=side,
    batch_size=batch_size,
    max_images=max_images,
  )


@contextlib.contextmanager
def calibrated(
  network: Network | None, encoding: Encoding, images: FolderImages | None, stage: Stage
) -> Iterator[Calibration]:
  """Yields the calibration images that an encoding reads, and their moments.

  Moments that are large lie in a temporary folder until the context ends.

  Args:
    network: the float network, None where only weights are known.
    encoding: how the file is made.
    images: from a folder; they take the place of synthetic ones.
    stage: what synthesis and moments run in.
  """
  sources = {encoding.moments, encoding.inputs, encoding.batch_norm}
  if network is None or not sources & {SYNTHETIC, IMAGES}:
    yield Calibration([], None)
    return
  if images is not None:
    batches: Sequence[Any] = [jnp.asarray(batch) for batch in images.batches]
  else:
    with stage('synthetic images'):
      batches = jax.block_until_ready(networks.synthetic_batches(network))
  if encoding.moments is None:
    yield Calibration(batches, None)
    return
  apply, variables = network.model.apply, network.variables
  with contextlib.ExitStack() as kept:
    folder = None
    if moment_bytes(apply, variables, batches[0]) > MOMENTS_IN_MEMORY:
      folder = kept.enter_context(tempfile.TemporaryDirectory(prefix='opq_moments_'))
      kept.enter_context(temporaries.registered(folder))
    with stage('moments'):
      moments = jax.block_until_ready(mean_moments(apply, variables, batches, folder=folder))
    yield Calibration(batches, moments)


def encoder_of(
  network: Network | None, encoding: Encoding, calibration: Calibration
) -> encoders.Encoder:
  """Returns the encoder that an encoding names."""
  is_joint = encoding.encoder == LAYER_BY_LAYER
  name = encoding.first if is_joint else encoding.encoder
  first: encoders.LeafEncoder = encoders.Rounding()
  if name == TRELLIS:
    first = encoders.Trellis(calibration.moments, version=encoding.trellis_version or 1)
  elif name == FEEDBACK:
    first = encoders.Feedback(calibration.moments)
  if not is_joint:
    return first
  assert network is not None
  return encoders.LayerByLayer(
    network.model.apply, jnp.concatenate(calibration.batches), first=first
  )


def corrected(
  network: Network, compressed: PyTree, encoding: Encoding, calibration: Calibration
) -> PyTree:
  """Returns compressed variables with BatchNorm as an encoding corrects it."""
  if encoding.batch_norm in (None, UNCORRECTED):
    return compressed
  images = calibration.batches if encoding.batch_norm in (SYNTHETIC, IMAGES) else None
  return networks.correct_batch_norm(network, compressed, images=images)
