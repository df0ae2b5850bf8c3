"""Rows of results on disk: a run that was stopped goes on where it was."""

import fcntl
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.language_models.measure import Judge
from experiments.benchmarks.language_models.networks import Network

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
    self._path, self._header = path, dict(header)
    self._document()

  def has(self, **key: str) -> bool:
    """Returns whether there is a row of a key."""
    return any(all(row[name] == key[name] for name in KEY) for row in self._document()['rows'])

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes a row after those of now; the file is replaced as a whole."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(self._path.parent, os.O_RDONLY)
    try:
      fcntl.flock(folder, fcntl.LOCK_EX)  # a second process may add rows
      document = self._document()
      document['rows'].append(dict(row))
      part = self._path.with_suffix('.part')
      part.write_text(json.dumps(document, indent=1) + '\n')
      os.replace(part, self._path)
    finally:
      os.close(folder)

  def _document(self) -> dict[str, Any]:
    if not self._path.exists():
      return {**self._header, 'rows': []}
    document: dict[str, Any] = json.loads(self._path.read_text())
    found = {name: value for name, value in document.items() if name != 'rows'}
    if found != self._header:
      raise ValueError(f'{self._path}: found {found}, expected {self._header}')
    return document


def of_network(network: Network, judge: Judge) -> Rows:
  """Opens the results of a network; the row of its float weights is the first."""
  command = 'python -m experiments.benchmarks.language_models.run'
  header: dict[str, Any] = {
    'command': f'{command} {network.name} FOLDER --text TEXT --llama_cpp LIBRARIES',
    'windows': len(network.measured),
    'tokens of a window': network.measured.shape[1],
    'windows of calibration': len(network.calibration),
  }
  found = Rows(FOLDER / f'{network.name}.json', header)
  key = dict(zip(KEY, ('float32', '', 'none', 'float32'), strict=True))
  if not found.has(**key):
    sizes = {'bits of kernels': 32.0, 'bits': 32.0}
    found.append(key | sizes | judge.scores(network.params).row() | {'seconds': 0, 'note': ''})
  return found
