"""Compresses a language model on disk: costs of its leaves, calibrated codes, one file."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import opq_jax
from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders import DAMPING, SHARE, LeafEncoder
from opq_jax.file.coded_leaves import CodedLeaf
from opq_jax.importers.language_models import read
from opq_jax.language import feedback_gains
from opq_jax.language.block_codes import RESIDUAL, BlockEncoder
from opq_jax.language.calibration import Calibration
from opq_jax.language.leaf_costs import block_costs
from opq_jax.language.network import StoredNetwork
from opq_jax.weights import StreamedFile, coded_arrays, compress_stored
from opq_jax.weights.stored_tree import Choice, StoredTree, rounded
from opq_jax.weights.work_folder import Work, identity

COST_TOKENS = 512
"""Tokens from which costs are computed: one backward pass."""

COST_WINDOW = 64
"""Tokens of a sequence of them."""

_KEY = 3  # of the draws from the model's answers

_FLOOR = 0.1
"""Share of the mean cost of a tensor that is added to each of its outputs: an output that so few
tokens hardly use is used by others."""

_LEAST_ENERGY = 1e-6  # of the mean over outputs: one without weights has no relative error


def cost_tokens(calibration: Calibration) -> np.ndarray:
  """Returns the calibration tokens from which costs are computed.

  >>> from opq_jax.language.calibration import at_random
  >>> cost_tokens(at_random(50, count=4096, window=256)).shape
  (8, 64)
  """
  window = min(COST_WINDOW, calibration.tokens.shape[1])
  # the begins of as many sequences as there are: they are of different texts
  sequences = calibration.tokens[:, :window][: max(COST_TOKENS // window, 1)]
  return np.ascontiguousarray(sequences)


def costs(
  network: StoredNetwork,
  calibration: Calibration,
  tree: PyTree,
  *,
  damping: float | None = None,
  told: Callable[[float], Any] = lambda share: None,
) -> PyTree:
  """Returns an objective for `opq_jax.allocate`: what an error in each leaf costs the answer.

  Args:
    network: the language model.
    calibration: tokens; the first `COST_TOKENS` are read.
    tree: the leaves of the file, by the names of its tensors.
    damping: of the error feedback that will choose the codes, None where there is none.
    told: called with the share that is done.

  Returns:
    A tree like `tree` with a number at every leaf, of a kernel of a layer one for each of its
    outputs:

        sqrt(omega / E[w^2])          omega of `opq_jax.network.divergence_costs`

    times what feedback leaves of the error (`feedback_gains`).  It is the geometric mean of two
    prices of a squared error.  omega is right for small errors and the inputs that it is from, and
    takes all bits from what these few tokens hardly use; 1 / E[w^2], the relative error, gives all
    weights the same.  Where either is wrong by some factor, their mean is by its root.
  """
  key, parts = jax.random.key(_KEY), 1 if damping is None else 2
  omegas = block_costs(network, cost_tokens(calibration), key, lambda share: told(share / parts))
  found = {name: balanced(omega, read(network.tensors[name])) for name, omega in omegas.items()}
  if not all(np.isfinite(cost).all() for cost in found.values()):
    _refuse_infinite(network)
  if damping is not None:
    windows = max(feedback_gains.TOKENS // calibration.tokens.shape[1], 1)
    gains = feedback_gains.feedback_gains(
      network, calibration.tokens[:windows], damping, lambda share: told((1 + share) / 2)
    )
    found = {name: cost * gains.get(name, 1.0) for name, cost in found.items()}
  found |= {alias: found[name] for alias, name in network.tied.items()}
  # what the network does not read has no cost of its own
  typical, named = float(np.median([np.mean(x) for x in found.values()])), trees.named_leaves(tree)
  unread = [name for name, leaf in named.items() if name not in found and np.ndim(leaf) > 1]
  if unread:
    messages.warn(
      f'{messages.listed(unread)}: found tensors that the network does not read: where they are '
      'compressed, an error in them costs as much as in a typical tensor'
    )
  costs = [found.get(name, typical) for name in named]
  return jax.tree.unflatten(jax.tree.structure(tree), costs)


def _refuse_infinite(network: StoredNetwork) -> None:
  """Raises a ValueError that names a tensor from which costs are no numbers."""
  for name, tensor in network.tensors.items():
    array = read(tensor)
    if bad := array.size - int(np.count_nonzero(np.isfinite(array))):
      raise ValueError(f'{name}: found {bad} weights that are NaN or infinite, expected none')
  raise ValueError('found answers of the network that are NaN or infinite, expected numbers')


def balanced(omega: Any, weights: Any) -> Any:
  """Returns sqrt(omega / E[w^2]) of a tensor, or of each of its outputs.

  Args:
    omega: the cost of a squared error: a number, or numbers that broadcast over the tensor.
    weights: the tensor.

  >>> round(float(balanced(8.0, np.full((3, 2), 2.0, np.float32))), 4)
  1.4832
  """
  omega, squares = np.asarray(omega, np.float64), np.square(np.asarray(weights, np.float32))
  # over all axes but that of the outputs
  others = tuple(axis for axis in range(squares.ndim) if not omega.ndim or omega.shape[axis] == 1)
  energy = np.mean(squares, axis=others, keepdims=omega.ndim > 0, dtype=np.float64)
  least = max(_LEAST_ENERGY * float(np.mean(energy)), float(np.finfo(np.float32).tiny))
  return np.sqrt((omega + _FLOOR * np.mean(omega)) / np.maximum(energy, least))


def compress_calibrated(
  network: StoredNetwork,
  tree: PyTree,
  output: str | os.PathLike[str],
  calibration: Calibration,
  *,
  encoder: LeafEncoder | None = None,
  objective: str | None = None,
  share: float = SHARE,
  damping: float = DAMPING,
  stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
  **options: Any,
) -> StreamedFile:
  """Compresses a language model on disk with what calibration tokens say about its leaves.

  Bits go where an error costs the answer most (`costs`).  With an encoder, codes are then chosen
  block after block (`BlockEncoder`), each leaf in the bits that the allocation gives it.  A run
  that is killed goes on after its last whole block when it is called again with the same arguments:
  what is done is kept in the folder `OUTPUT.blocks` until the file is written.

  Args:
    network: the language model.
    tree: the leaves of the file, `StoredLeaf`s by the names of the network's tensors.
    output: the `.opq` file.
    calibration: its tokens.
    encoder: `Feedback({})` or `Trellis()`, whose moments are measured on the way; None rounds.
    objective: a named one of `opq_jax.allocate`, in the place of the costs.
    share, damping: as in `opq_jax.encoders.LayerByLayer`.
    stage: as for `opq_jax.weights.compress_stored`; costs are a stage of their own.
    **options: of `opq_jax.weights.compress_stored`.

  Raises:
    ValueError, OSError: as `opq_jax.weights.compress_stored`.
  """
  chosen: Any = objective
  if objective is None:
    with stage('costs') as told:
      chosen = costs(
        network,
        calibration,
        tree,
        damping=None if encoder is None else damping,
        told=told if callable(told) else lambda share: None,
      )
  if encoder is None:
    return compress_stored(tree, output, objective=chosen, stage=stage, **options)
  if options.get('file_rate') is not None:
    raise ValueError(
      f'file_rate: found {options["file_rate"]:g} together with codes that are chosen block after '
      'block, expected compression_rate or bits_per_weight: they would be chosen anew every time'
    )
  with Work(output) as work:
    choose = functools.partial(_chosen_codes, network, calibration, work, (encoder, share, damping))
    return compress_stored(tree, output, objective=chosen, choose=choose, stage=stage, **options)


def _chosen_codes(
  network: StoredNetwork,
  calibration: Calibration,
  work: Work,
  how: tuple[LeafEncoder, float, float],
  tree: StoredTree,
  targets: Mapping[str, Any],
  stage: Callable[[str], Any],
) -> Choice:
  """Chooses codes block after block: a chooser of `opq_jax.weights.compress_stored`.

  Args:
    network, calibration: as of `compress_calibrated`.
    work: of the run that makes the file.
    how: its encoder, share and damping.
    tree, targets, stage: of the chooser.
  """
  allocation = rounded(tree, targets, stage).allocation
  allocated, (encoder, share, damping) = tree.by_name(allocation), how
  for name, record in allocated.items():
    if record.slices:
      raise ValueError(f'{name}: found slices, expected none: a tensor is one matrix of a layer')
  own = {name: record for name, record in allocated.items() if not record.tied_to}
  bits = {name: float(record.entropy) for name, record in own.items()}
  scales = {
    name: np.asarray(record.output_scales)
    for name, record in own.items()
    if record.output_scales is not None
  }
  blocks = BlockEncoder(network, calibration.tokens, bits, encoder, scales, share, damping)
  plan = {
    'weights': identity(x.path for x in network.tensors.values() if hasattr(x, 'path')),
    'tokens': calibration.digest,
    'bits': bits,
    'scales': {name: array.ravel().tolist() for name, array in scales.items()},
    'encoder': [repr(encoder), share, damping, RESIDUAL],
    'fields': coded_arrays.FIELDS,
    'versions': [opq_jax.__version__, jax.__version__],
  }
  folder = work.open(plan)
  with stage('choose codes') as told:
    blocks.run(folder, told if callable(told) else lambda share: None)
  read = blocks.coded(folder)

  def codes(name: str) -> CodedLeaf | None:
    found = read(name)
    return None if found is None else CodedLeaf([found], ())

  return Choice(allocation, codes, folder.remove)
