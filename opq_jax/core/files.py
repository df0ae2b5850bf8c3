"""Files and folders that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from opq_jax.core import temporaries

try:
  import fcntl
except ImportError:  # Windows: temporary files of killed processes are never removed there
  fcntl = None  # type: ignore[assignment]

_YOUNG = 60.0  # seconds; a younger file may belong to a process that has not locked it yet


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file by way of a temporary one, so that `path` is never half written.

  Raises:
    OSError: as `replacing`.

  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write_bytes(f'{folder}/name', b'data')
  ...   Path(folder, 'name').read_bytes()
  b'data'
  """
  with replacing(path) as file:
    file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Yields a file to write, which replaces `path` when the context ends without an error.

  A process that is killed leaves the old file or the new one, whole, and perhaps a hidden
  `.opq-…` beside it, which the next write to the same path removes.  Of a symbolic link, the file
  that it points at is replaced; a file that is replaced keeps its mode and, where this process may
  give it away, its owner.

  Raises:
    ValueError: `path` is a device, a FIFO or a socket.
    OSError: the folder is missing or read-only, or the disk is full.  The message names `path`,
      and no temporary file stays behind.
  """
  place = file_place(path)
  prefix = _prefix(place)
  temporary = place.parent / f'{prefix}{secrets.token_hex(8)}'
  with temporaries.registered(temporary):
    try:
      _remove_litter(place.parent, prefix)
      with errors_of(path, temporary), _new_file(temporary) as file:
        _lock(file)
        yield file
        file.flush()
        _take_over(file.fileno(), place)
        os.fsync(file.fileno())
        with temporaries.undisturbed():
          os.replace(temporary, place)
    finally:
      # on a full or read-only disk the removal may fail too; the first error is the one to report
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> BinaryIO:
  with temporaries.undisturbed():
    return open(path, 'xb')


def file_place(path: str | os.PathLike[str]) -> Path:
  """Returns where a file of this name is written: of a symbolic link, what it points at.

  Raises:
    ValueError: a device, a FIFO or a socket is there, which no file may replace.
  """
  place = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
  try:
    mode = os.stat(place).st_mode
  except OSError:  # nothing is there, or the write will say what is wrong
    return place
  for is_kind, kind in _NO_FILES.items():
    if is_kind(mode):
      raise ValueError(f'{path}: found a {kind}, expected the name of a file')
  return place


def check_readable(path: str | os.PathLike[str]) -> None:
  """Raises ValueError where a device, a FIFO or a socket is: weights are read more than once."""
  with contextlib.suppress(OSError):  # the read will say what is wrong
    mode = os.stat(path).st_mode
    for is_kind, kind in _NO_FILES.items():
      if is_kind(mode):
        raise ValueError(f'{path}: found a {kind}, expected a file or a folder')


_NO_FILES = {
  stat.S_ISCHR: 'device',
  stat.S_ISBLK: 'device',
  stat.S_ISFIFO: 'FIFO',
  stat.S_ISSOCK: 'socket',
}


def _take_over(file: int, old: Path) -> None:
  """Gives a file the mode and, as far as allowed, the owner of the one that it replaces."""
  try:
    found = os.stat(old)
  except OSError:  # none: the mode that every new file has
    return
  if hasattr(os, 'fchown'):  # not on Windows
    with contextlib.suppress(OSError):  # only root gives files away
      os.fchown(file, found.st_uid, found.st_gid)
    # after the owner, whose change clears bits
    os.fchmod(file, stat.S_IMODE(found.st_mode))


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields a folder to fill, which becomes `path` when the context ends without an error.

  A process that is killed leaves `path` as it was, and perhaps a hidden `.opq-…` beside it, which
  the next such call for the same path removes.

  Raises:
    ValueError: `path` is a file, or a folder that holds anything.
    OSError: the folder above is missing or read-only, or the disk is full.

  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with new_folder(f'{folder}/model') as new:
  ...     write_bytes(new / 'config.json', b'{}')
  ...   os.listdir(f'{folder}/model')
  ['config.json']
  """
  path = Path(path)
  check_free(path)
  prefix = _prefix(path)
  temporary = path.parent / f'{prefix}{secrets.token_hex(8)}'
  with contextlib.ExitStack() as stack:
    stack.enter_context(temporaries.registered(temporary))
    _remove_litter(path.parent, prefix)
    with errors_of(path, temporary):
      with temporaries.undisturbed():
        temporary.mkdir()
      stack.callback(shutil.rmtree, temporary, ignore_errors=True)
      stack.callback(os.close, lock := os.open(temporary, os.O_RDONLY))
      _lock(lock)
      yield temporary
      with temporaries.undisturbed():
        if path.is_dir():
          path.rmdir()
        os.rename(temporary, path)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
  """Makes a folder where there is none, and holds it locked for the time of the context.

  The system unlocks it when the process ends in any way.  Systems and file systems without locks
  let everybody in.

  Raises:
    BlockingIOError: it is locked already, by this process or another one.
    OSError: it cannot be made or opened.
  """
  with contextlib.ExitStack() as stack:
    while True:
      path.mkdir(exist_ok=True)
      if fcntl is None:  # Windows opens no folders
        break
      # not found: the process that held it has removed it
      with contextlib.suppress(FileNotFoundError):
        stack.callback(os.close, opened := os.open(path, os.O_RDONLY))
        _lock_if_free(opened)
        if os.path.samestat(os.fstat(opened), os.stat(path)):
          break
      stack.close()
    yield


