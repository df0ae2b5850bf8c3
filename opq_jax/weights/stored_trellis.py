"""Codes along a trellis of leaves on disk: the search of `opq_jax.compress`, in bounded memory.

The search asks for the bits of all codes on several grids.  Here each leaf is read when it is
coded, and its codes are kept in the folder `OUTPUT.blocks`: a run that is killed goes on after the
last leaves that were whole.  In memory are as many leaves at once as the largest one is long.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import opq_jax
from opq_jax import encoders
from opq_jax.allocation import Allocation, BitsPerWeight, LeafAllocation, check_targets
from opq_jax.core import memory, messages, native
from opq_jax.core.trees import slice_name
from opq_jax.encoders import allocation_search, survey, trellis, trellis_leaves
from opq_jax.encoders.encoder import LeafToCode
from opq_jax.encoders.plain_codes import PlainCodesWarning
from opq_jax.file import coded_weights, written_leaves
from opq_jax.file.coded_leaves import CodedLeaf, CodedSlice, escaped_values
from opq_jax.weights import coded_arrays
from opq_jax.weights.leaf_codes import plain_state
from opq_jax.weights.stored_tree import Choice, StoredTree
from opq_jax.weights.work_folder import Work, WorkFolder, identity

_AT_ONCE = 1 << 22
"""Weights that are in memory at once, at least: small leaves would wait for each other."""

Grids = Mapping[str, LeafAllocation]
"""The allocation of every leaf to compress, by name."""


class _Coded(NamedTuple):
  """The codes of a leaf.

  Attributes:
    parts: of its slices, or of itself.
    bits: of the codes and of escaped values.
    is_served: as in `opq_jax.encoders.trellis_leaves.CodedLeaf`.
  """

  parts: list[CodedSlice]
  bits: float
  is_served: bool


class _Trial(NamedTuple):
  """The answer to the grids of one step; its codes are in the folder."""

  bits_per_weight: float


@dataclasses.dataclass
class _Kept:
  """What a search has found so far, beside the codes of the step that it is at.

  Attributes:
    ratio: of the survey; NaN before it.
    steps: bits per weight of the steps that are done.
    bits: of the leaves that are done of the next step, in their order.
    plain: names of leaves of that step that the trellis does not serve.
    unserved: of leaves that it did not serve in any step: they keep plain codes, since the search
      would alternate between its two answers otherwise.
  """

  ratio: float = np.nan
  steps: list[float] = dataclasses.field(default_factory=list)
  bits: list[float] = dataclasses.field(default_factory=list)
  plain: list[str] = dataclasses.field(default_factory=list)
  unserved: list[str] = dataclasses.field(default_factory=list)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns all as named arrays."""
    return {
      'ratio': np.asarray(self.ratio, np.float64),
      **{name: np.array(getattr(self, name), np.float64) for name in ('steps', 'bits')},
      **{name: np.array(getattr(self, name), dtype=str) for name in ('plain', 'unserved')},
    }

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray]) -> '_Kept':
    """Returns what `arrays` say."""
    names = 'steps', 'bits', 'plain', 'unserved'
    return cls(float(arrays['ratio']), *(arrays[name].tolist() for name in names))


@dataclasses.dataclass(frozen=True)
class StoredTrellis:
  """Chooses the codes of a tree on disk along a trellis, as `opq_jax.compress` does in memory.

  A `Chooser` of `opq_jax.weights.compress_stored`.

  Attributes:
    encoder: without moments.
    work: of the run that makes the file.
  """

  encoder: encoders.Trellis
  work: Work

  def __call__(
    self, tree: StoredTree, targets: Mapping[str, Any], stage: Callable[[str], Any]
  ) -> Choice:
    """Searches for the allocation whose codes have the bits asked.

    Raises:
      ValueError: the targets are not bits per weight; the work cannot be opened.
    """
    targets = dict(targets)
    names = 'sparsity', 'bits', 'compression_rate', 'bits_per_weight'
    checked = check_targets(*(targets.pop(name, None) for name in names))
    if not isinstance(checked, BitsPerWeight):
      raise ValueError(
        f'encoder: found {self.encoder!r} together with sparsity and bits, expected Rounding() for '
        'them, or compression_rate, bits_per_weight or file_rate'
      )
    asked = float(checked.bits_per_weight)
    search = _Search(self.encoder, tree, targets, stage)

    notes: list[Warning] = []

    def plain(bits: float) -> tuple[Allocation, Grids]:
      nonlocal notes
      allocation, grids = search.plain(bits)
      if search.work is None:
        # the search drops warnings of all allocations but the last one
        with messages.collected() as notes:
          search.open(self.work, asked, grids)
      return allocation, grids

    allocation, _ = allocation_search.search(
      plain, search.trial, asked, search.survey if self.encoder.version > 1 else None
    )
    for note in notes:
      messages.warn(note)
    assert search.work is not None
    return Choice(allocation, search.reader(), search.work.remove)


