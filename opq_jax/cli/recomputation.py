"""Repeats what `opq compress` did to the original weights, for `opq verify`."""

from typing import Any, NamedTuple

import jax

import opq_jax
from opq_jax import encoders
from opq_jax.allocation import OBJECTIVES
from opq_jax.cli.console import collected_warnings
from opq_jax.cli.in_memory import (
  ALONG_TRELLIS,
  BY_BOTH,
  BY_FEEDBACK,
  FROM_NOISE,
  FROM_SYNTHETIC,
  INFERENCE_ONLY,
)
from opq_jax.cli.leaves import channel_axis, narrowed
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.importers import networks
from opq_jax.weights import read_weights


class Recomputed(NamedTuple):
  """The original weights and what a file must hold of them.

  Attributes:
    params: the original weights.
    coded: `params` with the values whose cells the codes must name, where these are not `params`.
    corrected: `params` with BatchNorm as it was corrected, if it was.
  """

  params: PyTree
  coded: PyTree | None
  corrected: PyTree | None


def recomputed(path: str, weights: str) -> Recomputed:
  """Reads the original weights and repeats what the metadata of a file say was done to them.

  Raises:
    ValueError: the weights are not those of the network that the file names, or its metadata are
      not such as `opq compress` writes.
    OSError: a file cannot be read.
  """
  with OpqFile(path) as file:
    metadata = file.metadata
  identity = networks.identity(metadata)
  coded = corrected = images = moments = None
  if identity is None:
    params = read_weights(weights)
  else:
    network = networks.load(
      weights, name=identity.name, source=identity.source, num_classes=identity.num_classes
    )
    params = network.variables
    if metadata.get('codes') in (BY_FEEDBACK, BY_BOTH):
      images = networks.synthetic_batches(network)
      moments = opq_jax.network.mean_moments(network.model.apply, params, images)
    if metadata.get('codes') == BY_FEEDBACK:
      with OpqFile(path) as file:
        state = file.load(like=params)[1]
      coded, _ = encoders.Feedback(moments).choose_codes(params, state)
    if metadata.get('batch_norm') in (FROM_NOISE, FROM_SYNTHETIC):
      compressed = _compressed_in(path, params)
      corrected = networks.correct_batch_norm(network, compressed, images=images)
    if metadata.get('inference_only') == INFERENCE_ONLY:
      corrected = networks.for_inference(network, params if corrected is None else corrected)
  if metadata.get('codes') in (ALONG_TRELLIS, BY_BOTH):
    coded = _along_trellis(path, metadata, params, moments)
  return Recomputed(params, coded, corrected)


def _along_trellis(
  path: str, metadata: dict[str, str], params: PyTree, moments: PyTree | None
) -> PyTree:
  """Returns what `opq compress --trellis` makes of the original weights for the file's targets."""
  with OpqFile(path) as file:
    chosen = {name for name in file if file.leaf_state(name) is not None}
  targets = dict(part.partition('=')[::2] for part in metadata.get('targets', '').split())
  names = 'bits_per_weight', 'compression_rate'
  try:
    target: dict[str, Any] = next({name: float(targets[name])} for name in names if name in targets)
  except (StopIteration, ValueError) as error:
    raise ValueError(
      f'{path}: found targets {metadata.get("targets")!r}, expected the compression_rate or '
      'bits_per_weight of codes along a trellis'
    ) from error
  with collected_warnings():
    coded, *_ = opq_jax.compress(
      narrowed(params, chosen),
      **target,
      encoder=encoders.Trellis(moments),
      objective=metadata.get('objective', OBJECTIVES[0]),
      compressible=lambda path, _: path in chosen,
      channel_axis=channel_axis(metadata),
    )
  return coded


def _compressed_in(path: str, params: PyTree) -> PyTree:
  """Returns the original weights with a file's compressed leaves in their places."""
  with OpqFile(path) as file:

    def chosen(name: str, leaf: Any) -> Any:
      if name not in file or file.leaf_state(name) is None or file[name].shape != leaf.shape:
        return leaf
      return file[name]

    leaves = [chosen(name, leaf) for name, leaf in trees.named_leaves(params).items()]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)
