"""Repeats what `opq compress` did to the original weights, for `opq verify`.

Where the weights were rounded there is nothing to repeat, and JAX is not imported.
"""

import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opq_jax.allocation.optimizer_states import is_in_optimizer
from opq_jax.cli.console import collected_warnings
from opq_jax.cli.encoding import (
  DIVERGENCE,
  ROUNDING,
  TOKENS,
  TRELLIS,
  UNCORRECTED,
  Encoding,
  channel_axis,
)
from opq_jax.cli.optimizers import without_optimizer
from opq_jax.core import temporaries, trees
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.importers.named_networks import identity
from opq_jax.weights import StoredLeaf, is_streamable, open_weights, read_weights

if TYPE_CHECKING:
  from opq_jax.cli.images import FolderImages
  from opq_jax.encoders import Encoder
  from opq_jax.importers.networks import Network


class Recomputed(NamedTuple):
  """The original weights and what a file must hold of them, as `opq_jax.report.verify` takes them.

  Leaves that `opq compress` reads one by one are `StoredLeaf`s here too.

  Attributes:
    params: the original weights.
    coded: `params` with the values whose cells the codes must name, where these are not `params`;
      the file's own where its codes were chosen for calibration tokens, which is not repeated.
    corrected: `params` with BatchNorm as it was corrected, if it was.
  """

  params: PyTree
  coded: PyTree | None
  corrected: PyTree | None


def recomputed(
  path: str, file: OpqFile, weights: str, folder: str | None, scratch: ExitStack
) -> Recomputed:
  """Reads the original weights and repeats what the metadata of a file say was done to them.

  Args:
    path: the file.
    file: the same, open for as long as the result is used.
    weights: the original weights.
    folder: the images with which the file was made, if it was made with images.
    scratch: what deletes temporary files once the result is not used any more.

  Raises:
    ValueError: the weights are not those of the network that the file names; its metadata are not
      such as `opq compress` writes; or images are missing, not needed, or other ones.
    OSError: a file cannot be read.
  """
  metadata = file.metadata
  try:
    encoding = Encoding.of(metadata)
    named = identity(metadata)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  network = None
  if named is not None:
    from opq_jax.importers import networks

    network = networks.load(
      weights, name=named.name, source=named.source, num_classes=named.num_classes
    )
  with collected_warnings():
    if network is not None:
      params = network.variables
    elif is_streamable(weights):
      params = open_weights(weights)
    else:
      params = read_weights(weights, optimizer=_keeps_optimizer(file, encoding))
  if encoding.optimizer is not None:
    params = without_optimizer(params, encoding.optimizer).tree
  images = _same_images(path, encoding, network, folder)
  coded = corrected = None
  if encoding.inputs == TOKENS:
    coded = _with_leaves_of(file, params)
  if network is None and (encoding.encoder == ROUNDING or coded is not None):
    return Recomputed(params, coded, None)

  from opq_jax.cli import steps

  with steps.calibrated(network, encoding, images, lambda _: nullcontext()) as calibration:
    if encoding.encoder != ROUNDING and coded is None:
      encoder = steps.encoder_of(network, encoding, calibration)
      objective = _objective(encoding, file, weights, params)
      coded = _coded(path, file, encoding, params, encoder, objective, scratch)
    if network is not None and encoding.batch_norm not in (None, UNCORRECTED):
      compressed = _in_memory(_with_leaves_of(file, params))
      corrected = steps.corrected(network, compressed, encoding, calibration)
  if network is not None and encoding.inference_only:
    corrected = networks.for_inference(network, params if corrected is None else corrected)
  return Recomputed(params, coded, corrected)


def _keeps_optimizer(file: OpqFile, encoding: Encoding) -> bool:
  """Returns whether a file holds the state of an optimizer, and not one number a leaf."""
  return encoding.optimizer is None and any(map(is_in_optimizer, file))


