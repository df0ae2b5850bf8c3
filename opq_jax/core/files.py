"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
  import fcntl
except ImportError:  # Windows, where what a killed process left is left
  fcntl = None  # type: ignore[assignment]

_YOUNG = 60.0  # seconds in which a file may be somebody's who has not locked it yet


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes beside the place and moves there; a file that was there before stays until then.

  Raises:
    OSError: as `replacing`.
  """
  with replacing(path) as file:
    file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file to write piece by piece, which takes its place when the context ends without an error.

  A process that is killed leaves the old file or the new one, whole, and perhaps a hidden
  `.opq-…` beside it, which the next write to the same place removes.

  Raises:
    OSError: the folder is missing or read-only, or the disk is full.  The message names `path`,
      and nothing is left behind.
  """
  path = Path(path)
  # of one length, however long the name is
  prefix = f'.opq-{zlib.crc32(os.fsencode(path.name)):08x}-'
  temporary = path.parent / f'{prefix}{secrets.token_hex(8)}'
  try:
    _remove_litter(path.parent, prefix)
    with errors_of(path, temporary), open(temporary, 'xb') as file:
      _is_locked(file)
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.replace(temporary, path)
  finally:
    # on a full or read-only disk even this may fail, and the first error is the one to know of
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_of(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
  """Errors that name no file, or the temporary one, as those of the file that it is to become.

  One that names another file is not of this one: of what was read meanwhile, say.
  """
  try:
    yield
  except OSError as error:
    ours = None, temporary and os.fspath(temporary)
    if error.errno is None or error.filename not in ours:
      raise
    raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def spool(path: str | os.PathLike[str]) -> BinaryIO:
  """A file on the disk of `path` that has no name, so that nothing stays behind of it ever.

  Raises:
    OSError: the folder is missing or read-only; the message names `path`.
  """
  try:
    return tempfile.TemporaryFile(dir=Path(path).parent)
  except OSError as error:
    # it names a file that nobody has heard of
    raise OSError(error.errno, os.strerror(error.errno or 0), os.fspath(path)) from error


def close(file: BinaryIO) -> None:
  """Closes a file that nobody needs any more: what it could not write is of no interest."""
  with contextlib.suppress(OSError):
    file.close()


def _remove_litter(folder: Path, prefix: str) -> None:
  """What killed processes left: old files that nobody holds locked."""
  for left in folder.glob(f'{prefix}*') if fcntl is not None else ():
    try:
      with open(left, 'rb') as file:
        if time.time() - left.stat().st_mtime > _YOUNG and _is_locked(file):
          left.unlink()
    except OSError:
      continue  # somebody else's, or gone


def _is_locked(file: BinaryIO) -> bool:
  """Whether the file is locked for this process from now on; the lock ends with the process."""
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:  # another's, or a file system without locks
    return False
  return True
