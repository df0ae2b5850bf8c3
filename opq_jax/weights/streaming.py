"""Compresses weights on disk into an `.opq` file, leaf by leaf: trees larger than memory.

    1  every compressed leaf is read, and its `LeafStatistics` are kept: 32 KiB and its scales
    2  `opq_jax.allocate` solves from the statistics
    3  every leaf is read once more and coded in pieces; its payload is spooled to disk

With targets of sparsity and bits, step 2 reads every compressed leaf twice more; the search for
codes along a trellis reads it once or more for every step (`stored_trellis`).  At most one leaf
is in memory at a time: two copies of it while its statistics are computed (the second is JAX's),
one while it is coded, beside its codes of one byte a weight.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from opq_jax import allocation as allocations
from opq_jax.allocation import (
  OBJECTIVES,
  Allocation,
  is_compressible,
)
from opq_jax.allocation.objectives import check_omegas
from opq_jax.allocation.output_scales import scales_for
from opq_jax.allocation.palette_scales import palette_scales
from opq_jax.core import memory, messages, plain_trees, trees
from opq_jax.core.axes import ChannelAxes
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.core.trees import PyTree
from opq_jax.encoders import Encoder, Rounding, Trellis
from opq_jax.file import rate as file_rates
from opq_jax.file import writer
from opq_jax.file.reader import OpqFile
from opq_jax.file.side_files import packed_files
from opq_jax.report.records import SizeReport
from opq_jax.report.sizes import ChannelAxis
from opq_jax.weights.spooled_file import SpooledFile
from opq_jax.weights.stored_tree import (
  Choice,
  CodedTree,
  StoredTree,
  rounded,
  stored_statistics,
)
from opq_jax.weights.stored_trellis import StoredTrellis
from opq_jax.weights.work_folder import Work

Chooser = Callable[
  [StoredTree, Mapping[str, Any], Callable[[str], contextlib.AbstractContextManager]], Choice
]
"""Chooses allocation and codes of a tree on disk: see `compress_stored`."""

_ROUNDING = Rounding()


@dataclasses.dataclass(frozen=True)
class StreamedFile:
  """The result of `compress_stored`.

  Attributes:
    allocation: the allocation of the leaves, by name.
    report: the sizes of the file that was written.
  """

  allocation: Allocation
  report: SizeReport


def compress_stored(
  tree: PyTree,
  output: str | os.PathLike[str],
  *,
  compressible: Callable[[str, Any], bool] = is_compressible,
  channel_axis: ChannelAxis = -1,
  slices: Callable[[str, Any], int] | None = None,
  metadata: Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
  contexts: bool = True,
  side_files: Mapping[str, bytes] | None = None,
  left_out: int = 0,
  encoder: Encoder = _ROUNDING,
  choose: Chooser | None = None,
  stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
  **targets: Any,
) -> StreamedFile:
  """Prunes, quantizes and writes a tree that need not fit into memory.

  The file is, byte for byte, `opq_jax.save(output, params, state, metadata)` with params and state
  of `opq_jax.compress(params, ...)`.

  Args:
    tree: a tree of `StoredLeaf`, as returned by `opq_jax.weights.open_weights`.
    output: the `.opq` file, which appears whole or not at all.
    compressible: see `opq_jax.allocate`.
    channel_axis: see `opq_jax.allocate`.
    slices: see `opq_jax.allocate`.
    metadata: see `opq_jax.save`; or a function that returns them of the targets, which are the
      bits per weight that met a `file_rate`.
    contexts: see `opq_jax.save`.
    side_files: see `opq_jax.save`; `ModelFolder.side_files` returns those of a folder.
    left_out: bytes of leaves that `file_rate` does not count as those of the tree: of one number.
    encoder: `Rounding()`, or `Trellis()`, whose search reads all leaves several times.  Its codes
      are kept in the folder `OUTPUT.blocks` until the file is written: a run that is killed goes on
      where it was when it is called again with the same arguments, but for `file_rate`.
    choose: in the place of an encoder, a function of the tree, the targets and `stage`, which
      returns a `Choice`: the allocation, and the codes of every leaf by name.  With `file_rate` it
      is called several times.
    stage: returns the context manager in which the stage of a name runs, for progress: statistics,
      allocate, choose codes, encode, write.  If it yields a function, that is called with the share
      that is done.
    **targets: the targets and the `objective` of `opq_jax.allocate`.  For `file_rate` the tree is
      coded several times.

  Returns:
    The allocation and the sizes of the file.

  Raises:
    ValueError: `opq_jax.allocate` or `opq_jax.save` refuses the tree; an existing file stays.
    OSError: a file cannot be read or written; an existing file stays.

  >>> import tempfile, numpy as np, safetensors.numpy
  >>> from opq_jax.weights import open_weights
  >>> kernel = np.random.default_rng(0).laplace(size=(256, 64)).astype(np.float32)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   safetensors.numpy.save_file({'w': kernel}, f'{folder}/net.safetensors')
  ...   leaves = open_weights(f'{folder}/net.safetensors')
  ...   report = compress_stored(leaves, f'{folder}/net.opq', compression_rate=16.0).report
  ...   print(report.file == os.stat(f'{folder}/net.opq').st_size, round(report.entropy_rate))
  True 16
  """
  file_rate = targets.pop('file_rate', None)
  others = [targets.get(name) for name in allocations.TARGET_NAMES]
  if file_rate is None:
    allocations.check_targets(*others, palette_bits=targets.get('palette_bits'))
  else:
    allocations.check_file_rate(file_rate, *others)
  work = Work(output)
  if choose is None:
    choose = _chooser_of(encoder, work)
  if choose is not rounded and targets.get('palette_bits') is not None:
    raise ValueError(
      'palette_bits: found it together with codes that are chosen, expected one of them'
    )
  about = metadata if callable(metadata) else lambda targets, texts=metadata: texts
  writer.checked_metadata(about(targets))
  # once, though a search for a file rate codes the tree several times
  packed = packed_files(side_files) if side_files else None
  memory.return_freed_blocks()
  tree = writer.plain_tree(tree)
  plain_trees.check_names(tree)
  leaves = trees.named_leaves(tree)
  chosen = allocations.choose_leaves(leaves, compressible)
  counts = {name: allocations.slices_of(name, leaves[name], slices) for name in chosen}
  axes = {
    name: allocations.axis_of(name, leaves[name], channel_axis, counts[name]) for name in chosen
  }
  scales = _output_scales(tree, leaves, axes, counts, targets)
  with stage('statistics') as told:
    statistics = {}
    for name in _told(chosen, leaves, told):
      statistics[name] = stored_statistics(leaves[name], axes[name], counts[name], scales.get(name))
  source = StoredTree(tree, leaves, statistics, axes)

  with contextlib.ExitStack() as spooled, work:

    def coded(**targets: Any) -> CodedTree:
      """Codes the tree for these targets; the parts of an earlier call are deleted."""
      # at once, so that the disk holds the parts of one trial
      spooled.close()
      choice = choose(source, targets, stage)
      with stage('encode') as told:
        file = spooled.enter_context(SpooledFile(output, contexts))
        own_metadata = writer.checked_metadata(about(targets))
        return source.coded(
          choice, file, own_metadata, packed, lambda names: _told(names, leaves, told)
        )

    if file_rate is None:
      result = coded(**targets)
    else:
      result = _coded_at_rate(coded, leaves.values(), file_rate, targets, left_out)
    with stage('write'):
      result.file.place()
    result.choice.placed()
  return StreamedFile(result.choice.allocation, _report(output, result))


def _chooser_of(encoder: Encoder, work: Work) -> Chooser:
  """Returns what chooses the codes of an encoder.

  Raises:
    ValueError: the encoder needs the whole tree.
  """
  if isinstance(encoder, Rounding):
    return rounded
  if isinstance(encoder, Trellis) and encoder.moments is None:
    return StoredTrellis(encoder, work)
  raise ValueError(
    f'encoder: found {encoder!r}, expected Rounding() or Trellis() without moments: other encoders '
    'need the tree in memory (opq_jax.compress)'
  )


def _output_scales(
  tree: PyTree,
  leaves: Mapping[str, StoredLeaf],
  channel_axes: Mapping[str, ChannelAxes],
  slices: Mapping[str, int],
  targets: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the scales that `opq_jax.allocate` would choose for the outputs of leaves, by name.

  Args:
    tree: of all leaves.
    leaves: by name.
    channel_axes: of the leaves to compress.
    slices: their leading axes that count slices.
    targets: of `opq_jax.allocate`, and its `objective`.
  """
  objective = targets.get('objective', OBJECTIVES[0])
  omegas: dict[str, Any] = {}
  if not isinstance(objective, str):
    shapes = {name: (leaves[name].shape, count) for name, count in slices.items()}
    omegas = dict(zip(slices, check_omegas(tree, objective, shapes), strict=True))
  scales = {
    name: scales_for(np.asarray(omega), leaves[name], slices[name])
    for name, omega in omegas.items()
    if omega.ndim > slices[name]
  }
  if targets.get('palette_bits') is not None:
    others = {name: (channel_axes[name], slices[name]) for name in slices if name not in scales}
    scales |= palette_scales(leaves, others, targets['palette_bits'], objective, omegas)
  return scales


