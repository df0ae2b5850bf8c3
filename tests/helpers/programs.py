"""Keeps compiled programs between test runs: compiling is most of the time of a test.

Every worker has a folder of its own, as every run of the command has (cli/program_cache.py).
After each test module its new programs are linked into the kept ones, and those of the other
workers are fetched.

Processes that tests start share their worker's folder: one writes while its test waits for it, and
of several that train together JAX lets the first one write alone.  A process that a test kills only
reads (`READ_ONLY`), for a kill in the middle of a write would leave half a program.
"""

import contextlib
import os
import pathlib

import jax

from opq_jax.cli import program_cache

CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
ROOT = pathlib.Path(os.environ.get('OPQ_TEST_PROGRAMS') or CACHE / 'opq_jax_tests')
KEPT = ROOT / f'{jax.__version__}-{program_cache._processor()}'
READ_ONLY = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1000000'}

_stack = contextlib.ExitStack()
_own = KEPT  # the worker's folder, from `start` on


def start() -> None:
  """Makes JAX keep its programs, here and in processes that tests start."""
  global _own
  _own = _stack.enter_context(program_cache._run_folder(KEPT))
  options = {
    'jax_compilation_cache_dir': str(_own),
    'jax_persistent_cache_min_compile_time_secs': 0,
    # XLA's own caches make the folder, which is another one in every run, a part of every key
    'jax_persistent_cache_enable_xla_caches': 'none',
  }
  for option, value in options.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)


def exchange() -> None:
  """Links this worker's new programs into the kept ones, and the other workers' into its own."""
  kept, own = _names(KEPT), _names(_own)
  for name in own - kept:
    with contextlib.suppress(FileExistsError):
      os.link(_own / name, KEPT / name)
  for name in kept - own:
    with contextlib.suppress(FileNotFoundError):  # another run may have removed it
      os.link(KEPT / name, _own / name)


def finish() -> None:
  """Keeps what is new, within the limit of all that is kept."""
  exchange()
  program_cache._limit(ROOT)
  _stack.close()


def _names(folder: pathlib.Path) -> set[str]:
  return {entry.name for entry in os.scandir(folder) if entry.name.endswith('-cache')}


def number_of_maps() -> int:
  """Returns how many maps of memory this process has, 0 where the system does not tell."""
  try:
    with open('/proc/self/maps', 'rb') as file:
      return file.read().count(b'\n')
  except OSError:
    return 0
