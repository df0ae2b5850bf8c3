"""Recomputes the claims of an `.opq` file from the weights that it was made from.

Checksums show that a file is undamaged, not that it holds the right network.  `verify` trusts the
format alone: it compares names, shapes, dtypes, codes, sizes, and every uncompressed leaf.
"""

import dataclasses
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from rich.table import Table

from opq_jax.coding import rotations
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids
from opq_jax.file.reader import OpqFile
from opq_jax.report import cell_checks, tables
from opq_jax.report.cell_checks import VerifiedLeaf
from opq_jax.report.records import SizeReport
from opq_jax.report.sizes import ChannelAxis, payload_report

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
    params: the original weights, before compression, in any byte order.
    coded: the decoded values that `encoder.choose_codes(params, grids)` returns on the file's own
      grids, for a file whose codes an encoder has chosen: the codes name the cells of these values,
      and escaped weights equal them.
    corrected: `params` with a corrected BatchNorm, for a file that holds it.
    channel_axis: see `opq_jax.size_report`; for the nominal size.

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
  originals = _arrays(params)
  targets = originals if coded is None else _arrays(coded)
  corrections = {} if corrected is None else _arrays(corrected)
  rows: list[VerifiedLeaf] = []
  problems: list[str] = []
  exact = near = 0
  is_same_tree = True
  with OpqFile(path) as file:
    for name in dict.fromkeys([*file, *originals]):
      if name not in originals or name not in file:
        here, there = ('file', 'weights') if name in file else ('weights', 'file')
        problems.append(f'{name}: found in the {here}, not in the {there}')
        is_same_tree = False
        continue
      value, grids = file[name], file.grids(name)
      original = originals[name]
      if grids and original.dtype == np.float64 and value.dtype == np.float32:
        original = originals[name] = original.astype(np.float32)
      if (value.shape, value.dtype) != (original.shape, original.dtype):
        problems.append(
          f'{name}: found {value.dtype.name}{list(value.shape)}, expected '
          f'{original.dtype.name}{list(original.shape)}'
        )
        is_same_tree = False
      elif grids:
        target = original if coded is None else targets[name]
        if (axis := file.rotated_axis(name)) is not None:
          # errors are those of the weights, since a rotation changes no length
          is_same = np.array_equal(value, target)
          value = file.coded_values(name)
          original, target = (rotations.rotated(array, axis) for array in (original, target))
          # codes name the cells of values; turning the rounded weights back would miss them
          target = value if is_same else target
        own = _verified(file, name, original, target, value, grids)
        rows += own
        problems += [problem for row in own for problem in row.problems]
      elif value.tobytes() == original.tobytes():
        exact += 1
      elif name in corrections and _is_near(value, corrections[name]):
        near += 1
      else:
        count = cell_checks.differing(value, original)
        problems.append(
          f'{name}: found {count} values that are not the original ones, expected none'
        )
  report = None
  if is_same_tree:
    data = path if isinstance(path, bytes) else Path(path).read_bytes()
    report = payload_report(data, originals, channel_axis=channel_axis)
  return Verification(tuple(rows), exact, near, tuple(problems), report)


def _verified(
  file: OpqFile,
  name: str,
  original: Shaped[np.ndarray, '...'],
  target: Shaped[np.ndarray, '...'],
  values: Shaped[np.ndarray, '...'],
  grids: tuple[Grid, ...],
) -> list[VerifiedLeaf]:
  """Compares every slice of a compressed leaf, or the leaf, with its original weights."""
  codes, axes, scales = file.codes(name), file.axes(name), file.output_scales(name)
  places = np.ndindex(codes.shape[: file.slices(name)])
  return [
    cell_checks.check_leaf(
      trees.slice_name(name, index),
      original[index],
      target[index],
      codes[index],
      values[index],
      OutputGrids.of(grid, None if scales is None else scales[index], codes[index].shape),
      size,
      axes,
    )
    for index, grid, size in zip(places, grids, file.payload_sizes(name), strict=True)
  ]


def _arrays(tree: PyTree) -> dict[str, Shaped[np.ndarray, '...']]:
  """Returns the leaves by name as NumPy arrays in the byte order of this machine."""
  return {name: trees.native(np.asarray(leaf)) for name, leaf in trees.named_leaves(tree).items()}


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
