"""Codes of a language model, chosen block after block in bounded memory.

Hidden states of the float network and of the compressed one go through the blocks side by side.
Within a block, the leaves that read the same rows are a stage: their codes are chosen for the rows
that the compressed leaves before them give, as `opq_jax.encoders.LayerByLayer` does.  A leaf whose
outputs are added to hidden states makes good a part of their error too (residual compensation, from
WaterSIC, Lifar et al., 2026, arXiv 2603.04956).  In memory are one block, twice, the moments of one
stage, and the hidden states of all calibration tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.encoders import DAMPING, SHARE, LeafEncoder
from opq_jax.encoders.allocation_search import quietly
from opq_jax.encoders.at_bits import code_at_bits
from opq_jax.encoders.encoder import named_leaf
from opq_jax.encoders.fitted_weights import fitted_rows
from opq_jax.encoders.matrices import MatrixLayout
from opq_jax.encoders.plain_codes import PlainCodesWarning, without_plain_codes
from opq_jax.encoders.rotated_inputs import RotatableMoments
from opq_jax.file.coded_leaves import CodedSlice, Rotation
from opq_jax.file.coded_weights import coded_slices
from opq_jax.language.network import StoredNetwork
from opq_jax.language.parts import Block, Head, Start, applied
from opq_jax.network.paired_moments import PairedSums, Stage, stage_sums, stages, sum_of_batches
from opq_jax.weights.coded_arrays import FIELDS, arrays_of, coded_slice
from opq_jax.weights.work_folder import WorkFolder

_ROWS = 2048
"""Tokens of a batch: enough for products of matrices to be efficient."""

_DEBT = 0.03
"""How far the bits of a leaf may be from those allocated, to make good what others took."""

RESIDUAL = 0.5
"""Part of the error in the hidden states that goes into a layer's target, beside its inputs' error.

Of a layer whose outputs are added to the hidden states; `share` applies to both errors.  A part
only, because the inputs of few tokens explain some of any error by chance.
"""

_HEAD = 'head/'


class Streams(NamedTuple):
  """Hidden states of all calibration tokens before a block.

  Attributes:
    first: in the float network.
    second: in the compressed one.
  """

  first: Float32[np.ndarray, 'sequences length features']
  second: Float32[np.ndarray, 'sequences length features']


class _Part(NamedTuple):
  """A part of the network that is coded stage after stage.

  Attributes:
    function: called as function(params, hidden states, *shared).
    params: of the float network.
    layer: its number, None for what is not a layer.
    shared: further arguments.
  """

  function: Callable[..., Any]
  params: PyTree
  layer: int | None
  shared: tuple[Any, ...] = ()


class _Reading(NamedTuple):
  """What a leaf reads.

  Attributes:
    own: moments of its inputs in the compressed network.
    cross_moments: with those in the float network.
    inputs: axes of the leaf.
    residual: as in `opq_jax.network.paired_moments.PairedSums`.
  """

  own: RotatableMoments
  cross_moments: Float32[Array, 'groups K K']
  inputs: tuple[int, ...]
  residual: Float32[Array, '...'] | None


@dataclasses.dataclass
class _Spent:
  """What the leaves so far have taken.

  Attributes:
    allocated, taken: bits that were allocated to them, and bits of their codes.
    ratios: of every leaf of a layer, by path, the `ratio` of the last one that was coded, of its
      own weights or of rotated ones.
    plain: tensors that the encoder does not serve.
    notes: other warnings.
  """

  allocated: float = 0.0
  taken: float = 0.0
  ratios: dict[str, float] = dataclasses.field(default_factory=dict)
  plain: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def bits_for(self, bits: float, weights: int) -> float:
    """Returns the bits per weight of a leaf of so many weights, given what others took."""
    owed = (self.allocated - self.taken) / weights
    return bits + min(max(owed, -_DEBT * bits), _DEBT * bits)

  def add(self, bits: float, taken: float, weights: int) -> None:
    """Counts a leaf."""
    self.allocated += bits * weights
    self.taken += taken * weights

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns all numbers as named arrays."""
    return {
      'spent': np.array([self.allocated, self.taken]),
      'paths': np.array(list(self.ratios), dtype=str),
      'ratios': np.array(list(self.ratios.values()), np.float64),
      'plain': np.array(self.plain, dtype=str),
      'notes': np.array(self.notes, dtype=str),
    }

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray]) -> '_Spent':
    """Returns the numbers of `arrays`."""
    ratios = zip(arrays['paths'].tolist(), arrays['ratios'].tolist(), strict=True)
    allocated, taken = arrays['spent'].tolist()
    return cls(allocated, taken, dict(ratios), arrays['plain'].tolist(), arrays['notes'].tolist())


