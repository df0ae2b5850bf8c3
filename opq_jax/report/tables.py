"""What a person reads: tables with a row a leaf, and the one of an allocation.

A table prints as plain text with `print`, 100 columns wide, and in colour on a `rich` console.
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opq_jax.allocation.allocator import LAPLACE_FIT_BOUNDS, Allocation, LeafAllocation
from opq_jax.core import trees
from opq_jax.core.trees import PyTree

WIDTH = 100
_LEAST_PATH = 16


class Printable:
  """A table that `print` and `rich` both show.

  Args:
    build: makes the table; called anew for every showing.
  """

  def __init__(self, build: Callable[[], Table]):
    self._build = build

  def __rich__(self) -> Table:
    return self._build()

  def __str__(self) -> str:
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(self._build())
    return '\n'.join(line.rstrip() for line in text.getvalue().splitlines())

  __repr__ = __str__


def summary(params: PyTree, allocation: Allocation) -> Printable:
  """What an allocation asks of every leaf, and what it predicts.

  Columns: the share of weights pruned; levels a sign; where there are any, weights beyond the last
  level, which are stored as they are; bits of a survivor at a fixed width, mean
  over channels; entropy-coded bits per weight, tables included; predicted relative squared error in
  per cent; and the Laplace fit, red and marked `!` outside the bounds within which the
  allocation's density describes a leaf.

  Args:
    params: the tree that was allocated.
    allocation: what `opq_jax.allocate` returned for it.

  Returns:
    A table with one row a compressed leaf, one for all others, and the totals.

  Raises:
    ValueError: `allocation` was made for a tree of other structure.

  >>> import jax, jax.numpy as jnp, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': jnp.zeros(64)}
  >>> table = summary(params, opq_jax.allocate(params, compression_rate=16.0))
  >>> 'kernel' in str(table)
  True
  """
  found = trees.records(params, allocation.tree, LeafAllocation)
  named = list(zip(trees.named_leaves(params).items(), found, strict=True))
  rows = [(name, leaf) for (name, _), leaf in named if leaf is not None]
  others = [int(np.size(leaf)) for (_, leaf), record in named if record is None]
  return Printable(lambda: _summary_table(rows, others))


def shorten(path: str, width: int) -> str:
  """`path` in at most `width` characters, cut in its middle.

  >>> shorten('encoder.layer.0.attention.output.dense.weight', 24)
  'encoder.lay…dense.weight'
  """
  if len(path) <= width:
    return path
  head = (width - 1) // 2
  return f'{path[:head]}…{path[len(path) - (width - 1 - head) :]}'


def visible(text: str) -> str:
  r"""`text` with escapes in place of what a terminal would obey: files bring names of any kind.

  >>> visible('conv' + chr(27) + '[2J')
  'conv\\x1b[2J'
  """
  escaped = lambda c: c.encode('unicode_escape').decode('ascii')
  return ''.join(c if c.isprintable() else escaped(c) for c in text)


def _summary_table(rows: list[tuple[str, LeafAllocation]], others: list[int]) -> Table:
  columns: tuple[str, ...] = (
    'path',
    'shape',
    'weights',
    'pruned',
    'levels',
    'bits',
    'payload',
    'error',
    'fit',
  )
  sizes = np.array([math.prod(leaf.shape) for _, leaf in rows])
  escaped = np.rint([float(leaf.escaped) for _, leaf in rows] * sizes).astype(int)
  has_escaped = bool(escaped.any())
  if has_escaped:
    columns = (*columns[:5], 'escaped', *columns[5:])
  with_escaped = lambda line, count: (*line[:5], count, *line[5:]) if has_escaped else line
  low, high = LAPLACE_FIT_BOUNDS
  lines, styles = [], []
  for (name, leaf), size, beyond in zip(rows, sizes, escaped, strict=True):
    fit = float(leaf.laplace_fit)
    is_misfit = fit < low or fit > high
    styles.append('red' if is_misfit else '')
    line = (
      name,
      'x'.join(map(str, leaf.shape)),
      f'{size:,}',
      f'{float(leaf.sparsity):.1%}',
      f'{int(leaf.levels)}',
      f'{float(np.mean(np.asarray(leaf.bits))):.2f}',
      f'{float(leaf.payload):.3f}',
      f'{float(leaf.error):.2%}',
      '-' if math.isnan(fit) else f'{fit:.2f}{"!" if is_misfit else " "}',
    )
    lines.append(with_escaped(line, f'{beyond:,}'))
  mean = lambda field: float(
    np.sum(sizes * [float(getattr(leaf, field)) for _, leaf in rows]) / max(sizes.sum(), 1)
  )
  pruned, payload = f'{mean("sparsity"):.1%}', mean('payload')
  totals = [
    with_escaped(
      (f'{len(rows)} compressed', '', f'{sizes.sum():,}', pruned, '', '', f'{payload:.3f}'),
      f'{escaped.sum():,}',
    ),
    (f'{len(others)} uncompressed', '', f'{sum(others):,}'),
  ]
  table = leaf_table('', columns, lines, styles, totals)
  rate = f'{32 / payload:.2f}' if payload else 'inf'
  table.caption = (
    f'predicted: {payload:.3f} bits per weight with tables, {rate} times fewer than 32'
  )
  dead = [name for name, leaf in rows if float(leaf.sparsity) == 1]
  channels, axes = (
    sum(int(getattr(leaf, field)) for _, leaf in rows) for field in ('dead_channels', 'dead_rows')
  )
  if channels or axes:
    table.caption += (
      f'\nall weights pruned of {channels:,} output channels, of {axes:,} indices of a first axis, '
      f'and of {len(dead)} leaves{": " if dead else ""}{visible(", ".join(dead[:5]))}'
    )
  if misfits := sum(style == 'red' for style in styles):
    table.caption += (
      f'\n! far from the Laplace density (fit outside {low} ... {high}): '
      f'{misfits} of {len(rows)} leaves'
    )
  return table


def leaf_table(
  title: str,
  columns: Sequence[str],
  rows: Sequence[Sequence[str]],
  styles: Sequence[str],
  totals: Sequence[Sequence[str]],
) -> Table:
  """A table in which only paths give way where `WIDTH` is too narrow.

  Args:
    title: above it, or ''.
    columns: their names; the first is 'path'.
    rows: of texts, as many as columns.
    styles: of each row, in rich's words, or ''.
    totals: rows below, which may be shorter.
  """
  rows = [(visible(row[0]), *row[1:]) for row in rows]
  lines = [columns, *rows, *totals]
  widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(columns))]
  left = WIDTH - 1 - sum(widths[1:]) - len(columns)
  # two spaces between columns if every path fits then, else one
  padding = 1 if widths[0] + len(columns) <= left else 0
  left = max(left - padding * len(columns), _LEAST_PATH)
  paths = [row[0] for row in rows]
  if widths[0] > left:
    paths = [shorten(path, left) for path in _without_root(paths)]
  table = Table(
    title=title or None,
    title_justify='left',
    caption_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=(0, padding, 0, 0),
  )
  for column in columns:
    table.add_column(column, justify='left' if column == 'path' else 'right', no_wrap=True)
  # Text, because a path may hold what rich would take for markup
  for path, row, style in zip(paths, rows, styles, strict=True):
    table.add_row(*map(Text, (path, *row[1:])), style=style)
  table.add_section()
  for total in totals:
    table.add_row(*map(Text, total), style='bold')
  return table


def _without_root(paths: list[str]) -> list[str]:
  """Paths without the folders that all of them share, which tell no leaf from another."""
  root = ''
  for folders in zip(*(path.split('/')[:-1] for path in paths), strict=False):
    if len(set(folders)) > 1:
      break
    root += f'{folders[0]}/'
  return [f'…/{path.removeprefix(root)}' if root else path for path in paths]
