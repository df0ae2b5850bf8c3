"""Rows of results on disk: a run that was stopped goes on where it was."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import harness

FOLDER = harness.RESULTS.parent / 'language_models'
KEY = 'codec', 'setting', 'data', 'embedding'
"""What a row is of: a codec with its options, the data that it has seen, and how the table of
embeddings is stored."""


class Rows:
  """The rows of one network, written after each.

  Args:
    path: of the JSON file.
    header: columns of the file beside its rows; where the file exists, they must be the same.

  Raises:
    ValueError: the file has another header, so its rows are of other measurements.
  """

  def __init__(self, path: pathlib.Path, header: Mapping[str, Any]):
    self._path = path
    self.document: dict[str, Any] = {**header, 'rows': []}
    if path.exists():
      self.document = json.loads(path.read_text())
      found = {name: value for name, value in self.document.items() if name != 'rows'}
      if found != dict(header):
        raise ValueError(f'{path}: found {found}, expected {dict(header)}')

  def has(self, **key: str) -> bool:
    """Returns whether there is a row of a key."""
    return any(all(row[name] == key[name] for name in KEY) for row in self.document['rows'])

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes a row; the file is replaced as a whole."""
    self.document['rows'].append(dict(row))
    self._path.parent.mkdir(parents=True, exist_ok=True)
    part = self._path.with_suffix('.part')
    part.write_text(json.dumps(self.document, indent=1) + '\n')
    os.replace(part, self._path)
