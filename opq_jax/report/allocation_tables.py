"""The table of an allocation: targets and predictions of every compressed leaf."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from opq_jax.allocation import LAPLACE_FIT_BOUNDS, Allocation, LeafAllocation
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.report import tables

_MAX_NAMES = 5  # pruned leaves named below the table


class _Row(NamedTuple):
  """A compressed leaf of the table.

  Attributes:
    name: its path.
    leaf: its allocation.
    weights: their number.
    escaped: predicted number of escaped weights.
  """

  name: str
  leaf: LeafAllocation
  weights: int
  escaped: int

  @property
  def counted(self) -> int:
    """Weights that count in totals: a leaf that is an earlier one again adds none."""
    return 0 if self.leaf.tied_to else self.weights

  @property
  def slices(self) -> int:
    """Returns how many slices the leaf has; 0 without slices."""
    return math.prod(self.leaf.slice_shape) if self.leaf.slices else 0

  @property
  def fit(self) -> float:
    """Returns the Laplace fit, of slices the one farthest from 1; NaN where there is none."""
    fits = np.ravel(np.asarray(self.leaf.laplace_fit))
    if np.isnan(fits).any():
      return math.nan
    return float(fits[np.argmax(np.abs(np.log(np.maximum(fits, 1e-30))))])

  @property
  def is_misfit(self) -> bool:
    """Returns whether the Laplace density describes the leaf, or a slice of it, badly."""
    low, high = LAPLACE_FIT_BOUNDS
    return self.fit < low or self.fit > high  # False for NaN: a leaf of zeros has no fit

  def mean(self, field: str) -> float:
    """Returns a field of the leaf, of slices its mean."""
    return float(np.mean(np.asarray(getattr(self.leaf, field))))


def summary(params: PyTree, allocation: Allocation) -> tables.Printable:
  """Returns a table of an allocation's targets and predictions.

  Columns: number of slices (if there are any); share of pruned weights; levels per sign; weights
  beyond the last level, which are stored as they are (if there are any); bits of a survivor at a
  fixed width, mean over channels; predicted entropy-coded bits per weight, tables included;
  predicted squared error, relative to the weights; and the Laplace fit, red and marked `!` where
  the allocation's density describes a leaf badly.  Of slices the row has means, the most levels,
  and the fit that is farthest from 1.

  Args:
    params: the tree that was allocated; shapes are enough.
    allocation: the `Allocation` of it.

  Returns:
    A table with a row for each compressed leaf, a row for all others, and the totals, in which a
    leaf that is an earlier one again does not count.

  Raises:
    ValueError: `allocation` was made for a tree of another structure.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> table = summary(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> 'kernel' in str(table)
  True
  """
  records = trees.records(params, allocation.tree, LeafAllocation)
  rows, others = [], []
  for (name, leaf), record in zip(trees.named_leaves(params).items(), records, strict=True):
    if record is None:
      others.append(int(np.size(leaf)))
    else:
      weights = math.prod(record.shape)
      rows.append(
        _Row(name, record, weights, round(float(np.mean(np.asarray(record.escaped))) * weights))
      )
  return tables.Printable(lambda: _summary_table(rows, others))


def _summary_table(rows: Sequence[_Row], others: Sequence[int]) -> Table:
  has_escaped, has_slices = any(row.escaped for row in rows), any(row.slices for row in rows)
  columns = (
    *('path', 'shape', *(('slices',) if has_slices else ()), 'weights', 'pruned', 'levels'),
    *(('escaped',) if has_escaped else ()),
    *('bits', 'payload', 'error', 'fit'),
  )
  weights = sum(row.counted for row in rows)
  payload = _mean(rows, 'payload')
  escaped_total = [f'{sum(row.escaped for row in rows):,}'] if has_escaped else []
  blank = [''] * (1 + has_slices)
  totals = [
    (
      *(f'{len(rows)} compressed', *blank, f'{weights:,}', f'{_mean(rows, "sparsity"):.1%}', ''),
      *(*escaped_total, '', f'{payload:.3f}'),
    ),
    (f'{len(others)} uncompressed', *blank, f'{sum(others):,}'),
  ]
  texts = [_texts(row, has_escaped, has_slices) for row in rows]
  styles = ['red' if row.is_misfit else '' for row in rows]
  table = tables.leaf_table('', columns, texts, styles, totals)
  rate = f'{32 / payload:.2f}' if payload else 'inf'
  lines = [f'predicted: {payload:.3f} bits per weight with tables, {rate} times fewer than 32']
  lines += _dead_line(rows)
  for row in rows:
    if row.leaf.tied_to:
      what = 'the transpose of ' if row.leaf.is_transposed else ''
      lines.append(tables.visible(f'{row.name} is {what}{row.leaf.tied_to}, and counts once'))
  if misfits := sum(row.is_misfit for row in rows):
    low, high = LAPLACE_FIT_BOUNDS
    lines.append(
      f'! far from the Laplace density (fit outside {low} ... {high}): '
      f'{misfits} of {len(rows)} leaves'
    )
  table.caption = '\n'.join(lines)
  return table


def _texts(row: _Row, has_escaped: bool, has_slices: bool) -> tuple[str, ...]:
  """Returns the cells of a row."""
  return (
    row.name,
    'x'.join(map(str, row.leaf.shape)),
    *([f'{row.slices:,}' if row.slices else ''] if has_slices else []),
    f'{row.weights:,}',
    f'{row.mean("sparsity"):.1%}',
    f'{int(np.max(np.asarray(row.leaf.levels)))}',
    *([f'{row.escaped:,}'] if has_escaped else []),
    f'{row.mean("bits"):.2f}',
    f'{row.mean("payload"):.3f}',
    f'{row.mean("error"):.2%}',
    '-' if math.isnan(row.fit) else f'{row.fit:.2f}{"!" if row.is_misfit else " "}',
  )


def _mean(rows: Sequence[_Row], field: str) -> float:
  """Returns the mean of a leaf's field over all weights."""
  total = sum(row.counted * row.mean(field) for row in rows)
  return total / max(sum(row.counted for row in rows), 1)


def _dead_line(rows: Sequence[_Row]) -> list[str]:
  """Returns the line about channels, rows and leaves without survivors; none if all have some."""
  channels, indices = (
    sum(int(np.sum(np.asarray(getattr(row.leaf, field)))) for row in rows)
    for field in ('dead_channels', 'dead_rows')
  )
  if not channels and not indices:
    return []
  dead = [row.name for row in rows if row.mean('sparsity') == 1]
  names = tables.visible(', '.join(dead[:_MAX_NAMES]))
  return [
    f'all weights pruned of {channels:,} output channels, of {indices:,} indices of a first axis, '
    f'and of {len(dead)} leaves{": " if dead else ""}{names}'
  ]