def check_free(path: str | os.PathLike[str]) -> None:
  """Checks that nothing is in the place of a new folder, or an empty folder.

  Raises:
    ValueError: there is a file, or a folder that holds anything.
  """
  path = Path(path)
  if path.is_dir():
    if held := sorted(child.name for child in path.iterdir()):
      raise ValueError(
        f'{path}: found a folder that holds {held[:5]}, expected an empty one or none'
      )
  elif path.exists() or path.is_symlink():
    raise ValueError(f'{path}: found a file, expected an empty folder or none')


@contextlib.contextmanager
def errors_of(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
  """Makes errors that name no file, or the temporary one, name `path`.

  Errors that name another file (one that is read meanwhile, say) pass through.

  >>> try:
  ...   with errors_of('net.opq'):
  ...     raise OSError(28, 'No space left on device')
  ... except OSError as error:
  ...   print(error.filename)
  net.opq
  """
  try:
    yield
  except OSError as error:
    ours = None, temporary and os.fspath(temporary)
    if error.errno is None or error.filename not in ours:
      raise
    raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def spool(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a file without a name on the disk of `path`, so that nothing of it can stay behind.

  Raises:
    OSError: the folder is missing or read-only; the message names `path`.
  """
  try:
    return tempfile.TemporaryFile(dir=Path(path).parent)
  except OSError as error:
    # the original error names a file that the caller has never heard of
    raise OSError(error.errno, os.strerror(error.errno or 0), os.fspath(path)) from error


def close(file: BinaryIO) -> None:
  """Closes a file whose contents are no longer needed; errors of the last write are ignored."""
  with contextlib.suppress(OSError):
    file.close()


def _prefix(path: Path) -> str:
  """Returns how the names of temporary files and folders for a path begin."""
  # a checksum instead of the name: of fixed length, so that long names stay within the limit
  return f'.opq-{zlib.crc32(os.fsencode(path.name)):08x}-'


def _remove_litter(folder: Path, prefix: str) -> None:
  """Removes what killed processes left: old files and folders that no process holds locked."""
  for left in folder.glob(f'{prefix}*') if fcntl is not None else ():
    try:
      opened = os.open(left, os.O_RDONLY)
      try:
        if time.time() - left.stat().st_mtime > _YOUNG and _lock(opened):
          shutil.rmtree(left) if left.is_dir() else left.unlink()
      finally:
        os.close(opened)
    except OSError:
      continue  # another user's file, or already removed


def _lock(file: BinaryIO | int) -> bool:
  """Locks a file or a folder until this process ends, and returns whether that succeeded."""
  with contextlib.suppress(BlockingIOError):
    return _lock_if_free(file)
  return False


def _lock_if_free(file: BinaryIO | int) -> bool:
  """Locks a file or a folder until it is closed; returns False on systems without locks.

  Raises:
    BlockingIOError: it is locked already.
  """
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError:  # a file system without locks
    return False
  return True
