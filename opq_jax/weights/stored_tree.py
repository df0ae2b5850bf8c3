"""The two passes over a tree on disk: statistics of its leaves, and their codes."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from opq_jax import allocation as allocations
from opq_jax.allocation import Allocation, LeafAllocation, LeafStatistics, leaf_statistics
from opq_jax.coding import rotations
from opq_jax.core import axes, memory, trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.core.trees import PyTree
from opq_jax.file import written_leaves
from opq_jax.file.coded_leaves import CodedLeaf, CodedSlice
from opq_jax.file.side_files import SideFiles
from opq_jax.report import leaf_sizes
from opq_jax.report.records import CompressedLeaf, UncompressedLeaf
from opq_jax.weights.leaf_codes import coded_parts
from opq_jax.weights.spooled_file import SpooledFile


class Choice(NamedTuple):
  """Which codes leaves have.

  Attributes:
    allocation: of the leaves to compress.
    codes: returns the codes of a leaf by name; None where it is rounded.
    placed: called once the file is in its place: what was kept of the codes is not needed any more.
  """

  allocation: Allocation
  codes: Callable[[str], CodedLeaf | None] = lambda name: None
  placed: Callable[[], Any] = lambda: None


class CodedTree(NamedTuple):
  """A coded tree whose file is not in its place yet.

  Attributes:
    choice: the codes, and the allocation of the leaves.
    file: the parts of the file.
    compressed: the sizes of the compressed leaves, without `file`.
    uncompressed: the sizes of the other leaves, without `file`.
  """

  choice: Choice
  file: SpooledFile
  compressed: list[CompressedLeaf]
  uncompressed: list[UncompressedLeaf]


@dataclasses.dataclass(frozen=True)
class StoredTree:
  """A tree on disk.

  Attributes:
    tree: the tree of its leaves.
    leaves: the leaves by name.
    statistics: the statistics of the leaves to compress, by name.
    axes: their axes of output channels, by name.
  """

  tree: PyTree
  leaves: dict[str, StoredLeaf]
  statistics: dict[str, LeafStatistics]
  axes: dict[str, ChannelAxes]

  def unflatten(self, values: list[Any]) -> PyTree:
    """Returns the tree with a value in the place of each leaf."""
    return jax.tree.unflatten(jax.tree.structure(self.tree), values)

  def allocation(self, **targets: Any) -> Allocation:
    """Returns `opq_jax.allocate` of the statistics."""
    return allocations.allocate(
      self.unflatten([self.statistics.get(name, leaf) for name, leaf in self.leaves.items()]),
      compressible=lambda name, _: name in self.statistics,
      read=lambda name: self.leaves[name].read(),
      **targets,
    )

  def by_name(self, allocation: Allocation) -> dict[str, LeafAllocation]:
    """Returns the allocation of every leaf to compress by its name."""
    records = trees.records(self.tree, allocation.tree, LeafAllocation)
    return {
      name: record for name, record in zip(self.leaves, records, strict=True) if record is not None
    }

  def coded(
    self,
    choice: Choice,
    file: SpooledFile,
    metadata: dict[str, str],
    side_files: tuple[SideFiles, bytes] | None = None,
    each: Callable[[Iterable[str]], Iterable[str]] = iter,
  ) -> CodedTree:
    """Reads, codes and spools all leaves.

    Args:
      choice: the allocation of the leaves to compress, and their codes.
      file: what takes their parts.
      metadata: see `opq_jax.save`.
      side_files: see `SpooledFile.finish`.
      each: yields the names that it is given, for progress.
    """
    result = CodedTree(choice, file, [], [])
    records = trees.records(self.tree, choice.allocation.tree, LeafAllocation)
    for name, allocated in zip(each(self.leaves), records, strict=True):
      leaf = self.leaves[name]
      if allocated is None:
        file.add(name, leaf.read())
        row = UncompressedLeaf(name, leaf.shape, leaf.dtype.name, leaf.nbytes, 0)
        result.uncompressed.append(row)
      else:
        codes = choice.codes(allocated.tied_to or name)
        if codes is None:
          result.compressed.append(self._coded_leaf(name, leaf, allocated, file))
        else:
          result.compressed.append(self._leaf_of_codes(name, leaf, codes, allocated, file))
    file.finish(self.unflatten, metadata, side_files)
    return result

  def _coded_leaf(
    self, name: str, leaf: StoredLeaf, allocated: LeafAllocation, file: SpooledFile
  ) -> CompressedLeaf:
    axis, slices = self.axes[name], allocated.slices
    axis_of_slice = axes.in_slice(axis, slices)
    rows: list[CompressedLeaf] = []

    def coded() -> Iterator[CodedSlice]:
      """Codes slice by slice, and keeps the sizes of each."""
      for part in coded_parts(name, leaf.read(), allocated, axis):
        codes, grids = part.coded.codes, part.coded.grids
        sizes = codes, part.largest, axis_of_slice, 0, leaf.dtype
        rows.append(leaf_sizes.compressed_leaf(name, grids, *sizes))
        yield part.coded

    if allocated.tied_to:
      self._add_tied(leaf, allocated, file)
      collections.deque(coded(), maxlen=0)  # for its sizes
    else:
      file.add_codes(coded(), leaf.shape, slices)
    return leaf_sizes.sum_of_slices(name, leaf.shape, rows, 0) if slices else rows[0]

  def _leaf_of_codes(
    self,
    name: str,
    leaf: StoredLeaf,
    coded: CodedLeaf,
    allocated: LeafAllocation,
    file: SpooledFile,
  ) -> CompressedLeaf:
    """Spools a leaf whose codes were chosen before; of a tied leaf, those of the earlier one."""
    if allocated.tied_to:
      self._add_tied(leaf, allocated, file)
      coded = coded.moved((1, 0)) if allocated.is_transposed else coded
    else:
      slices = allocated.slices
      file.add_codes(coded.parts, leaf.shape, slices, written_leaves.axes_of(coded.parts))
    weights, rotation = leaf.read(), coded.parts[0].rotation
    if rotation is not None:
      weights = rotations.rotated(weights, len(coded.slice_shape) + rotation.axis)
    return leaf_sizes.sizes_of_coded(name, coded, weights, self.axes[name], 0)

  def _add_tied(self, leaf: StoredLeaf, allocated: LeafAllocation, file: SpooledFile) -> None:
    number = list(self.leaves).index(allocated.tied_to)
    file.add_tied(leaf.dtype, leaf.shape, number, allocated.is_transposed)


def rounded(tree: StoredTree, targets: Mapping[str, Any], stage: Callable[[str], Any]) -> Choice:
  """Returns the allocation for targets, of which every weight is rounded to its cell."""
  with stage('allocate'):
    allocation = tree.allocation(**targets)
  # what the compiler of the solver has left would stand beside the first leaves that are coded
  memory.return_freed_blocks()
  return Choice(allocation)


def stored_statistics(
  leaf: StoredLeaf, axis: ChannelAxes, slices: int, output_scales: Any = None
) -> LeafStatistics:
  """Returns the statistics of a leaf over its output scales, on the host."""
  # fetched before the next leaf is read: JAX computes in the background and keeps the leaf
  return jax.device_get(
    leaf_statistics(leaf.read(), axis, slices=slices, output_scales=output_scales)
  )
