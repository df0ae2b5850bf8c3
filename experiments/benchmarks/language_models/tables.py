"""What the rows of results say: codecs beside each other at equal bits, as tables and as a plot.

    python -m experiments.benchmarks.language_models.tables     # draws the plots

At some number of bits the best rival is read off the front of all rivals, the lower convex hull of
the logarithm of KL over bits: between two rows a rival may mix them.  Beyond its last row the front
is flat: a rival may leave bits unused.  There are two fronts: of rivals without data, and of all.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.benchmarks.language_models import rows
from opq_jax.report import plots

OURS = 'opq_jax'
FLOAT16 = 'float16'
FORMER = 'no residual'  # of a setting: codes as they were chosen before, in tables alone
TITLES = {'smollm2': 'SmolLM2-135M', 'iglm': 'IgLM'}
SCOPES = {'bits of kernels': 'kernels alone', 'bits': 'the whole file'}
"""Column of the bits -> what is compared: rows with the table in float16, or as codecs leave it."""

Row = Mapping[str, Any]


class Point(NamedTuple):
  """A row on the front of the rivals."""

  bits: float
  divergence: float
  name: str


def read(network: str, folder: pathlib.Path = rows.FOLDER) -> dict[str, Any]:
  """Returns the results of a network: its rows, and how they were measured."""
  found: dict[str, Any] = json.loads((folder / f'{network}.json').read_text())
  return found


def in_scope(every: Iterable[Row], scope: str) -> list[Row]:
  """Returns the rows that a scope compares."""
  return [row for row in every if scope == 'bits' or row['embedding'] == FLOAT16]


def front(every: Iterable[Row], scope: str, *, text: bool) -> list[Point]:
  """Returns the rivals' rows on the lower convex hull of the logarithm of KL over bits, by bits.

  Args:
    every: all rows.
    scope: a key of `SCOPES`.
    text: whether rivals that have seen text count.
  """
  points = sorted(
    Point(row[scope], row['KL'], f'{row["codec"]}, {row["setting"]}')
    for row in in_scope(every, scope)
    if row['codec'] not in (OURS, 'float32') and (text or row['data'] == 'none')
  )
  found: list[Point] = []
  for point in points:
    if found and point.divergence >= found[-1].divergence:
      continue
    while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
      found.pop()
    found.append(point)
  return found


def _slope(first: Point, second: Point) -> float:
  """Returns the change of the logarithm of KL a bit."""
  return math.log(second.divergence / first.divergence) / (second.bits - first.bits)


def rival_at(points: list[Point], bits: float) -> Point | None:
  """Returns the front at some number of bits, with the name of the nearer row; None before it.

  >>> points = [Point(2, 1.0, 'a'), Point(4, 0.01, 'b')]
  >>> rival_at(points, 3.1).name, round(rival_at(points, 3).divergence, 6), rival_at(points, 1.9)
  ('b', 0.1, None)
  >>> rival_at(points, 5)
  Point(bits=4, divergence=0.01, name='b')
  """
  if not points or bits < points[0].bits:
    return None
  after = next((point for point in points if point.bits > bits), None)
  if after is None:
    return points[-1]
  before = points[points.index(after) - 1]
  share = (bits - before.bits) / (after.bits - before.bits)
  logarithm = (1 - share) * math.log(before.divergence) + share * math.log(after.divergence)
  return Point(bits, math.exp(logarithm), (before, after)[share > 0.5].name)


def beside_rivals(network: str) -> list[dict[str, object]]:
  """Returns a line for every row of ours: its KL, and that of the best rival of equal bits."""
  document = read(network)
  lines: list[dict[str, object]] = []
  for scope, title in SCOPES.items():
    own = [row for row in in_scope(document['rows'], scope) if row['codec'] == OURS]
    # a file of kernels alone, with a table of float16, is no offer where the whole file counts
    own = [row for row in own if scope != 'bits' or row['embedding'] != FLOAT16]
    for row in sorted(own, key=lambda row: (row['data'], row['setting'].split(',')[0], row[scope])):
      line: dict[str, object] = {
        'compared': title,
        'opq_jax': row['setting'],
        'data': row['data'],
        'bits': f'{row[scope]:.2f}',
        'KL': interval(row, 'KL'),
        'perplexity': f'{row["perplexity"]:.4g}',
      }
      for kind, text in (('without data', False), ('with text', True)):
        rival = rival_at(front(document['rows'], scope, text=text), row[scope])
        line[f'best rival {kind}, KL'] = f'{rival.divergence:.3g}' if rival else 'none as small'
        line[f'nearest row {kind}'] = rival.name if rival else ''
        line[f'ratio of KL {kind}'] = f'{row["KL"] / rival.divergence:.2f}' if rival else ''
      lines.append(line)
  return lines


def all_rows(network: str) -> list[dict[str, object]]:
  """Returns every row, by codec and bits."""
  order = lambda row: (row['codec'] != OURS, row['codec'], row['bits of kernels'], row['bits'])
  return [
    {
      'codec': row['codec'],
      'setting': row['setting'],
      'data': row['data'],
      'table': row['embedding'],
      'bits of kernels': f'{row["bits of kernels"]:.3f}',
      'bits of the file': f'{row["bits"]:.3f}',
      'KL': interval(row, 'KL'),
      'perplexity': interval(row, 'perplexity'),
      'same token, %': f'{100 * row["agreement"]:.1f}',
      'seconds': row['seconds'],
    }
    for row in sorted(read(network)['rows'], key=order)
  ]


def interval(row: Row, column: str) -> str:
  """Returns a value with the ends of its interval.

  >>> interval({'KL': 0.0123, 'KL low': 0.01, 'KL high': 0.0146}, 'KL')
  '0.0123 (0.01 to 0.0146)'
  """
  value, low, high = (f'{row[name]:.4g}' for name in (column, f'{column} low', f'{column} high'))
  return f'{value} ({low} to {high})'


def series(every: Iterable[Row], scope: str) -> dict[str, list[tuple[float, float]]]:
  """Returns the points (bits, KL) of a plot by the name of a line; of ours first."""
  found: dict[str, list[tuple[float, float]]] = {}
  chosen = [row for row in in_scope(every, scope) if row['codec'] != 'float32']
  chosen = [row for row in chosen if not row['setting'].endswith(FORMER)]
  if scope == 'bits':
    chosen = [row for row in chosen if row['codec'] != OURS or row['embedding'] != FLOAT16]
  for row in sorted(chosen, key=lambda row: (row['codec'] != OURS, row['codec'], row['data'])):
    words = row['setting'].split(', ')
    if row['codec'] == OURS:
      name = f'opq_jax, {words[0]}'
      name += f', {words[2]} from {row["data"]}' if row['data'] != 'none' else ''
    elif row['codec'] == 'llama.cpp':
      name = f'llama.cpp{", reshaped" * ("reshaped" in words)}'
      name += ', imatrix' * (row['data'] == 'text')
    else:
      name = row['codec']
    found.setdefault(name, []).append((row[scope], row['KL']))
  return found


def main() -> None:
  for network, title in TITLES.items():
    document = read(network)
    for scope, compared in SCOPES.items():
      path = rows.FOLDER / f'{network}_{"kernels" if "kernels" in scope else "file"}.png'
      points = series(document['rows'], scope)
      fronts = {name: lower_front(line) for name, line in points.items()}
      plots.divergence_over_bits(path, fronts, title=f'{title}, {compared}')


def lower_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
  """Returns the points that none with as few bits has less KL than.

  >>> lower_front([(3, 0.1), (2, 0.5), (4, 0.2), (2, 0.9)])
  [(2, 0.5), (3, 0.1)]
  """
  found: list[tuple[float, float]] = []
  for point in sorted(points):
    if not found or point[1] < found[-1][1]:
      found.append(point)
  return found


if __name__ == '__main__':
  main()
