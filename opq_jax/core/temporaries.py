"""Temporary files and folders of this process, which whoever ends it at once can remove first."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

_lock = threading.Lock()
_paths: set[Path] = set()


@contextlib.contextmanager
def registered(path: str | os.PathLike[str]) -> Iterator[None]:
  """Registers a path, which need not exist yet, for the time of the context."""
  path = Path(path)
  with _lock:
    _paths.add(path)
  try:
    yield
  finally:
    with _lock:
      _paths.discard(path)


def remove_all() -> None:
  """Removes all registered paths; whoever registers another one from now on waits for ever.

  For a process that ends right after this: no other thread can leave anything behind.
  """
  # not released
  _lock.acquire()
  for path in _paths:
    with contextlib.suppress(OSError):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
