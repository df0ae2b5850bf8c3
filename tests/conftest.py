"""One strict JAX for all tests: four devices, no silent promotion, no warnings (pyproject.toml).

Compiled programs are kept between runs: XLA's compiling is most of the time of a test.  JAX's
writes to a cache are not atomic, so no two processes may share a folder.  Every run, and every
worker of pytest-xdist, has a folder of its own, filled by hard links from the kept one; new
programs are linked back at its end, which is atomic.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# beside the compiled programs of other versions and platforms: their names are hashes of all that
KEPT = pathlib.Path(
  os.environ.get('OPQ_TEST_PROGRAMS')
  or pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  / 'opq_jax_tests'
  / jax.__version__
)
KEPT.mkdir(parents=True, exist_ok=True)
# inside of the kept folder, for links do not cross file systems
PROGRAMS = pathlib.Path(tempfile.mkdtemp(prefix='run_', dir=KEPT))
for kept in KEPT.glob('*-cache'):
  os.link(kept, PROGRAMS / kept.name)

OPTIONS = {
  'jax_compilation_cache_dir': str(PROGRAMS),
  'jax_persistent_cache_min_compile_time_secs': 0,
  # XLA's own caches have the folder in their keys, and it is another one in every run
  'jax_persistent_cache_enable_xla_caches': 'none',
}
for option, value in OPTIONS.items():
  jax.config.update(option, value)
  os.environ[option.upper()] = str(value)  # of processes that tests start
# tests compile far more than they compute: without slow passes that takes less
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_llvm_disable_expensive_passes=true'
)

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

hypothesis.settings.register_profile(
  'opq', deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile('opq')


def pytest_sessionfinish() -> None:
  """Keeps the new programs."""
  for path in PROGRAMS.glob('*-cache'):
    with contextlib.suppress(FileExistsError):
      os.link(path, KEPT / path.name)
  shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(scope='module', autouse=True)
def programs_of_one_module() -> Iterator[None]:
  """Every program of XLA takes some maps of memory, and Linux gives a process 65,530 in all."""
  yield
  jax.clear_caches()