class _Search:
  """One search; `work` is its folder, None until the first allocation is known."""

  def __init__(
    self,
    encoder: encoders.Trellis,
    tree: StoredTree,
    options: Mapping[str, Any],
    stage: Callable[[str], Any],
  ):
    self._encoder, self._tree, self._options, self._stage = encoder, tree, options, stage
    self._step = 0
    self._kept = _Kept()
    self._groups: list[list[str]] = []
    self._grids: Grids = {}
    self.work: WorkFolder | None = None

  def open(self, work: Work, asked: float, grids: Grids) -> None:
    """Opens the work of an earlier run that began with the same grids of the same weights."""
    self._groups = _groups({name: self._tree.leaves[name].size for name in grids})
    plan = {
      'weights': identity(leaf.path for leaf in self._tree.leaves.values()),
      'bits_per_weight': asked,
      'grids': _digest(grids),
      'encoder': repr(self._encoder),
      'fields': coded_arrays.FIELDS,
      'versions': [opq_jax.__version__, jax.__version__],
    }
    self.work = work.open(plan)
    if self.work.has_streams:
      self._kept = _Kept.of(self.work.load_streams())

  def plain(self, bits: float) -> tuple[Allocation, Grids]:
    """Returns the allocation of so many bits per weight."""
    with self._stage('allocate'):
      allocation = self._tree.allocation(bits_per_weight=bits, **self._options)
    # what the compiler of the solver has left would stand beside the leaves that are coded
    memory.return_freed_blocks()
    return allocation, self._tree.by_name(allocation)

  def survey(self, grids: Grids) -> float | None:
    """Estimates the bits of codes over those of rounded codes, as `Trellis.survey` does."""
    shapes = [survey.Sampled(record.shape, record.slices) for record in grids.values()]
    if (strides := survey.strides_of(shapes)) is None:
      return None
    if np.isnan(self._kept.ratio):
      of_leaf, found = dict(zip(grids, strides, strict=True)), []

      def sampled(name: str) -> survey.SampledBits:
        return survey.sampled_bits(
          self._leaf(name, grids[name]), of_leaf[name], self._encoder.damping
        )

      with self._stage('choose codes'):
        for group in self._groups:
          found += native.on_all_processors(sampled, group)
      # none is kept as 0, which no ratio is
      self._kept.ratio = survey.ratio_of(found) or 0.0
      self._save(0)
    return self._kept.ratio or None

  def trial(self, grids: Grids) -> _Trial:
    """Codes all leaves on their grids, but for those whose codes are in the folder."""
    step, self._step, self._grids = self._step, self._step + 1, grids
    assert self.work is not None
    kept = self._kept
    if step < len(kept.steps):  # of an earlier run
      self._warn()
      return _Trial(kept.steps[step])
    blas_threads = None if self._encoder.version == 1 else 1
    unserved = set(kept.unserved)
    code = lambda name: self._coded(name, grids[name], name not in unserved)
    if not kept.bits:
      kept.plain = []
    with self._stage('choose codes') as told:
      for number in range(self.work.done if kept.bits else 0, len(self._groups)):
        group = self._groups[number]
        found = native.on_all_processors(code, group, blas_threads=blas_threads)
        kept.bits += [coded.bits for coded in found]
        kept.plain += [
          name for name, coded in zip(group, found, strict=True) if not coded.is_served
        ]
        self.work.save_block(number, _arrays(dict(zip(group, found, strict=True))))
        if number + 1 < len(self._groups):
          self._save(number + 1)
        if callable(told):
          told((number + 1) / len(self._groups))
    weights = sum(self._tree.leaves[name].size for name in grids)
    kept.steps.append(sum(kept.bits) / max(weights, 1))
    kept.unserved = sorted(unserved | set(kept.plain))
    kept.bits = []
    self._save(0)
    self._warn()
    return _Trial(kept.steps[step])

  def reader(self) -> Callable[[str], CodedLeaf | None]:
    """Returns a reader of the codes of the last step, by name of the leaf."""
    work, grids = self.work, self._grids
    assert work is not None
    numbers = {name: number for number, group in enumerate(self._groups) for name in group}

    def read(name: str) -> CodedLeaf | None:
      if name not in numbers:
        return None
      parts = []
      for part, _ in enumerate(np.ndindex(grids[name].slice_shape)):
        fields = coded_arrays.FIELDS
        arrays = {key: work.load(numbers[name], f'{name}/{part}/{key}') for key in fields}
        parts.append(coded_arrays.coded_slice(arrays, self._tree.leaves[name].dtype))
      return CodedLeaf(parts, grids[name].slice_shape)

    return read

  def _save(self, done: int) -> None:
    assert self.work is not None
    self.work.save_streams(done, self._kept.arrays())

  def _warn(self) -> None:
    """Names the leaves of the last step that the trellis does not serve."""
    if self._kept.plain:
      messages.warn(PlainCodesWarning(self._kept.plain))

  def _leaf(self, name: str, record: LeafAllocation) -> LeafToCode:
    """Reads a leaf."""
    array = written_leaves.host_array(name, self._tree.leaves[name].read())
    return LeafToCode(name, array, plain_state(name, array, record), None)

  def _coded(self, name: str, record: LeafAllocation, may_follow_trellis: bool) -> _Coded:
    """Codes a leaf."""
    leaf = self._leaf(name, record)
    parts, bits, are_served = [], 0.0, True
    places = np.ndindex(record.slice_shape)
    found = trellis.code_slices(
      leaf, self._encoder.damping, self._encoder.version, may_follow_trellis
    )
    for place, part in zip(places, found, strict=True):
      assert part.state is not None and part.codes is not None
      bits += trellis_leaves.bits_of(part)
      are_served &= part.is_served
      part_name, weights = slice_name(name, place), leaf.weights[place]
      grids = coded_weights.checked_grids(part_name, part.state, weights.shape)
      grids.check_cells(part_name, part.codes)
      parts.append(CodedSlice(part.codes, escaped_values(part.codes, weights), grids))
    return _Coded(parts, bits, are_served)


