"""Writes the result tables of README.md from experiments/results.

    python -m experiments.make_readme

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; everything else is left alone.
"""

import csv
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'experiments' / 'results'


def markdown(rows: list[dict[str, object]]) -> str:
  """A table of rows, columns in the order in which they first appear."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  lines += [
    '| ' + ' | '.join(str(row.get(column, '')).replace('|', '\\|') for column in columns) + ' |'
    for row in rows
  ]
  return '\n'.join(lines)


def benchmark(name: str) -> str:
  """The rows of one benchmark, under the command that made them."""
  document = json.loads((RESULTS / 'benchmarks' / f'{name}.json').read_text())
  return f'`{document["command"]}`\n\n{markdown(document["rows"])}'


def one_shot(name: str) -> str:
  """Top-1 of the default objective over file sizes, with and without the correction."""
  with open(RESULTS / name / 'results.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  return markdown(select(rows))


def select(rows: list[dict[str, str]]) -> list[dict[str, object]]:
  """One line per number of bits of what `experiments/one_shot.py` wrote."""
  raise NotImplementedError


TABLES = {
  'speed': lambda: benchmark('speed'),
  'payload': lambda: benchmark('payload'),
  'cell_rule': lambda: benchmark('cell_rule'),
  'one_shot_mobilenet_v1': lambda: one_shot('one_shot_mobilenet_v1'),
}


def main() -> None:
  path = ROOT / 'README.md'
  text = path.read_text()
  for name, table in TABLES.items():
    pattern = rf'<!-- {name} -->.*?<!-- end of {name} -->'
    if not re.search(pattern, text, re.DOTALL):
      raise ValueError(f'README.md: found no place for {name}, expected <!-- {name} -->')
    new = f'<!-- {name} -->\n{table()}\n<!-- end of {name} -->'
    text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
  path.write_text(text)


if __name__ == '__main__':
  main()
