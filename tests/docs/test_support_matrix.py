"""Every cell of the support matrix does what README.md and the guide of frameworks show."""

import json

import pytest

from experiments import result_tables
from tests.helpers import frameworks, support_cells

# runs where there are eight devices: tests/allocation/test_sharding.py
COLUMNS = [column for column in support_cells.CELLS if column != 'mesh of 8']
SAID: set[tuple[str, str]] = set()
"""Cells in which a user is told that leaves are coded in another way."""


@pytest.mark.slow
@pytest.mark.parametrize('column', COLUMNS)
@pytest.mark.parametrize('name', frameworks.NETWORKS)
def test_support_cell(name, column):
  for package in ('haiku', 'equinox'):  # of the extra `test`
    if name.lower().startswith(package):
      pytest.importorskip(package)
  _, notes = support_cells.cell(name, column)
  assert bool(notes) == ((name, column) in SAID), notes


def test_support_matrix_is_recorded():
  """The table was made of the cells that are tested."""
  path = result_tables.RESULTS / 'benchmarks' / 'support_matrix.json'
  rows = json.loads(path.read_text())['rows']
  assert [row['network'] for row in rows] == list(frameworks.NETWORKS)
  for row in rows:
    assert list(row) == ['network', *support_cells.CELLS] and all(row.values())
