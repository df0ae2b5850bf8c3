"""What an `.opq` file claims, recomputed against the weights that it was made of.

A file is whole if its checksums hold; that it holds the right network is another matter.  `verify`
takes nothing on trust but the format: it looks up for every original weight what the cell rule of
`opq_jax.compression.codes` makes of it,

    code 0                where |w| <= threshold
    code sign(w) k        where threshold + (k-1) step <= |w| < threshold + k step, the last cell
                          open above
    code -128             where the value is w itself, bit for bit

and compares names, shapes, dtypes, codes, sizes, and every leaf that is not compressed.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Int8, Shaped
from rich.table import Table

from opq_jax.compression.codes import ESCAPE, ESCAPED, LeafState
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.file.reader import OpqFile
from opq_jax.file.writer import escaped_values, written_leaf
from opq_jax.report import tables
from opq_jax.report.sizes import SizeReport, payload_report

_CHUNK = 1 << 18  # weights at a time, in float64
_TINY = float(np.finfo(np.float32).tiny)
_ROUNDING = 1e-4  # of a step: (|w| - threshold) / step is computed in float32, and is 127 at most
_BFLOAT16_STEP = 2.0**-7  # relative, at most
_CORRECTED = 1e-3  # of the largest value of a corrected leaf: platforms sum in other orders


@dataclasses.dataclass(frozen=True)
class VerifiedLeaf:
  """A compressed leaf of a file against its original weights.

  Attributes:
    path: its name in the tree.
    weights: how many.
    sparsity: the share whose code is 0.
    levels: cells a sign.
    error: ||w - w^||^2 / ||w||^2, 0 where all weights are.
    worst: the largest |w - w^| of a survivor that is not clipped, in steps; below 1.
    clipped: survivors beyond the last cell that are not escaped.
    escaped: survivors that are stored as they are.
    stored: bytes of its payload.
    problems: what does not hold.
  """

  path: str
  weights: int
  sparsity: float
  levels: int
  error: float
  worst: float
  clipped: int
  escaped: int
  stored: int
  problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
  """What `verify` found; it prints as a table.

  Attributes:
    compressed: a row a compressed leaf.
    exact: leaves that are not compressed and equal the original bit for bit.
    corrected: those that equal the corrected ones.
    problems: all that does not hold, in words; nothing where the file is what it claims to be.
    report: the four sizes, by the ranges of the original weights; None where names or shapes are
      not the original's.
  """

  compressed: tuple[VerifiedLeaf, ...]
  exact: int
  corrected: int
  problems: tuple[str, ...]
  report: SizeReport | None

  @property
  def holds(self) -> bool:
    """Whether every claim of the file holds."""
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
  channel_axis: int | Callable[[str, Any], int] = -1,
) -> Verification:
  """Recomputes every claim of a file from the weights that it was made of.

  What must hold:

    names, shapes, dtypes   those of `params` (float64 may be compressed as float32)
    codes                   of every weight, by the cell rule and the leaf's own grid
    values                  finite; of escaped weights, bit for bit those of `params`, or of `coded`
    payloads                as many bytes as the codes take when they are coded again
    uncompressed leaves     bit for bit those of `params`, or nearly those of `corrected`
    sizes                   of all parts, which make the file's

  Args:
    path: of the file; or its bytes.
    params: the original weights, before compression, in any byte order; for a network that was
      finetuned, the latent weights no longer know which of them were pruned, and its file does not
      hold against them.
    coded: for a file whose codes an encoder has chosen, the decoded values that
      `encoder.choose_codes(params, grids)` returns on the file's own grids: codes must name their
      cells.
    corrected: `params` with BatchNorm as it was corrected, for a file that holds it so.
    channel_axis: as in `opq_jax.size_report`, for the nominal size.

  Returns:
    A `Verification`; `holds` says it all.

  Raises:
    ValueError: this is no whole and undamaged `.opq` file.

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
  expected = {} if corrected is None else _arrays(corrected)
  chosen_for = originals if coded is None else _arrays(coded)
  rows: list[VerifiedLeaf] = []
  problems: list[str] = []
  counts = {'exact': 0, 'corrected': 0}
  is_same_tree = True
  with OpqFile(path) as file:
    stored = file.sizes()
    for name in dict.fromkeys([*file, *originals]):
      if name not in originals or name not in file:
        here, there = ('file', 'weights') if name in file else ('weights', 'file')
        problems.append(f'{name}: found in the {here}, not in the {there}')
        is_same_tree = False
        continue
      value, record = file[name], file.leaf_state(name)
      original = originals[name]
      if record is not None and original.dtype == np.float64 and value.dtype == np.float32:
        original = originals[name] = original.astype(np.float32)
      if (value.shape, value.dtype) != (original.shape, original.dtype):
        problems.append(
          f'{name}: found {value.dtype.name}{list(value.shape)}, expected '
          f'{original.dtype.name}{list(original.shape)}'
        )
        is_same_tree = False
      elif record is not None:
        target = original if coded is None else chosen_for[name]
        payload = stored[name] - 12
        rows.append(_verified(name, original, target, file.codes(name), value, record, payload))
        problems += rows[-1].problems
      elif value.tobytes() == original.tobytes():
        counts['exact'] += 1
      elif name in expected and _is_near(value, expected[name]):
        counts['corrected'] += 1
      else:
        problems.append(
          f'{name}: found {_different(value, original)} values that are not the original ones, '
          'expected none'
        )
    report = None
    if is_same_tree:
      narrowed = jax.tree.unflatten(jax.tree.structure(params), originals.values())
      state = file.load(like=narrowed)[1]
      data = path if isinstance(path, bytes) else Path(path).read_bytes()
      report = payload_report(data, narrowed, state, channel_axis=channel_axis)
  return Verification(tuple(rows), **counts, problems=tuple(problems), report=report)


