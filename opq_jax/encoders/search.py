"""Compresses a network to a target, whatever the encoder: the verb `opq_jax.compress`.

Allocation predicts the bits of rounded codes.  Codes by error feedback, or along a trellis, have
other bits on the same grids, so the allocation whose codes have the bits asked is searched for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from opq_jax.allocation import (
  Allocation,
  BitsPerWeight,
  LeafAllocation,
  Objective,
  allocate,
  check_file_rate,
  check_targets,
)
from opq_jax.compression import CompressionState, init_state
from opq_jax.core import messages, trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.trees import PyTree
from opq_jax.encoders.allocation_search import quietly, search_allocation
from opq_jax.encoders.encoder import Encoded, Encoder, LeafEncoder
from opq_jax.encoders.feedback import Feedback
from opq_jax.encoders.layer_by_layer import LayerByLayer, TracedNetwork
from opq_jax.encoders.rounding import Rounding
from opq_jax.encoders.tied_codes import with_ties
from opq_jax.file import writer
from opq_jax.file.rate import bits_of_file
from opq_jax.network import InputMoments

_ROUNDING = Rounding()


def slices_of_encoder(
  encoder: Encoder, params: PyTree, network: TracedNetwork | None = None
) -> Callable[[str, Any], int] | None:
  """Returns how many leading axes of a leaf count slices, as an encoder knows it; or None.

  A `LayerByLayer` knows it from its function, `network`, and other encoders from their moments.
  """
  if network is not None:
    known = {leaf.name: leaf.slices for leaf in network.used}
  else:
    moments = getattr(encoder, 'moments', None)
    names = trees.named_leaves(params)
    of_leaves = [None] * len(names) if moments is None else trees.beside(params, moments)
    known = {
      name: found.slices
      for name, found in zip(names, of_leaves, strict=True)
      if isinstance(found, InputMoments)
    }
  return (lambda path, _: known.get(path, 0)) if any(known.values()) else None


class CompressedNetwork(NamedTuple):
  """A compressed network.

  Attributes:
    params: the tree with decoded values at compressed leaves; the other leaves as they came.
    state: grids and masks of the compressed leaves, for `opq_jax.save(path, params, state)`.
    allocation: what the plain grids were made from, `opq_jax.init_state(params, allocation)`.
  """

  params: PyTree
  state: CompressionState
  allocation: Allocation


def compress(
  params: PyTree,
  *,
  sparsity: float | None = None,
  bits: float | None = None,
  compression_rate: float | None = None,
  bits_per_weight: float | None = None,
  file_rate: float | None = None,
  encoder: Encoder = _ROUNDING,
  objective: Objective | PyTree = 'balanced_error',
  compressible: Callable[[str, Any], bool] | None = None,
  channel_axis: ChannelAxes | Callable[[str, Any], ChannelAxes] | None = None,
  slices: Callable[[str, Any], int] | None = None,
  usage: PyTree | None = None,
  palette_bits: int | None = None,
  corrected: bool = True,
) -> CompressedNetwork:
  """Compresses a parameter tree to one target, with the codes that an encoder chooses.

  With the default encoder this is `allocate`, `init_state` and `apply_compression`.  The
  predictions of `allocate` are for rounded codes; with another encoder, `compress` searches for the
  allocation whose codes by this encoder have the bits of the target.  Plain grids and encoder
  always belong together: a `LayerByLayer` gets the grids of the allocation that was found for its
  `first`.

  Args:
    params: any pytree of arrays: params, or whole Flax variables.
    sparsity, bits: the share of weights to prune, and bits per surviving weight: the targets of the
      paper (`opq_jax.allocate`).  Only with `Rounding()`, since other encoders choose the mask.
    compression_rate: 32 over `bits_per_weight`; 10 where no target is given.
    bits_per_weight: entropy of the codes, per weight of the compressed leaves.
    file_rate: bytes of the tree over bytes of its `.opq` file; the file is that small, or up to
      0.3 % smaller.  Searched for by writing files in memory, ten at the most.
    encoder: a value of `opq_jax.encoders`: `Rounding()`, `Feedback(moments)`, `Trellis(moments)` or
      `LayerByLayer(fn, inputs, first)`.
    objective, compressible, channel_axis, slices, usage, palette_bits, corrected: as in
      `opq_jax.allocate`.  Palettes need `Rounding()` or `Feedback(moments)`.  Without `slices` and
      `usage`, slices are those of the encoder's moments, or of the function that it walks.

  Returns:
    A `CompressedNetwork(params, state, allocation)`.

  Raises:
    ValueError: `encoder` is not an encoder, does not go with the target, or searches in a trace;
      and where `allocate` or the encoder raises it.

  >>> import opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 256))}
  >>> network = compress(params, compression_rate=16.0, encoder=opq_jax.encoders.Trellis())
  >>> round(opq_jax.size_report(network.params, network.state).entropy_rate)
  16
  """
  if not isinstance(encoder, Encoder):
    raise ValueError(
      f'encoder: found {encoder!r}, expected a value of opq_jax.encoders: Rounding(), '
      'Feedback(moments), Trellis(moments) or LayerByLayer(fn, inputs, first)'
    )
  targets: dict[str, Any] = {
    'sparsity': sparsity,
    'bits': bits,
    'compression_rate': compression_rate,
    'bits_per_weight': bits_per_weight,
  }
  options: dict[str, Any] = {
    'objective': objective,
    'compressible': compressible,
    'channel_axis': channel_axis,
    'slices': slices,
    'usage': usage,
    'palette_bits': palette_bits,
    'corrected': corrected,
  }
  if palette_bits is not None and not isinstance(encoder, Rounding | Feedback):
    raise ValueError(
      f'palette_bits: found it together with {encoder!r}, expected Rounding() or '
      'Feedback(moments): other encoders choose grids of their own'
    )
  network = None
  if isinstance(encoder, LayerByLayer) and not trees.is_traced(params):
    network = encoder.traced(params)
  if slices is None and usage is None and not trees.is_traced(params):
    options['slices'] = slices_of_encoder(encoder, params, network)
  if isinstance(encoder, Rounding):
    allocation = allocate(params, **targets, file_rate=file_rate, **options)
    return CompressedNetwork(
      *encoder.choose_codes(params, init_state(params, allocation)), allocation
    )
  if trees.is_traced((params, targets, file_rate)):
    raise ValueError(
      f'encoder: found {encoder!r} in a trace, expected Rounding(), or concrete parameters and '
      'targets: this encoder searches for an allocation'
    )
  if sparsity is not None or bits is not None:
    raise ValueError(
      f'encoder: found {encoder!r} together with sparsity and bits, expected Rounding() for them, '
      'or compression_rate, bits_per_weight or file_rate: this encoder chooses masks of its own'
    )
  if palette_bits is not None and {file_rate, *targets.values()} == {None}:
    # the least error that palettes allow, whatever the bits: nothing to search for
    allocation = allocate(params, **options)
    coded = encoder.choose_codes(params, init_state(params, allocation))
    return CompressedNetwork(*_with_ties(encoder, params, coded, allocation), allocation)
  if file_rate is not None:
    check_file_rate(file_rate, *targets.values())
    return _at_file_rate(encoder, network, params, float(file_rate), options)
  checked = check_targets(**targets, palette_bits=palette_bits, corrected=corrected)
  assert isinstance(checked, BitsPerWeight)
  return _at_bits(encoder, network, params, float(checked.bits_per_weight), options)


def _at_file_rate(
  encoder: Encoder,
  network: TracedNetwork | None,
  params: PyTree,
  file_rate: float,
  options: dict[str, Any],
) -> CompressedNetwork:
  """Compresses such that the file has the size asked: a search over searches."""
  tried: dict[float, tuple[CompressedNetwork, list[Any]]] = {}

  def size_of(bits: float) -> int:
    tried[bits] = quietly(_at_bits, encoder, network, params, bits, options)
    found, _ = tried[bits]
    return len(writer.serialize(found.params, found.state))

  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
  original = sum(leaf.nbytes for leaf in leaves)
  bits = bits_of_file(size_of, original, file_rate, sum(leaf.size for leaf in leaves))
  found, notes = tried[bits]
  for note in notes:
    messages.warn(note)
  return found


def _at_bits(
  encoder: Encoder,
  network: TracedNetwork | None,
  params: PyTree,
  bits_per_weight: float,
  options: dict[str, Any],
) -> CompressedNetwork:
  """Compresses such that the codes have the entropy asked."""
  if isinstance(encoder, LayerByLayer):
    assert network is not None
    _, _, allocation = _at_bits(encoder.first, None, params, bits_per_weight, options)
    coded = encoder.choose_codes_in(network, params, init_state(params, allocation))
    return CompressedNetwork(*coded, allocation)
  assert isinstance(encoder, LeafEncoder)
  trial = encoder.trials()
  if trial is None:
    allocation = allocate(params, bits_per_weight=bits_per_weight, **options)
    coded = encoder.choose_codes(params, init_state(params, allocation))
    return CompressedNetwork(*coded, allocation)
  found = search_allocation(trial, params, bits_per_weight, options, encoder.survey)
  coded = _with_ties(encoder, params, Encoded(found.params, found.state), found.allocation)
  return CompressedNetwork(*coded, found.allocation)


def _with_ties(encoder: Encoder, params: PyTree, coded: Encoded, allocation: Allocation) -> Encoded:
  """Returns the codes with those of tied leaves made equal."""
  assert isinstance(encoder, LeafEncoder)
  grids = trees.records(params, allocation.tree, LeafAllocation)
  return with_ties(coded, params, grids, lambda: encoder.preferred(params))