@dataclasses.dataclass(frozen=True)
class BlockEncoder:
  """Chooses codes block after block.

  Attributes:
    network: the language model.
    tokens: calibration tokens.
    bits: entropy of the codes of every tensor to compress, in bits per weight, by name.
    output_scales: of some of them, as in `opq_jax.compression.LeafState`, by name.
    encoder: chooses the codes of a leaf, given the moments of its inputs.
    share, damping: as in `opq_jax.encoders.LayerByLayer`.
    residual: part of the error in the hidden states that goes into a target, as `RESIDUAL`.
  """

  network: StoredNetwork
  tokens: Integer[np.ndarray, 'sequences length']
  bits: Mapping[str, float]
  encoder: LeafEncoder
  output_scales: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  share: float = SHARE
  damping: float = DAMPING
  residual: float = RESIDUAL

  @property
  def blocks(self) -> int:
    """Number of blocks: what precedes the layers, each layer, and what follows them."""
    return self.network.depth + 2

  def run(self, work: WorkFolder, told: Callable[[float], Any] = lambda share: None) -> None:
    """Chooses the codes of all blocks that are not done, and keeps them in a folder."""
    spent, streams = _Spent(), Streams(np.zeros(0, np.float32), np.zeros(0, np.float32))
    if work.done:
      kept = work.load_streams()
      spent, streams = _Spent.of(kept), Streams(kept['first'], kept['second'])
    # one for all layers
    shared = (self.network.context(self.tokens.shape[1]),)
    for number in range(work.done, self.blocks):
      if number == 0:
        coded, streams = self._start(spent)
      elif number <= self.network.depth:
        coded, streams = self._layer(number - 1, shared, streams, spent)
      else:
        coded = self._head(streams, spent)
      work.save_block(
        number,
        {
          f'{name}/{key}': array
          for name, part in coded.items()
          for key, array in arrays_of(part).items()
        },
      )
      work.save_streams(number + 1, {**streams._asdict(), **spent.arrays()})
      told((number + 1) / self.blocks)
    for note in spent.notes:
      messages.warn(note)
    if spent.plain:
      messages.warn(PlainCodesWarning(spent.plain))

  def coded(self, work: WorkFolder) -> Callable[[str], CodedSlice | None]:
    """Returns a reader of the codes that a run has left in its folder, by name of the tensor."""
    blocks = {
      name.rpartition('/')[0]: number
      for number in range(self.blocks)
      for name in work.names(number)
    }

    def read(name: str) -> CodedSlice | None:
      if name not in blocks:
        return None
      arrays = {field: work.load(blocks[name], f'{name}/{field}') for field in FIELDS}
      return coded_slice(arrays, self._dtype(name))

    return read

  def _start(self, spent: _Spent) -> tuple[dict[str, CodedSlice], Streams]:
    """Codes the tables that are looked up, before anything is computed with them."""
    outer, coded = self.network.outer(), {}
    leaves = trees.named_leaves(outer)
    for path in list(leaves):
      site = self.network.site(path, None)
      if site.name in self.bits and not path.startswith(_HEAD):
        found = self._code(path, None, leaves[path], None, spent)
        leaves[path], coded[site.name] = found
    compressed = jax.tree.unflatten(jax.tree.structure(outer), list(leaves.values()))
    start = Start(self.network.model)
    return coded, Streams(*(self._states(start, params) for params in (outer, compressed)))

  def _layer(
    self, number: int, shared: tuple[Any, ...], streams: Streams, spent: _Spent
  ) -> tuple[dict[str, CodedSlice], Streams]:
    block = Block(self.network.model)
    part = _Part(block, self.network.layer(number), number, shared)
    coded, compressed = self._code_stages(part, streams, spent)
    networks = zip((part.params, compressed), streams, strict=True)
    return coded, Streams(*(self._advanced(block, *network, shared) for network in networks))

  def _head(self, streams: Streams, spent: _Spent) -> dict[str, CodedSlice]:
    """Codes the last layer, unless it is a table that is looked up too."""
    if not self.network.has_head:
      return {}
    head = Head(self.network.model)
    return self._code_stages(_Part(head, self.network.outer(), None), streams, spent)[0]

  def _code_stages(
    self, part: _Part, streams: Streams, spent: _Spent
  ) -> tuple[dict[str, CodedSlice], PyTree]:
    """Codes the leaves of a part, and returns it as the compressed network has it."""
    coded, compressed = {}, part.params
    shape = jax.ShapeDtypeStruct((1, *streams.first.shape[1:]), jnp.float32)
    for stage in stages(part.function, part.params, shape, *part.shared):
      names = [self.network.site(path, part.layer).name for path in stage.leaves]
      if not self.bits.keys() & set(names):
        continue
      sums = self._sums(part, stage, compressed, streams)
      moments = RotatableMoments(sums.moments, self.damping, self.encoder)
      leaves = trees.named_leaves(compressed)
      for path, name, inputs in zip(stage.leaves, names, stage.inputs, strict=True):
        if name in self.bits:
          reading = _Reading(moments, sums.cross_moments, inputs, sums.residual)
          leaves[path], coded[name] = self._code(path, part.layer, leaves[path], reading, spent)
      compressed = jax.tree.unflatten(jax.tree.structure(compressed), list(leaves.values()))
    return coded, compressed

  def _code(
    self,
    path: str,
    layer: int | None,
    weights: Array,
    reading: _Reading | None,
    spent: _Spent,
  ) -> tuple[Array, CodedSlice]:
    """Codes a leaf; returns its values in float32, and the codes of its tensor."""
    site = self.network.site(path, layer)
    target, dtype, bits = weights, self._dtype(site.name), self.bits[site.name]
    own, scales = spent.bits_for(bits, weights.size), self.output_scales.get(site.name)
    turned = lambda array: array.T if site.is_transposed else array
    own_scales = None if scales is None else jnp.asarray(turned(np.asarray(scales)))
    moments = rotated_axis = None
    if reading is not None:
      if self.share:
        target = self._fitted(weights, reading)
      facts = site.name, target, dtype, own, reading.inputs, own_scales
      if (turned_inputs := reading.own.rotated_weights(*facts)) is not None:
        target, rotated_axis = jnp.asarray(turned_inputs), reading.inputs[0]
      with named_leaf(site.name):
        factored = reading.own.factored(rotated_axis is not None)
      moments = factored._replace(inputs=reading.inputs)
    of_codes = dtype if rotated_axis is None else np.dtype(np.float32)
    # the ratio is that of the last leaf of this path coded likewise
    key = path if rotated_axis is None else f'{path} rotated'
    arguments = site.name, target, of_codes, own, self.encoder, moments, self.damping
    choose = functools.partial(code_at_bits, *arguments, spent.ratios.get(key, 1.0), own_scales)
    with named_leaf(site.name):
      found, notes = quietly(choose)
    spent.notes += map(str, without_plain_codes(notes, site.name, spent.plain))
    spent.add(bits, found.bits, weights.size)
    spent.ratios[key] = found.ratio
    values, state = np.asarray(found.values), found.state
    state = dataclasses.replace(
      state, kinds=jnp.asarray(turned(np.asarray(state.kinds))), output_scales=scales
    )
    (coded,) = coded_slices(site.name, np.ascontiguousarray(turned(values)), state)
    if rotated_axis is not None:
      axis = 1 - rotated_axis if site.is_transposed else rotated_axis
      coded = coded._replace(rotation=Rotation(axis, dtype))
      values = turned(coded.values())
    return jnp.asarray(values, jnp.float32), coded

  def _fitted(self, weights: Array, reading: _Reading) -> Array:
    """Returns weights that make good the errors of the compressed leaves before them."""
    layout = MatrixLayout(weights.shape, reading.inputs)
    rows, moments, cross_moments = layout.rows(weights), reading.own.moments, reading.cross_moments
    residual = None
    if reading.residual is not None and self.residual:
      residual = self.residual * layout.rows(reading.residual)
    return layout.leaf(
      fitted_rows(rows, moments, cross_moments, self.share, self.damping, residual)
    )

  def _sums(self, part: _Part, stage: Stage, compressed: PyTree, streams: Streams) -> PairedSums:
    """Returns the means over all calibration tokens of what a stage reads."""
    pairs = zip(*map(self._batches, streams), strict=True)
    # waited for: a queue of batches would hold the hidden states of all of them
    sums = (
      jax.block_until_ready(
        stage_sums(part.function, stage, part.params, compressed, *pair, part.shared)
      )
      for pair in pairs
    )
    return sum_of_batches(sums).means()

  def _states(self, start: Start, params: PyTree) -> np.ndarray:
    """Returns what the first layer reads."""
    parts = [np.asarray(applied(start, params, x)[0]) for x in self._batches(self.tokens)]
    return np.concatenate(parts)

  def _advanced(
    self, block: Block, params: PyTree, states: np.ndarray, shared: tuple[Any, ...]
  ) -> np.ndarray:
    """Returns what the next layer reads."""
    parts = [np.asarray(applied(block, params, x, *shared)) for x in self._batches(states)]
    return np.concatenate(parts)

  def _batches(self, array: np.ndarray) -> Iterator[np.ndarray]:
    size = max(_ROWS // self.tokens.shape[1], 1)
    for begin in range(0, len(array), size):
      yield array[begin : begin + size]

  def _dtype(self, name: str) -> np.dtype:
    return np.dtype(self.network.tensors[name].dtype)