def _arrays(tree: PyTree) -> dict[str, Shaped[np.ndarray, '...']]:
  """The leaves by name, in the byte order of this machine."""
  arrays = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(tree).items()}
  is_native = lambda array: array.dtype.byteorder in '=|'
  return {
    name: array if is_native(array) else array.astype(array.dtype.newbyteorder('='))
    for name, array in arrays.items()
  }


def _verified(
  name: str,
  original: Shaped[np.ndarray, '...'],
  target: Shaped[np.ndarray, '...'],
  codes: Int8[np.ndarray, '...'],
  values: Shaped[np.ndarray, '...'],
  record: LeafState,
  stored: int,
) -> VerifiedLeaf:
  """One compressed leaf; its codes are those of `target`, its errors those against `original`."""
  threshold, step, levels = float(record.threshold), float(record.step), int(record.levels)
  flat = [array.reshape(-1) for array in (original, target, codes, values)]
  kinds = np.asarray(record.kinds).reshape(-1)
  pruned = kept = signs = outside = clipped = escaped = changed = marks = infinite = 0
  worst = squares = errors = 0.0
  for start in range(0, original.size, _CHUNK):
    part = slice(start, start + _CHUNK)
    weight, aim, code, value = (array[part].astype(np.float64) for array in flat)
    is_escaped = code == ESCAPE
    escaped += int(np.count_nonzero(is_escaped))
    changed += _different(flat[3][part][is_escaped], flat[1][part][is_escaped])
    marks += int(np.count_nonzero((kinds[part] == ESCAPED) != is_escaped))
    infinite += int(np.count_nonzero(np.isfinite(weight) & ~np.isfinite(value)))
    is_kept = (code != 0) & ~is_escaped
    magnitude = np.abs(aim)
    # XLA takes a denormal number for 0 on some platforms and for itself on others
    is_normal = ~((magnitude > 0) & (magnitude < _TINY))
    is_pruned = code == 0
    pruned += int(np.count_nonzero(is_normal & is_pruned & ~(magnitude <= threshold)))
    kept += int(np.count_nonzero(is_normal & is_kept & ~(magnitude > threshold)))
    signs += int(np.count_nonzero(is_kept & ((aim < 0) != (code < 0))))
    # where in its own cell a survivor lies, in steps
    place = (magnitude - threshold) / step - (np.abs(code) - 1)
    is_last = np.abs(code) >= levels
    is_inside = (place >= -_ROUNDING) & (is_last | (place < 1 + _ROUNDING))
    outside += int(np.count_nonzero(is_kept & ~is_inside))
    is_clipped = is_kept & is_last & (place >= 1)
    clipped += int(np.count_nonzero(is_clipped))
    distance = np.abs(weight - value) / step
    worst = max(worst, float(np.max(distance, where=is_kept & ~is_clipped, initial=0)))
    errors += float(np.sum((weight - value) ** 2))
    squares += float(np.sum(weight**2))
  problems = [
    f'{name}: found {count} {what}, expected none'
    for count, what in (
      (pruned, f'pruned weights above the threshold {threshold:g}'),
      (kept, f'survivors that the threshold {threshold:g} prunes'),
      (signs, 'survivors of the other sign'),
      (outside, 'survivors outside of their cells'),
      (changed, 'escaped weights that are not the original ones'),
      (marks, 'escaped weights whose code and kind differ'),
      (infinite, 'finite weights that came back infinite or NaN'),
    )
    if count
  ]
  kept_as_is = escaped_values(codes, values)
  size = lambda contexts: len(written_leaf(codes, kept_as_is, record, contexts=contexts).payload)
  if stored != (again := size(True)) and stored != (plain := size(False)):
    problems.append(
      f'{name}: found a payload of {stored} bytes, expected {again}, or {plain} without contexts'
    )
  return VerifiedLeaf(
    path=name,
    weights=original.size,
    sparsity=1 - int(np.count_nonzero(codes)) / original.size,
    levels=levels,
    error=errors / squares if squares else math.inf if errors else 0.0,
    worst=worst,
    clipped=clipped,
    escaped=escaped,
    stored=stored,
    problems=tuple(problems),
  )


