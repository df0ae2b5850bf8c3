"""The work of a long run, kept beside its output: a run that is killed goes on where it was."""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opq_jax.core import files

_PLAN, _STREAMS = 'plan.json', 'streams.npz'


@dataclasses.dataclass(frozen=True)
class WorkFolder:
  """A folder of blocks that are done.  Every file of it is whole.

  Attributes:
    path: the folder.
    done: how many blocks were done when it was opened.
  """

  path: Path
  done: int

  def save_block(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the codes of a block."""
    _save(self._block(number), arrays)

  def names(self, number: int) -> list[str]:
    """Returns the names of the arrays of a block."""
    with np.load(self._block(number), allow_pickle=False) as found:
      return found.files

  def load(self, number: int, name: str) -> np.ndarray:
    """Reads one array of a block."""
    with np.load(self._block(number), allow_pickle=False) as found:
      return found[name]

  @property
  def has_streams(self) -> bool:
    """Whether what the next block reads has been written."""
    return (self.path / _STREAMS).is_file()

  def save_streams(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what the next block reads; from then on, so many blocks are done."""
    _save(self.path / _STREAMS, {**arrays, 'done': np.asarray(done)})

  def load_streams(self) -> dict[str, np.ndarray]:
    """Reads what the next block reads."""
    return _load(self.path / _STREAMS)

  def remove(self) -> None:
    """Deletes the folder."""
    shutil.rmtree(self.path)

  def _block(self, number: int) -> Path:
    return self.path / f'block_{number:05d}.npz'


def open_work(output: str | os.PathLike[str], plan: Mapping[str, Any]) -> WorkFolder:
  """Opens the folder `OUTPUT.blocks`, with the blocks of an earlier run of the same plan.

  Args:
    output: the file that the run makes.
    plan: all that the codes depend on, as JSON.  Work of another plan is deleted.

  Raises:
    ValueError: a folder of this name holds other files.
    OSError: the folder cannot be written.
  """
  output = Path(output)
  path, text = output.with_name(f'{output.name}.blocks'), json.dumps(plan, sort_keys=True)
  if (path / _PLAN).is_file() and (path / _PLAN).read_text() == text:
    streams = path / _STREAMS
    return WorkFolder(path, int(_load(streams)['done']) if streams.is_file() else 0)
  if (path / _PLAN).is_file() and not path.is_symlink():
    shutil.rmtree(path)
  # somebody else's files are not to be deleted at the end
  files.check_free(path)
  path.mkdir(exist_ok=True)
  files.write_bytes(path / _PLAN, text.encode())
  return WorkFolder(path, 0)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  with files.replacing(path) as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
    return dict(found)


def identity(paths: Iterable[str | os.PathLike[str]]) -> list[list[Any]]:
  """Returns files or folders with their sizes and times of change, for the plan of a run."""
  found = [(path, os.stat(path)) for path in sorted({os.fspath(path) for path in paths})]
  return [[path, status.st_size, status.st_mtime_ns] for path, status in found]
