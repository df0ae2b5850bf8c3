"""Keeps compiled programs between test runs: compiling is most of the time of a test.

JAX's writes to a cache are not atomic, so the processes of two tests may not share a folder.
Every worker has one of its own, filled by hard links from the kept one.  After every test module
new programs are linked back and the other workers' are fetched; links are atomic.

Processes that tests start share their worker's folder: one writes while the test waits for it, and
of several that work together JAX lets the first write alone.  A process that a test kills only
reads (`READ_ONLY`), for a kill in the middle of a write would leave half a program.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time

import jax

LIMIT = 1 << 30  # bytes of kept programs; one run of all tests compiles about a tenth
DAY = 86_400  # seconds after which a folder that is left was of a worker that died
READ_ONLY = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1000000'}
SUFFIX = '-cache'  # of JAX's file of a program, whose name is a hash of all that it depends on


class KeptPrograms:
  """The folder of a worker, between `start` and `finish`."""

  def __init__(self, kept: pathlib.Path):
    self.kept = kept
    kept.mkdir(parents=True, exist_ok=True)
    remove_old(kept)
    # inside the kept folder, for hard links do not cross file systems
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='run_', dir=kept))
    self.exchange()

  def start(self) -> None:
    """Makes JAX use the folder, here and in processes that are started."""
    options = {
      'jax_compilation_cache_dir': str(self.folder),
      'jax_persistent_cache_min_compile_time_secs': 0,
      # XLA's own caches would put the folder into the names, and it differs from run to run
      'jax_persistent_cache_enable_xla_caches': 'none',
    }
    for option, value in options.items():
      jax.config.update(option, value)
      os.environ[option.upper()] = str(value)

  def exchange(self) -> None:
    """Links new programs into the kept folder, and the kept ones that are new into this one."""
    kept, ours = names(self.kept), names(self.folder)
    for new, source, target in (
      (ours - kept, self.folder, self.kept),
      (kept - ours, self.kept, self.folder),
    ):
      for name in new:
        # another worker may have linked it a moment ago, or removed it
        with contextlib.suppress(FileExistsError, FileNotFoundError):
          os.link(source / name, target / name)

  def finish(self) -> None:
    """Keeps what is new and removes the folder."""
    self.exchange()
    shutil.rmtree(self.folder, ignore_errors=True)


def names(folder: pathlib.Path) -> set[str]:
  """Returns the programs in a folder."""
  return {entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}


def remove_old(kept: pathlib.Path) -> None:
  """Removes folders of workers that died, and the programs unused for longest above `LIMIT`."""
  for folder in kept.glob('run_*'):
    with contextlib.suppress(FileNotFoundError):
      if folder.stat().st_mtime < time.time() - DAY:
        shutil.rmtree(folder, ignore_errors=True)
  # of all versions of JAX
  programs = []
  for path in kept.parent.glob(f'*/*{SUFFIX}'):
    with contextlib.suppress(FileNotFoundError):
      status = path.stat()
      programs.append((max(status.st_atime, status.st_mtime), status.st_size, path))
  size = 0
  for _, bytes_of_one, path in sorted(programs, reverse=True):
    size += bytes_of_one
    if size > LIMIT:
      path.unlink(missing_ok=True)


def maps_of_memory() -> int:
  """Returns how many maps of memory this process has, 0 where the system does not say."""
  try:
    with open('/proc/self/maps', 'rb') as file:
      return file.read().count(b'\n')
  except OSError:
    return 0
