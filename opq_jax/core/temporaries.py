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


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
  """Makes `remove_all` wait for the time of the context; where it has begun, waits for ever.

  For the moments in which a path is made, and moved to its place: half of a folder would be moved
  there while the other half is removed.
  """
  with _lock:
    yield


def remove_all() -> None:
  """Removes all registered paths; whoever registers, makes or moves one from now on waits for ever.

  For a process that ends right after this: no other thread can leave anything behind.
  """
  # not released
  _lock.acquire()
  for path in _paths:
    with contextlib.suppress(OSError):
      if path.is_dir():
        # under another name first: the thread that fills the folder finds it no more
        removed = path.with_name(f'{path.name}-')
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
