"""Writes the tables of results into the documentation: docs/results/*.md, and wherever one stands.

    python -m experiments.make_results            # writes the pages whose tables have changed
    python -m experiments.make_results --check    # names them instead, and fails if there are any

A page is README.md or any Markdown file under docs/.  A table stands between the two lines

    <!-- NAME -->
    <!-- end of NAME -->

where NAME is that of a file of experiments/results/benchmarks, or of another table of
`experiments.result_tables`.  Everything else on a page is left alone.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping

from experiments.result_tables import TABLES

ROOT = pathlib.Path(__file__).parents[1]
_MARKED = re.compile(r'<!-- (\w+) -->\n.*?<!-- end of \1 -->', re.DOTALL)


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
  """README.md and the Markdown files of docs/, built pages excluded."""
  paths = [root / 'README.md', *sorted((root / 'docs').rglob('*.md'))]
  return [path for path in paths if '_build' not in path.parts]


def fill(
  paths: Iterable[pathlib.Path], tables: Mapping[str, Callable[[], str]] = TABLES
) -> dict[pathlib.Path, str]:
  """Returns the new text of every page whose tables differ from those of now.

  Raises:
    ValueError: a page marks a place for a table that does not exist, or a table has no place.
  """
  changed, placed = {}, set()
  for path in paths:

    def table(match: re.Match[str], path: pathlib.Path = path) -> str:
      name = match[1]
      if name not in tables:
        raise ValueError(f'{path}: found <!-- {name} -->, expected one of {sorted(tables)}')
      placed.add(name)
      return f'<!-- {name} -->\n{tables[name]()}\n<!-- end of {name} -->'

    text = path.read_text()
    new = _MARKED.sub(table, text)
    if new != text:
      changed[path] = new
  missing = sorted(set(tables) - placed)
  if missing:
    raise ValueError(f'pages: found no place for {missing}, expected <!-- NAME --> for each')
  return changed


def main(arguments: list[str]) -> None:
  changed = fill(pages())
  if '--check' in arguments and changed:
    names = ', '.join(str(path.relative_to(ROOT)) for path in changed)
    sys.exit(f'found other tables in {names}, expected those of python -m experiments.make_results')
  for path, text in changed.items():
    path.write_text(text)


if __name__ == '__main__':
  main(sys.argv[1:])