def _told_nothing(share: float) -> None:
  """Takes the share that is done where nobody asks for it."""


def _told(
  names: Iterable[str],
  leaves: Mapping[str, StoredLeaf],
  told: Any,
) -> Iterator[str]:
  """Yields names of leaves, and tells after each which share of all bytes is done."""
  names, done = list(names), 0
  total = sum(leaves[name].nbytes for name in names)
  for name in names:
    yield name
    done += leaves[name].nbytes
    if callable(told) and total:
      told(done / total)


def _coded_at_rate(
  coded: Callable[..., CodedTree],
  leaves: Collection[StoredLeaf],
  file_rate: float,
  targets: dict[str, Any],
  left_out: int,
) -> CodedTree:
  """Codes a tree with the bits per weight at which its file is `file_rate` times smaller."""
  last: dict[float, CodedTree] = {}  # the last result by its bits: earlier ones are deleted

  def size_of(bits: float) -> int:
    last.clear()
    last[bits] = coded(bits_per_weight=bits, **targets)
    return last[bits].file.size

  original = sum(leaf.nbytes for leaf in leaves) - left_out
  weights = sum(leaf.size for leaf in leaves)
  bits = file_rates.bits_of_file(size_of, original, file_rate, weights)
  # the search may answer with a trial before its last one, whose parts are gone: coded again
  if bits not in last:
    with messages.collected():  # they have been issued
      size_of(bits)
  return last[bits]


def _report(output: str | os.PathLike[str], result: CodedTree) -> SizeReport:
  """Returns the sizes of the file that was written."""
  with OpqFile(output) as file:
    stored, side = file.sizes(), file.side_bytes()
  return SizeReport(
    tuple(dataclasses.replace(leaf, file=stored[leaf.path]) for leaf in result.compressed),
    tuple(dataclasses.replace(leaf, file=stored[leaf.path]) for leaf in result.uncompressed),
    os.stat(output).st_size,
    side,
  )