def _same_images(
  path: str, encoding: Encoding, network: 'Network | None', folder: str | None
) -> 'FolderImages | None':
  """Returns the images of a folder if they are those with which the file was made."""
  if encoding.images is None or network is None:
    if folder is not None:
      raise ValueError(f'--images: found {folder}, expected none: {path} was made without images')
    return None
  if folder is None:
    raise ValueError(
      f'{path}: found a file that was made with {encoding.images.number} images, expected '
      '--images FOLDER with the same ones'
    )
  from opq_jax.cli import steps

  images = steps.folder_images(network, folder, encoding.images.number)
  if images.images != encoding.images:
    raise ValueError(
      f'--images: found {images.images.number} other images in {folder}, expected the '
      f'{encoding.images.number} with which {path} was made'
    )
  return images


def _coded(
  path: str,
  file: OpqFile,
  encoding: Encoding,
  params: PyTree,
  encoder: 'Encoder',
  objective: Any,
  scratch: ExitStack,
) -> PyTree:
  """Returns the values of the codes that an encoder chooses of the original weights."""
  import opq_jax
  from opq_jax.cli.leaves import narrowed
  from opq_jax.weights import compress_stored

  if TRELLIS not in (encoding.encoder, encoding.first):
    # on the file's own grids, which such an encoder leaves as they are
    params = _in_memory(params)
    return encoder.choose_codes(params, file.load(like=params)[1]).params
  chosen = {name for name in file if file.grids(name)}
  # grids along a trellis are finer than the plain ones, which only the allocation knows
  names = 'bits_per_weight', 'compression_rate'
  target = {name: encoding.targets[name] for name in names if name in encoding.targets}
  if not target:
    raise ValueError(
      f'{path}: found targets {encoding.targets}, expected the compression_rate or '
      'bits_per_weight of codes along a trellis'
    )
  slices = lambda name, _: file.slices(name)
  options: dict[str, Any] = {
    'encoder': encoder,
    'compressible': lambda name, _: name in chosen,
    'channel_axis': channel_axis(file.metadata, slices),
    'slices': slices,
    'objective': objective,
    **target,
  }
  leaves = trees.named_leaves(params).values()
  with collected_warnings():
    if not any(isinstance(leaf, StoredLeaf) for leaf in leaves):
      return opq_jax.compress(narrowed(params, chosen), **options).params
    # leaf by leaf, as the file was made: its codes again, in a file that is deleted afterwards
    folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix='opq_verify_'))
    scratch.enter_context(temporaries.registered(folder))
    again = Path(folder) / 'again.opq'
    compress_stored(narrowed(params, chosen), again, contexts=False, **options)
    return _with_leaves_of(scratch.enter_context(OpqFile(again)), params)


def _objective(encoding: Encoding, file: OpqFile, weights: str, params: PyTree) -> Any:
  """Returns the objective of the allocation that a file was made with."""
  from opq_jax.allocation import OBJECTIVES

  if encoding.objective != DIVERGENCE:
    return encoding.objective or OBJECTIVES[0]
  from opq_jax.cli import calibration
  from opq_jax.cli.leaf_by_leaf import costs_of_slices
  from opq_jax.language import costs

  language = calibration.network_in(Path(weights), is_needed=True)
  assert language is not None
  objective = costs(language, calibration.cost_tokens(language), params)
  return costs_of_slices(objective, params, lambda name, _: name in file and file.slices(name))


def _with_leaves_of(file: OpqFile, params: PyTree) -> PyTree:
  """Returns the original weights with a file's compressed leaves, not read yet, in their places."""
  shapes = {name: tuple(leaf.shape) for name, leaf in trees.named_leaves(params).items()}
  return trees.replaced(
    params,
    {
      name: StoredLeaf('the file', name, file.shape(name), file.dtype(name), file.__getitem__)
      for name in file
      if file.grids(name) and file.shape(name) == shapes.get(name)
    },
  )


def _in_memory(tree: PyTree) -> PyTree:
  """Returns a tree with its stored leaves read."""
  named = trees.named_leaves(tree).items()
  read = {name: leaf.read() for name, leaf in named if isinstance(leaf, StoredLeaf)}
  return trees.replaced(tree, read)
