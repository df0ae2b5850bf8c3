"""What a person reads: tables of an allocation and of the four sizes.

A table prints as plain text with `print`, 100 columns wide, and in colour on a `rich` console.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opq_jax import trees
from opq_jax.allocation import LAPLACE_FIT_BOUNDS, Allocation, LeafAllocation
from opq_jax.sizes import SizeReport
from opq_jax.trees import PyTree

WIDTH = 100
_PATH_WIDTH = 32

_WHAT = {
  'nominal': "survivors at the paper's fixed widths; no positions; compressed leaves only",
  'packed': 'fixed-width codes, 1 mask bit per weight, levels; compressed leaves only',
  'entropy': 'zeroth-order entropy of the codes; compressed leaves only',
  'file': 'bytes on disk, headers and uncompressed leaves included',
}


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

  Columns: the share of weights pruned; levels a sign; bits of a survivor at a fixed width, mean
  over channels; entropy of the codes in bits per weight; predicted relative squared error in
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


def size_table(report: SizeReport) -> Printable:
  """A row a compressed leaf: its four sizes in bits per weight, and its bytes in the file."""
  return Printable(lambda: _size_table(report))


def four_sizes(report: SizeReport) -> Printable:
  """The totals: bytes, bits per weight and rate of each of the four sizes, and what each is."""
  return Printable(lambda: _four_sizes(report))


def shorten(path: str, width: int = _PATH_WIDTH) -> str:
  """`path` in at most `width` characters, cut in its middle.

  >>> shorten('encoder.layer.0.attention.output.dense.weight', 24)
  'encoder.lay…dense.weight'
  """
  if len(path) <= width:
    return path
  head = (width - 1) // 2
  return f'{path[:head]}…{path[len(path) - (width - 1 - head) :]}'


def _summary_table(rows: list[tuple[str, LeafAllocation]], others: list[int]) -> Table:
  table = _table(
    '', 'path', 'shape', 'weights', 'pruned', 'levels', 'bits', 'entropy', 'error', 'fit'
  )
  sizes = np.array([math.prod(leaf.shape) for _, leaf in rows])
  low, high = LAPLACE_FIT_BOUNDS
  misfits = 0
  for (name, leaf), size in zip(rows, sizes, strict=True):
    fit = float(leaf.laplace_fit)
    is_misfit = fit < low or fit > high
    misfits += is_misfit
    _add(
      table,
      name,
      'x'.join(map(str, leaf.shape)),
      f'{size:,}',
      f'{float(leaf.sparsity):.1%}',
      f'{int(leaf.levels)}',
      f'{float(np.mean(np.asarray(leaf.bits))):.2f}',
      f'{float(leaf.entropy):.3f}',
      f'{float(leaf.error):.2%}',
      '-' if math.isnan(fit) else f'{fit:.2f}{"!" if is_misfit else " "}',
      style='red' if is_misfit else '',
    )
  if others:
    _add(table, f'{len(others)} uncompressed leaves', '', f'{sum(others):,}', style='dim')
  table.add_section()
  mean = lambda field: float(
    np.sum(sizes * [float(getattr(leaf, field)) for _, leaf in rows]) / max(sizes.sum(), 1)
  )
  entropy = mean('entropy')
  _add(
    table,
    f'{len(rows)} compressed leaves',
    '',
    f'{sizes.sum():,}',
    f'{mean("sparsity"):.1%}',
    '',
    '',
    f'{entropy:.3f}',
    style='bold',
  )
  rate = f'{32 / entropy:.2f}' if entropy else 'inf'
  caption = f'predicted: {entropy:.3f} bits per weight, an entropy rate of {rate}'
  if misfits:
    caption += f'\n! {misfits} leaves far from the Laplace density: fit outside {low} ... {high}'
  table.caption = caption
  return table


def _size_table(report: SizeReport) -> Table:
  table = _table(
    'sizes in bits per weight',
    *('path', 'weights', 'pruned', 'levels', 'nominal', 'packed', 'entropy', 'file', 'bytes'),
  )
  for leaf in report.compressed:
    bits = leaf.nominal_bits, leaf.packed_bits, leaf.entropy_bits, leaf.file_bits
    _add(
      table,
      leaf.path,
      f'{leaf.weights:,}',
      f'{leaf.sparsity:.1%}',
      f'{leaf.levels}',
      *(f'{number:.3f}' for number in bits),
      f'{leaf.file:,}',
    )
  table.add_section()
  others = sum(leaf.file for leaf in report.uncompressed)
  sizes = report.nominal, report.packed, report.entropy, report.file - others - report.headers
  total = f'{report.weights:,}', f'{report.sparsity:.1%}', ''
  means = [f'{8 * size / max(report.weights, 1):.3f}' for size in sizes]
  _add(table, f'{len(report.compressed)} compressed leaves', *total, *means, f'{sizes[3]:,}')
  blank = [''] * 7
  _add(table, f'{len(report.uncompressed)} uncompressed leaves', *blank, f'{others:,}')
  _add(table, 'header, index and metadata', *blank, f'{report.headers:,}')
  _add(table, 'the file', *blank, f'{report.file:,}', style='bold')
  return table


def _four_sizes(report: SizeReport) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify='left')
  for name in ('size', 'bytes', 'rate'):
    table.add_column(name, justify='left' if name == 'size' else 'right', no_wrap=True)
  table.add_column('what it is')
  for name, what in _WHAT.items():
    size, rate = getattr(report, name), getattr(report, f'{name}_rate')
    style = 'bold green' if name == 'file' else ''
    table.add_row(name, f'{size:,.0f}', f'{rate:.2f}x', what, style=style)
  table.caption = (
    f'nominal, packed and entropy rates: against {4 * report.weights:,} bytes of float32; '
    f'file rate: against all {report.original:,}'
  )
  return table


def _table(title: str, path: str, *columns: str) -> Table:
  table = Table(
    title=title or None,
    title_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  table.caption_justify = 'left'
  table.add_column(path, no_wrap=True)
  for column in columns:
    table.add_column(column, justify='right', no_wrap=True)
  return table


def _add(table: Table, path: str, *cells: str, style: str = '') -> None:
  # Text, because a path may hold what rich would take for markup
  table.add_row(Text(shorten(path)), *map(Text, cells), style=style)
