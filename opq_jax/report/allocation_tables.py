"""The table of an allocation: targets and predictions of every compressed leaf."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from opq_jax.allocation import LAPLACE_FIT_BOUNDS, Allocation, LeafAllocation
from opq_jax.core import messages, trees
from opq_jax.core.trees import PyTree
from opq_jax.report import tables

_MAX_NAMES = 5  # pruned leaves named below the table

_BEYOND = 'escaped', 'clipped'  # columns of weights beyond the last level


class _Row(NamedTuple):
  """A compressed leaf of the table.

  Attributes:
    name: its path.
    leaf: its allocation.
    weights: their number.
    escaped, clipped: predicted numbers of weights beyond the last level.
    axes: a letter for each axis; '' where it is not known what they are.
  """

  name: str
  leaf: LeafAllocation
  weights: int
  escaped: int
  clipped: int
  axes: str

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


class _Other(NamedTuple):
  """A leaf that is not compressed.

  Attributes:
    name: its path.
    shape: its shape.
    use: what a function does with it; '' where that is not known.
  """

  name: str
  shape: tuple[int, ...]
  use: str


def summary(
  params: PyTree, allocation: Allocation, usage: PyTree | None = None
) -> tables.Printable:
  """Returns a table of an allocation's targets and predictions.

  Columns: what the axes are (with `usage`); number of slices (if there are any); share of pruned
  weights; levels per sign; weights beyond the last level, which are stored as they are, or with
  palettes take that level (if there are any); bits of a survivor at a fixed width, mean over
  channels; predicted entropy-coded bits per weight, tables included; predicted squared error,
  relative to the weights; and the Laplace fit, red and marked `!` where the allocation's density
  describes a leaf badly.  Of slices the row has means, the most levels, and the fit that is
  farthest from 1.

  Args:
    params: the tree that was allocated; shapes are enough.
    allocation: the `Allocation` of it.
    usage: the answer of `opq_jax.usage` for it, or None.

  Returns:
    A table with a row for each compressed leaf, a row for all others, and the totals, in which a
    leaf that is an earlier one again does not count.  Leaves of two axes or more that are not
    compressed are named below it.

  Raises:
    ValueError: `allocation` or `usage` was made for a tree of another structure.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> table = summary(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> 'kernel' in str(table)
  True
  """
  records = trees.records(params, allocation.tree, LeafAllocation)
  uses = [None] * len(records) if usage is None else trees.records(params, usage, object)
  rows, others = [], []
  leaves = trees.named_leaves(params).items()
  for (name, leaf), record, used in zip(leaves, records, uses, strict=True):
    if record is None:
      others.append(_Other(name, tuple(np.shape(leaf)), '' if used is None else used.kind))
    else:
      weights = math.prod(record.shape)
      rows.append(
        _Row(
          name,
          record,
          weights,
          round(float(np.mean(np.asarray(record.escaped))) * weights),
          round(float(np.mean(np.asarray(record.clipped))) * weights),
          '' if used is None else _axes(used, len(record.shape)),
        )
      )
  return tables.Printable(lambda: _summary_table(rows, others))


def _axes(used: Any, ndim: int) -> str:
  """Returns a letter for each axis of a leaf, by its usage."""
  letters = ['-'] * ndim
  if used.product is not None:
    roles = {'i': used.product.inputs, 'o': used.product.outputs, 's': range(used.slices)}
    for letter, axes in roles.items():
      for axis in axes:
        letters[axis] = letter
  return ''.join(letters)


def _summary_table(rows: Sequence[_Row], others: Sequence[_Other]) -> Table:
  # columns that some tables do not need
  optional = {
    'axes': any(row.axes for row in rows),
    'slices': any(row.slices for row in rows),
    **{name: any(getattr(row, name) for row in rows) for name in _BEYOND},
  }
  every = ('path', 'shape', 'axes', 'slices', 'weights', 'pruned', 'levels', *_BEYOND)
  columns = (
    *(name for name in every if optional.get(name, True)),
    *('bits', 'payload', 'error', 'fit'),
  )
  weights = sum(row.counted for row in rows)
  payload = _mean(rows, 'payload')
  beyond = [f'{sum(getattr(row, name) for row in rows):,}' for name in _BEYOND if optional[name]]
  blank = [''] * (1 + optional['axes'] + optional['slices'])
  totals = [
    (
      *(f'{len(rows)} compressed', *blank, f'{weights:,}', f'{_mean(rows, "sparsity"):.1%}', ''),
      *(*beyond, '', f'{payload:.3f}'),
    ),
    (f'{len(others)} uncompressed', *blank, f'{sum(math.prod(leaf.shape) for leaf in others):,}'),
  ]
  texts = [_texts(row, optional) for row in rows]
  styles = ['red' if row.is_misfit else '' for row in rows]
  table = tables.leaf_table('', columns, texts, styles, totals)
  rate = f'{32 / payload:.2f}' if payload else 'inf'
  lines = [f'predicted: {payload:.3f} bits per weight with tables, {rate} times fewer than 32']
  if optional['axes']:
    lines.append('axes: s slices, i inputs, o outputs of a product or look-up')
  lines += _dead_line(rows)
  lines += _left_line(others)
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


def _texts(row: _Row, optional: dict[str, bool]) -> tuple[str, ...]:
  """Returns the cells of a row."""
  return (
    row.name,
    'x'.join(map(str, row.leaf.shape)),
    *([row.axes] if optional['axes'] else []),
    *([f'{row.slices:,}' if row.slices else ''] if optional['slices'] else []),
    f'{row.weights:,}',
    f'{row.mean("sparsity"):.1%}',
    f'{int(np.max(np.asarray(row.leaf.levels)))}',
    *(f'{getattr(row, name):,}' for name in _BEYOND if optional[name]),
    f'{row.mean("bits"):.2f}',
    f'{row.mean("payload"):.3f}',
    f'{row.mean("error"):.2%}',
    '-' if math.isnan(row.fit) else f'{row.fit:.2f}{"!" if row.is_misfit else " "}',
  )


def _mean(rows: Sequence[_Row], field: str) -> float:
  """Returns the mean of a leaf's field over all weights."""
  total = sum(row.counted * row.mean(field) for row in rows)
  return total / max(sum(row.counted for row in rows), 1)


def _left_line(others: Sequence[_Other]) -> list[str]:
  """Returns the line about leaves that are stored as they are though they have axes enough."""
  left = [leaf for leaf in others if len(leaf.shape) > 1]
  if not left:
    return []
  named = [f'{leaf.name} ({leaf.use})' if leaf.use else leaf.name for leaf in left]
  listed = messages.listed(named, _MAX_NAMES)
  return [tables.visible(f'of two axes or more, and not compressed: {listed}')]


def _dead_line(rows: Sequence[_Row]) -> list[str]:
  """Returns the line about channels, rows and leaves without survivors; none if all have some."""
  channels, indices = (
    sum(int(np.sum(np.asarray(getattr(row.leaf, field)))) for row in rows)
    for field in ('dead_channels', 'dead_rows')
  )
  if not channels and not indices:
    return []
  dead = [row.name for row in rows if row.mean('sparsity') == 1]
  names = tables.visible(messages.listed(dead, _MAX_NAMES))
  return [
    f'all weights pruned of {channels:,} output channels, of {indices:,} indices of a first axis, '
    f'and of {len(dead)} leaves{": " if dead else ""}{names}'
  ]
