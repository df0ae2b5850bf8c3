"""One strict JAX for all tests: four devices, no silent promotion, no warnings (pyproject.toml)."""

import os
import tempfile

# tests compile far more than they compute: without slow passes that takes less
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_llvm_disable_expensive_passes=true'
)
# and what a process of a test compiles, the next one need not; each worker of pytest-xdist has a
# folder of its own, since JAX does not write to it atomically
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  programs = tempfile.TemporaryDirectory(prefix='opq_jax_programs_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = programs.name
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  os.environ['JAX_COMPILATION_CACHE_DIR'], os.environ.get('PYTEST_XDIST_WORKER', '')
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

hypothesis.settings.register_profile(
  'opq', deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile('opq')


@pytest.fixture(scope='module', autouse=True)
def programs_of_one_module() -> Iterator[None]:
  """Every program of XLA takes some maps of memory, and Linux gives a process 65,530 in all."""
  yield
  jax.clear_caches()
