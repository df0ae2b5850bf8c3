"""Tables of a `SizeReport`: a row a leaf, and the totals of the four sizes."""

from rich import box
from rich.table import Table
from rich.text import Text

from opq_jax.core import messages
from opq_jax.report import tables
from opq_jax.report.records import CompressedLeaf, SizeReport, rate

_MAX_NAMES = 8  # pruned leaves named below a table; more would fill the page

EXPLANATIONS = {
  'nominal': "compressed leaves: survivors at the paper's widths, no positions",
  'packed': 'compressed leaves: fixed-width codes, 1 mask bit a weight, levels',
  'entropy': 'compressed leaves: zeroth-order entropy of the codes',
  'file': 'bytes on disk: headers and uncompressed leaves included',
}


def size_table(report: SizeReport) -> tables.Printable:
  """Returns a table with a row for each compressed leaf: bits per weight of its four sizes, bytes.

  There are columns of escaped weights, and of output channels and rows in which all weights are
  pruned, if the network has any.
  """
  return tables.Printable(lambda: _size_table(report))


def four_sizes(report: SizeReport) -> tables.Printable:
  """Returns a table of the totals: bytes, rate and meaning of each of the four sizes."""
  return tables.Printable(lambda: _four_sizes(report))


def _size_table(report: SizeReport) -> Table:
  has_dead = report.dead_channels or report.dead_rows
  has_slices = any(leaf.slices for leaf in report.compressed)
  optional = ('escaped',) * bool(report.escaped) + ('dead',) * bool(has_dead)

  def counts(row: CompressedLeaf | SizeReport) -> list[str]:
    texts = {'escaped': f'{row.escaped:,}', 'dead': f'{row.dead_channels}/{row.dead_rows}'}
    return [texts[column] for column in optional]

  columns = (
    *('path', *(('slices',) if has_slices else ()), 'weights', 'pruned', *optional, 'levels'),
    *('nominal', 'packed', 'entropy', 'file', 'bytes'),
  )
  rows = [
    (
      leaf.path,
      *([f'{leaf.slices:,}' if leaf.slices else ''] if has_slices else []),
      f'{leaf.weights:,}',
      f'{leaf.sparsity:.1%}',
      *counts(leaf),
      f'{leaf.levels}',
      f'{leaf.nominal_bits:.3f}',
      f'{leaf.packed_bits:.3f}',
      f'{leaf.entropy_bits:.3f}',
      f'{leaf.file_bits:.3f}',
      f'{leaf.file:,}',
    )
    for leaf in report.compressed
  ]
  others = sum(leaf.file for leaf in report.uncompressed)
  payloads = report.file - others - report.headers - report.side_files
  sizes = report.nominal, report.packed, report.entropy, payloads
  means = [f'{8 * size / max(report.weights, 1):.3f}' for size in sizes]
  blank = [''] * (len(columns) - 2)
  totals = [
    (
      f'{len(report.compressed)} compressed',
      *([''] if has_slices else []),
      f'{report.weights:,}',
      f'{report.sparsity:.1%}',
      *counts(report),
      '',
      *means,
      f'{payloads:,}',
    ),
    (f'{len(report.uncompressed)} uncompressed', *blank, f'{others:,}'),
    ('header, index', *blank, f'{report.headers:,}'),
    *([('side files', *blank, f'{report.side_files:,}')] if report.side_files else []),
    ('the file', *blank, f'{report.file:,}'),
  ]
  styles = ['' if leaf.survivors else 'red' for leaf in report.compressed]
  table = tables.leaf_table('sizes in bits per weight', columns, rows, styles, totals)
  notes = []
  if has_dead:
    notes.append('dead: output channels / indices of the first axis, all of whose codes are 0')
  if dead := report.dead_leaves:
    notes.append(f'all codes are 0: {tables.visible(messages.listed(dead, _MAX_NAMES))}')
  # Text, because rich would read '[...]' in a path as markup
  table.caption = Text('\n'.join(notes)) if notes else None
  return table


def _four_sizes(report: SizeReport) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify='left')
  for name in ('size', 'bytes', 'rate'):
    table.add_column(name, justify='left' if name == 'size' else 'right', no_wrap=True)
  table.add_column('what it is')
  for name, explanation in EXPLANATIONS.items():
    size = getattr(report, name)
    base = report.as_float32 if name == 'file' else 4 * report.weights
    style = 'bold green' if name == 'file' else ''
    table.add_row(name, f'{size:,.0f}', f'{rate(base, size):.2f}x', explanation, style=style)
  table.caption = (
    f'rate: times smaller than in float32, compressed leaves {4 * report.weights:,} bytes, all '
    f'{report.as_float32:,}\n'
    f'the file is {report.file_rate:.2f} times smaller than the {report.original:,} bytes of the '
    'original network'
  )
  if rotated := sum(leaf.is_rotated for leaf in report.compressed):
    table.caption += (
      f'\n{rotated:,} of {len(report.compressed):,} compressed leaves have rotated inputs: exact, '
      'without a state for finetuning'
    )
  return table
