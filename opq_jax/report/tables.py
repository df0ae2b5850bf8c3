"""Tables with a row a leaf, for `print` (plain text of 100 columns) and `rich` (in colour)."""

import io
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100
"""Columns of a table that is printed as plain text."""

_MIN_PATH = 16  # columns of a path, however many the numbers take


class Printable:
  """A table for both `print` and `rich`.

  Args:
    build: makes the table; called for each output, since a rich table keeps the state of one.
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


def shorten(path: str, width: int) -> str:
  """Returns a path of at most `width` characters, cut in its middle.

  >>> shorten('encoder.layer.0.attention.output.dense.weight', 24)
  'encoder.lay…dense.weight'
  """
  if len(path) <= width:
    return path
  head = (width - 1) // 2
  return f'{path[:head]}…{path[len(path) - (width - 1 - head) :]}'


def visible(text: str) -> str:
  r"""Returns text with control characters escaped: names in a file are untrusted.

  >>> visible('conv' + chr(27) + '[2J')
  'conv\\x1b[2J'
  """
  escaped = lambda c: c.encode('unicode_escape').decode('ascii')
  return ''.join(c if c.isprintable() else escaped(c) for c in text)


def leaf_table(
  title: str,
  columns: Sequence[str],
  rows: Sequence[Sequence[str]],
  styles: Sequence[str],
  totals: Sequence[Sequence[str]],
) -> Table:
  """Returns a table of at most `WIDTH` columns; only paths are shortened.

  Args:
    title: the title, or ''.
    columns: names of the columns; the first is 'path'.
    rows: the texts of each row, one a column.
    styles: rich's style of each row, or ''.
    totals: rows below a rule; they may have fewer texts.
  """
  rows = [(visible(row[0]), *row[1:]) for row in rows]
  lines = [columns, *rows, *totals]
  widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(columns))]
  left = WIDTH - 1 - sum(widths[1:]) - len(columns)
  # two spaces between columns if all paths fit, else one
  padding = 1 if widths[0] + len(columns) <= left else 0
  left = max(left - padding * len(columns), _MIN_PATH)
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
  # Text, because rich would read '[...]' in a path as markup
  for path, row, style in zip(paths, rows, styles, strict=True):
    table.add_row(*map(Text, (path, *row[1:])), style=style)
  table.add_section()
  for total in totals:
    table.add_row(*map(Text, total), style='bold')
  return table


def _without_root(paths: list[str]) -> list[str]:
  """Returns the paths with '…/' in the place of the folders that all of them share."""
  root = ''
  for folders in zip(*(path.split('/')[:-1] for path in paths), strict=False):
    if len(set(folders)) > 1:
      break
    root += f'{folders[0]}/'
  return [f'…/{path.removeprefix(root)}' if root else path for path in paths]