def _arrays(coded: Mapping[str, _Coded]) -> dict[str, np.ndarray]:
  """Returns the codes of some leaves as named arrays."""
  return {
    f'{name}/{number}/{key}': array
    for name, leaf in coded.items()
    for number, part in enumerate(leaf.parts)
    for key, array in coded_arrays.arrays_of(part).items()
  }


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
  """Returns leaves next to each other that are in memory together.

  >>> _groups({'a': 2 << 22, 'b': 1 << 22, 'c': 1 << 22, 'd': 1})
  [['a'], ['b', 'c'], ['d']]
  """
  groups: list[list[str]] = []
  most, held = max(_AT_ONCE, *sizes.values(), 0), 0
  for name, size in sizes.items():
    if not groups or held + size > most:
      groups.append([])
      held = 0
    groups[-1].append(name)
    held += size
  return groups


def _digest(grids: Grids) -> str:
  """Returns a digest of names and plain grids: of all that the codes depend on but the weights."""
  found = hashlib.sha256()
  for name, record in grids.items():
    scales = () if record.output_scales is None else (record.output_scales,)
    numbers = record.threshold, record.step, record.offset, record.levels, *scales
    found.update(repr((name, record.shape, record.slices)).encode())
    for array in numbers:
      found.update(np.asarray(array).tobytes())
  return found.hexdigest()
