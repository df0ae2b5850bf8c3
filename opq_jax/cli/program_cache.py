"""Keeps compiled programs from one run of the command to the next.

XLA compiles for seconds before a small file is compressed.  JAX can keep programs in a folder, but
it writes them in place: a process that is killed leaves a part of a program under its final name,
and another process may read such a part.  So no two processes share a folder here:

    <cache>/<versions>/<name>-cache              kept programs
    <cache>/<versions>/run_<random>/             one process: hard links to all of these, and its
                                                 new programs
    <cache>/<versions>/run_<random>/lock         locked while the process lives

A process that ends without an exception links its new programs into the kept ones, which is atomic,
after it has checked that they are whole.  What a killed process left is removed by the next one.

Programs depend on the versions of JAX and on the processor, hence the folder's name.  They are
code: a folder that others can write to lets them run code as you.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from opq_jax.core import temporaries

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None  # type: ignore[assignment]

VARIABLE = 'OPQ_JAX_CACHE'
"""Environment variable: 0 for no cache, or its folder."""

MAX_BYTES = 256 << 20
"""Size of all kept programs; a program takes about 20 KB, the oldest are removed first."""

_SUFFIX = '-cache'  # JAX's, of a program
_YOUNG = 60.0  # seconds in which a process may not have locked its new folder yet
_ABANDONED = 86_400.0  # seconds after which a folder is abandoned where files cannot be locked


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
  """Lets JAX find its programs on disk, and keep new ones, in this context.

  Does nothing where `OPQ_JAX_CACHE` is 0, where JAX's own variables choose a cache, and where the
  folder cannot be written to or has no hard links.
  """
  place = folder()
  chosen = 'JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE'
  if place is None or any(name in os.environ for name in chosen):
    yield
    return
  with contextlib.ExitStack() as stack:
    try:
      run = stack.enter_context(_run_folder(place))
    except OSError:
      yield
      return
    _configure(
      {
        'jax_compilation_cache_dir': str(run),
        'jax_persistent_cache_min_compile_time_secs': 0,
        # XLA's own caches make the folder, which is another one in every run, a part of every key
        'jax_persistent_cache_enable_xla_caches': 'none',
      }
    )
    yield
    with contextlib.suppress(OSError):
      _keep(run, place)
      _limit(place.parent)


def _configure(options: Mapping[str, str | int]) -> None:
  """Sets options of JAX; where it is not imported yet, for the time when it is."""
  if 'jax' not in sys.modules:
    os.environ.update({name.upper(): str(value) for name, value in options.items()})
    return
  import jax

  for name, value in options.items():
    jax.config.update(name, value)


def folder() -> Path | None:
  """Returns the folder of this machine's programs, None where none are kept."""
  chosen = os.environ.get(VARIABLE)
  if chosen == '0':
    return None
  if chosen:
    root = Path(chosen).expanduser()
  else:
    try:
      root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'opq_jax'
    except RuntimeError:  # no home
      return None
  try:
    versions = '-'.join(importlib.metadata.version(name) for name in ('jax', 'jaxlib'))
  except importlib.metadata.PackageNotFoundError:  # a reader alone
    return None
  return root / f'{versions}-{_processor()}'


def _processor() -> str:
  """Returns a digest of the processor's name and features, on which compiled code depends."""
  text = f'{platform.system()} {platform.machine()}'
  with contextlib.suppress(OSError):
    lines = Path('/proc/cpuinfo').read_text().partition('\n\n')[0].splitlines()
    features = 'model name', 'flags', 'Features', 'CPU part'
    text += ''.join(line for line in lines if line.startswith(features))
  return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextlib.contextmanager
def _run_folder(place: Path) -> Iterator[Path]:
  """Gives a folder of this process with links to all kept programs."""
  place.mkdir(mode=0o700, parents=True, exist_ok=True)
  _remove_abandoned(place)
  run = Path(tempfile.mkdtemp(prefix='run_', dir=place))
  with temporaries.registered(run):
    try:
      with open(run / 'lock', 'xb') as lock:
        if fcntl is not None:
          with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for program in place.glob(f'*{_SUFFIX}'):
          # another process may just have removed it
          with contextlib.suppress(FileNotFoundError):
            if _is_whole(program.read_bytes()):
              os.link(program, run / program.name)
            else:  # JAX would compile it in every run, and never replace the file
              program.unlink()
        yield run
    finally:
      shutil.rmtree(run, ignore_errors=True)


def _keep(run: Path, place: Path) -> None:
  """Links the new programs of a process, if they are whole, into the kept ones."""
  for program in run.glob(f'*{_SUFFIX}'):
    if (place / program.name).exists() or not _is_whole(program.read_bytes()):
      continue
    with open(program, 'rb') as file:
      os.fsync(file.fileno())  # or a machine that loses power may keep the name without the bytes
    with contextlib.suppress(FileExistsError):
      os.link(program, place / program.name)


def _is_whole(data: bytes) -> bool:
  """Returns whether a program is not cut off, as on a full disk.

  JAX packs it with zlib or zstandard.
  """
  try:
    if data[:4] == b'\x28\xb5\x2f\xfd':
      import zstandard

      return bool(zstandard.ZstdDecompressor().decompress(data))
    packed = zlib.decompressobj()
    packed.decompress(data)
    return packed.eof
  except Exception:  # zstandard may be missing, and has errors of its own
    return False


def _limit(root: Path) -> None:
  """Removes the oldest programs, of all versions, beyond `MAX_BYTES`."""
  programs = [(path.stat(), path) for path in root.glob(f'*/*{_SUFFIX}')]
  programs.sort(key=lambda program: program[0].st_mtime, reverse=True)
  total = 0
  for file, path in programs:
    total += file.st_size
    if total > MAX_BYTES:
      path.unlink(missing_ok=True)


def _remove_abandoned(place: Path) -> None:
  """Removes folders of processes that were killed: old ones that no process holds locked."""
  for run in place.glob('run_*'):
    with contextlib.suppress(OSError):
      age = time.time() - run.stat().st_mtime
      if age > _YOUNG and _is_abandoned(run, age):
        shutil.rmtree(run, ignore_errors=True)


def _is_abandoned(run: Path, age: float) -> bool:
  if fcntl is None:
    return age > _ABANDONED
  try:
    with open(run / 'lock', 'rb') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except FileNotFoundError:  # killed before it made its lock
    return True
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    return age > _ABANDONED
  return True
