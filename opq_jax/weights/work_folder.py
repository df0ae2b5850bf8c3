"""The work of a long run, kept beside its output: a run that is killed goes on where it was."""

import contextlib
import dataclasses
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opq_jax.core import files, messages

_END = '.blocks'
_PLAN, _STREAMS = 'plan.json', 'streams.npz'
_OWN = re.compile(r'plan\.json|streams\.npz|block_\d{5,}\.npz|\.opq-[0-9a-f-]+')
"""Names of the files of such a folder, temporary ones too: nothing else in it is deleted."""
_DAMAGE = ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error
"""What reading a damaged file raises."""


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
    path = self._block(number)
    try:
      with np.load(path, allow_pickle=False) as found:
        return found[name]
    except _DAMAGE as error:
      raise ValueError(
        f'{path}: expected codes of an earlier run, found this: {error}; delete {self.path} to '
        'begin anew'
      ) from error

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

  def clear(self) -> None:
    """Deletes all files of the folder but those that somebody else has put into it."""
    for child in self.path.iterdir():
      if _OWN.fullmatch(child.name):
        child.unlink()

  def remove(self) -> None:
    """Deletes the folder, but for files that somebody else has put into it."""
    self.clear()
    if not any(self.path.iterdir()) and not self.path.is_symlink():
      self.path.rmdir()

  def _block(self, number: int) -> Path:
    return self.path / f'block_{number:05d}.npz'


class Work:
  """The work of one run: no other run opens the folder before the context ends.

  An OSError, such as of a full disk, that ends the context says where the work is kept.

  Args:
    output: the file that the run makes; the folder is `OUTPUT.blocks`.
  """

  def __init__(self, output: str | os.PathLike[str]):
    self._path = Path(output).with_name(f'{Path(output).name}{_END}')
    self._lock: contextlib.ExitStack | None = None

  def open(self, plan: Mapping[str, Any]) -> WorkFolder:
    """Opens the folder, with the blocks of an earlier run of the same plan.

    Args:
      plan: all that the codes depend on, as JSON.  Work of another plan is deleted, and so is
        damaged work, with a warning.

    Raises:
      ValueError: another run has opened the folder, or it holds other files.
      OSError: the folder cannot be written.
    """
    if self._lock is None:
      self._lock = _locked(self._path)
    return _opened(self._path, plan)

  def close(self) -> None:
    """Lets other runs open the folder."""
    if self._lock is not None:
      self._lock.close()
      self._lock = None

  def __enter__(self) -> 'Work':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    if isinstance(error, OSError) and self._lock is not None and (self._path / _PLAN).is_file():
      error.add_note(
        f'what is done is kept in {self._path}: the same run goes on from there, unless it '
        'searches for a file_rate'
      )
    self.close()


def _locked(path: Path) -> contextlib.ExitStack:
  """Makes and locks a folder; returns what unlocks it."""
  if not path.is_dir():
    files.check_free(path)
  lock = contextlib.ExitStack()
  try:
    lock.enter_context(files.locked_folder(path))
  except BlockingIOError as error:
    raise ValueError(
      f'{path}: found the work of a run that has not ended, expected one run at a time: choose '
      'another output, or wait for that run'
    ) from error
  return lock


def _opened(path: Path, plan: Mapping[str, Any]) -> WorkFolder:
  """Returns the folder, which this run has locked, with the work of this plan or with none."""
  text = json.dumps(plan, sort_keys=True)
  plan_file = path / _PLAN
  if plan_file.is_file() and plan_file.read_bytes() == text.encode():
    streams = path / _STREAMS
    try:
      return WorkFolder(path, int(_load(streams)['done']) if streams.is_file() else 0)
    except _DAMAGE as error:
      messages.warn(f'{streams}: found it damaged ({error}): the work begins anew')
  if is_work_folder(path) and not path.is_symlink():
    WorkFolder(path, 0).clear()
  # somebody else's files are not to be deleted at the end
  files.check_free(path)
  files.write_bytes(plan_file, text.encode())
  return WorkFolder(path, 0)


def is_work_folder(path: Path) -> bool:
  """Returns whether a path is a folder of the work of a run, and of nothing else."""
  is_work = path.name.endswith(_END) and (path / _PLAN).is_file()
  return is_work and all(_OWN.fullmatch(child.name) for child in path.iterdir())


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