def _is_near(value: Shaped[np.ndarray, '...'], expected: Shaped[np.ndarray, '...']) -> bool:
  if value.shape != expected.shape or not np.issubdtype(value.dtype, np.floating):
    return False
  most = _CORRECTED * float(np.max(np.abs(expected), initial=0))
  bound = np.full(value.shape, most)
  if (value == value.astype(ml_dtypes.bfloat16)).all():
    # where two platforms differ, they may round to neighbours
    bound += _BFLOAT16_STEP * np.abs(expected)
  return bool((np.abs(value - expected) <= bound).all())


def _different(value: Shaped[np.ndarray, '...'], original: Shaped[np.ndarray, '...']) -> int:
  """How many elements differ in some bit."""
  first, second = (
    np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8) for array in (value, original)
  )
  return int(np.count_nonzero((first != second).any(axis=1)))


def _table(found: Verification) -> Table:
  columns = (
    *('path', 'weights', 'pruned', 'levels', 'error', 'worst'),
    *('clipped', 'escaped', 'bytes', 'holds'),
  )
  lines = [
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
    for leaf in found.compressed
  ]
  styles = ['red' if leaf.problems else '' for leaf in found.compressed]
  weights = sum(leaf.weights for leaf in found.compressed)
  survivors = sum(leaf.weights * (1 - leaf.sparsity) for leaf in found.compressed)
  totals = [
    (
      f'{len(lines)} compressed',
      f'{weights:,}',
      f'{1 - survivors / max(weights, 1):.1%}',
      '',
      '',
      f'{max((leaf.worst for leaf in found.compressed), default=0):.3f}',
      f'{sum(leaf.clipped for leaf in found.compressed):,}',
      f'{sum(leaf.escaped for leaf in found.compressed):,}',
      f'{sum(leaf.stored for leaf in found.compressed):,}',
      'yes' if not any(leaf.problems for leaf in found.compressed) else 'no',
    ),
    (f'{found.exact} bit for bit',),
  ]
  if found.corrected:
    totals.append((f'{found.corrected} corrected',))
  table = tables.leaf_table('', columns, lines, styles, totals)
  table.caption = (
    'error: squared, relative to the weights\nworst: the largest error of a survivor, in steps'
  )
  return table
