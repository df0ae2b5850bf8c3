"""Recomputes the claims of an `.opq` file from the weights that it was made from.

Checksums show that a file is undamaged, not that it holds the right network.  `verify` trusts the
format alone: it compares names, shapes, dtypes, codes, sizes, and every uncompressed leaf.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from rich.table import Table

from opq_jax.coding import rotations
from opq_jax.core import trees
from opq_jax.core.stored_leaves import StoredLeaf
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.file.telling import told_of
from opq_jax.report import cell_checks, sizes, tables
from opq_jax.report.cell_checks import VerifiedLeaf
from opq_jax.report.records import CompressedLeaf, SizeReport, UncompressedLeaf
from opq_jax.report.sizes import ChannelAxis

_CORRECTED = 1e-3
"""Error of a recomputed correction, relative to the largest value of the leaf: platforms sum the
moments of BatchNorm in different orders."""

_BFLOAT16_STEP = 2.0**-7  # largest relative distance of neighbouring bfloat16 numbers


@dataclasses.dataclass(frozen=True)
class Verification:
  """The result of `verify`; prints as a table.

  Attributes:
    compressed: a row for each compressed leaf, or for each of its slices.
    exact: number of uncompressed leaves that equal the original bit for bit.
    corrected: number of uncompressed leaves that equal the corrected leaves.
    problems: the claims that do not hold, a line each; empty for a file that holds what it claims.
    report: the four sizes, with the ranges of the original weights; None if names or shapes differ
      from the original's.
  """

  compressed: tuple[VerifiedLeaf, ...]
  exact: int
  corrected: int
  problems: tuple[str, ...]
  report: SizeReport | None

  @property
  def holds(self) -> bool:
    """Returns whether every claim of the file holds."""
    return not self.problems

  def __rich__(self) -> Table:
    return _table(self)

  def __str__(self) -> str:
    lines = [str(tables.Printable(lambda: _table(self))), *self.problems]
    return '\n'.join(lines)


def verify(
  path: str | os.PathLike[str] | bytes,
  params: PyTree,
  *,
  coded: PyTree | None = None,
  corrected: PyTree | None = None,
  channel_axis: ChannelAxis = -1,
  told: Callable[[int, int], object] | None = None,
) -> Verification:
  """Recomputes every claim of a file from the weights that it was made from.

  The claims:

    names, shapes, dtypes   are those of `params` (float64 may be compressed as float32)
    codes                   follow from the weights by the rule of the cells (`cell_checks`)
    values                  are finite; those of escaped weights are the weights, bit for bit
    payloads                are as long as the codes take when they are coded again
    uncompressed leaves     equal `params` bit for bit, or `corrected` up to rounding
    sizes                   add up to the size of the file

  The latent weights of finetuning are not the original weights of a file: they do not tell which
  weights were pruned.

  Args:
    path: the file, or its bytes.
    params: the original weights, before compression, in any byte order; or the leaves of
      `opq_jax.weights.open_weights`, which stay on disk until they are compared, one by one.
    coded: the decoded values that `encoder.choose_codes(params, grids)` returns on the file's own
      grids, for a file whose codes an encoder has chosen: the codes name the cells of these values,
      and escaped weights equal them.
    corrected: `params` with a corrected BatchNorm, for a file that holds it.
    channel_axis: see `opq_jax.size_report`; for the nominal size.
    told: called after each leaf with the bytes of all leaves that are compared, and of all there
      are; `opq_jax.report.progress` shows them.

  Returns:
    A `Verification`; `holds` is the verdict.

  Raises:
    ValueError: the file is damaged or no `.opq` file.

  >>> import jax, opq_jax
  >>> kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  >>> params = {'kernel': kernel, 'bias': np.zeros(32, np.float32)}
  >>> state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> data = opq_jax.file.serialize(params, state)
  >>> verify(data, params).holds
  True
  >>> verify(data, {**params, 'bias': np.ones(32, np.float32)}).problems
  ('bias: found 32 values that are not the original ones, expected none',)
  """
  named = _Trees(
    *({} if tree is None else trees.named_leaves(tree) for tree in (params, coded, corrected))
  )
  size = len(path) if isinstance(path, bytes) else os.stat(path).st_size
  with OpqFile(path) as file:
    names, stored = dict.fromkeys([*file, *named.original]), file.sizes()
    # one leaf after the other, each decoded once: neither tree need fit into memory
    leaves = [
      _compared(file, name, named, channel_axis, stored.get(name, 0))
      for name in told_of({name: _nbytes(file, name) for name in names}, told)
    ]
    rows, report = [leaf.sizes for leaf in leaves], None
    if None not in rows:
      compressed = tuple(row for row in rows if isinstance(row, CompressedLeaf))
      uncompressed = tuple(row for row in rows if isinstance(row, UncompressedLeaf))
      report = SizeReport(compressed, uncompressed, size, file.side_bytes())
  return Verification(
    compressed=tuple(row for leaf in leaves for row in leaf.rows),
    exact=sum(leaf.is_exact for leaf in leaves),
    corrected=sum(leaf.is_corrected for leaf in leaves),
    problems=tuple(problem for leaf in leaves for problem in leaf.problems),
    report=report,
  )


class _Trees(NamedTuple):
  """The leaves by name of the trees that `verify` takes; none where it was given none."""

  original: dict[str, Any]
  coded: dict[str, Any]
  corrected: dict[str, Any]


class _Compared(NamedTuple):
  """One leaf of a file beside that of the original weights.

  Attributes:
    problems: the claims that do not hold.
    sizes: None where name, shape or dtype differ.
    rows: of a compressed leaf, one for it or for each of its slices.
    is_exact: whether it is uncompressed and equals the original bit for bit.
    is_corrected: whether it is uncompressed and equals the corrected leaf.
  """

  problems: Sequence[str]
  sizes: CompressedLeaf | UncompressedLeaf | None = None
  rows: Sequence[VerifiedLeaf] = ()
  is_exact: bool = False
  is_corrected: bool = False


def _compared(
  file: OpqFile, name: str, named: _Trees, channel_axis: ChannelAxis, stored: int
) -> _Compared:
  """Compares a leaf, of so many bytes in the file, with the original weights."""
  if name not in named.original or name not in file:
    here, there = ('file', 'weights') if name in file else ('weights', 'file')
    return _Compared([f'{name}: found in the {here}, not in the {there}'])
  original, is_compressed = _array(named.original[name]), bool(file.grids(name))
  if is_compressed and original.dtype == np.float64 and file.dtype(name) == np.float32:
    original = original.astype(np.float32)
  if (file.shape(name), file.dtype(name)) != (original.shape, original.dtype):
    found = f'{file.dtype(name).name}{list(file.shape(name))}'
    expected = f'{original.dtype.name}{list(original.shape)}'
    return _Compared([f'{name}: found {found}, expected {expected}'])
  if is_compressed:
    target = _array(named.coded[name]) if name in named.coded else original
    return _compared_codes(file, name, original, target, channel_axis, stored)
  value = file[name]
  row = sizes.uncompressed_leaf(name, value, stored)
  if value.tobytes() == original.tobytes():
    return _Compared([], row, is_exact=True)
  if name in named.corrected and _is_near(value, _array(named.corrected[name])):
    return _Compared([], row, is_corrected=True)
  count = cell_checks.differing(value, original)
  problem = f'{name}: found {count} values that are not the original ones, expected none'
  return _Compared([problem], row)


def _compared_codes(
  file: OpqFile,
  name: str,
  original: Shaped[np.ndarray, '...'],
  target: Shaped[np.ndarray, '...'],
  channel_axis: ChannelAxis,
  stored: int,
) -> _Compared:
  """Compares the codes of a leaf, slice by slice, with the weights that they were chosen for."""
  leaf, axis = file.coded_leaf(name), file.rotated_axis(name)
  if axis is not None:
    # codes name the cells of values; turning the rounded weights back would miss them
    is_same = np.array_equal(leaf.values(), target)
    target = leaf.coded_values() if is_same else rotations.rotated(target, axis)
    # errors are those of the weights, since a rotation changes no length
    original = rotations.rotated(original, axis)
  places, axes = np.ndindex(leaf.slice_shape), file.axes(name)
  each = zip(places, leaf.parts, file.payload_sizes(name), strict=True)
  rows = [
    cell_checks.check_slice(
      trees.slice_name(name, index), original[index], target[index], part, size, axes
    )
    for index, part, size in each
  ]
  size = sizes.compressed_leaf(name, leaf, channel_axis, stored, original)
  return _Compared([problem for row in rows for problem in row.problems], size, rows)


def _nbytes(file: OpqFile, name: str) -> int:
  """Returns the bytes of a leaf of the file, decoded; 0 where it has none."""
  return math.prod(file.shape(name)) * file.dtype(name).itemsize if name in file else 0


def _array(leaf: Any) -> Shaped[np.ndarray, '...']:
  """Returns a leaf as a NumPy array in the byte order of this machine; reads a stored one."""
  return trees.native(np.asarray(leaf.read() if isinstance(leaf, StoredLeaf) else leaf))


def _is_near(value: Shaped[np.ndarray, '...'], expected: Shaped[np.ndarray, '...']) -> bool:
  """Returns whether a stored leaf is a recomputed correction, up to the rounding of platforms."""
  if value.shape != expected.shape or not np.issubdtype(value.dtype, np.floating):
    return False
  bound = np.full(value.shape, _CORRECTED * float(np.max(np.abs(expected), initial=0)))
  if (value == value.astype(ml_dtypes.bfloat16)).all():
    # a small difference of two platforms may round to neighbouring bfloat16 numbers
    bound += _BFLOAT16_STEP * np.abs(expected)
  return bool((np.abs(value - expected) <= bound).all())


def _table(verification: Verification) -> Table:
  leaves = verification.compressed
  columns = (
    *('path', 'weights', 'pruned', 'levels', 'error', 'worst'),
    *('clipped', 'escaped', 'bytes', 'holds'),
  )
  rows = [
    (
      leaf.path,
      f'{leaf.weights:,}',
      f'{leaf.sparsity:.1%}',
      f'{leaf.levels}',
      f'{leaf.error:.2%}',
      f'{leaf.worst:.3f}',
      f'{leaf.clipped:,}',
      f'{leaf.escaped:,}',
      f'{leaf.stored:,}',
      'no' if leaf.problems else 'yes',
    )
    for leaf in leaves
  ]
  styles = ['red' if leaf.problems else '' for leaf in leaves]
  weights = sum(leaf.weights for leaf in leaves)
  survivors = sum(leaf.weights * (1 - leaf.sparsity) for leaf in leaves)
  totals = [
    (
      f'{len(leaves)} compressed',
      f'{weights:,}',
      f'{1 - survivors / max(weights, 1):.1%}',
      '',
      '',
      f'{max((leaf.worst for leaf in leaves), default=0):.3f}',
      f'{sum(leaf.clipped for leaf in leaves):,}',
      f'{sum(leaf.escaped for leaf in leaves):,}',
      f'{sum(leaf.stored for leaf in leaves):,}',
      'no' if any(leaf.problems for leaf in leaves) else 'yes',
    ),
    (f'{verification.exact} bit for bit',),
  ]
  if verification.corrected:
    totals.append((f'{verification.corrected} corrected',))
  table = tables.leaf_table('', columns, rows, styles, totals)
  table.caption = (
    'error: squared, relative to the weights\nworst: the largest error of a survivor, in steps'
  )
  return table
