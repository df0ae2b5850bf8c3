"""One strict JAX for all tests: four devices, no silent promotion, no warnings (pyproject.toml).

Doctests, which run in the same session, see the promotion that users have.
"""

import gc
import os
import pathlib
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from tests.helpers import programs

# Linux gives a process 65,530 maps of memory, and every loaded program takes some
MANY_MAPS = 45_000

TESTS = pathlib.Path(__file__).parent
# programs and pages that use all rooms at once
NOT_MEASURED = 'docs', 'experiments'

programs.start()
# tests compile far more than they compute, and XLA compiles faster without its optimizations.
# OPQ_TEST_OPTIMIZED=1 compiles as users do.  Processes that tests start inherit all of it
if os.environ.get('OPQ_TEST_OPTIMIZED') != '1':
  # the verifier checks every program between XLA's passes; the others rearrange loops, reshapes,
  # sorts and conditionals
  passes = (
    *('hlo-verifier', 'while-loop-invariant-code-motion', 'while-loop-constant-sinking'),
    *('reshape-mover', 'simplify-sorts', 'simplify-conditional'),
  )
  flags = [
    '--xla_llvm_disable_expensive_passes=true',
    f'--xla_disable_hlo_passes={",".join(passes)}',
  ]
  # XLA does not start with a flag it does not know
  if jax.__version_info__ >= (0, 10):
    flags += ['--xla_cpu_parallel_codegen_split_count=1']
  if (0, 10) <= jax.__version_info__ < (0, 11):
    flags += ['--xla_cpu_use_fusion_emitters=false']
  if jax.__version_info__ >= (0, 12):
    # programs with fusions for YNNPACK compile slower
    flags += ['--xla_cpu_experimental_ynn_fusion_type=']
  os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  jax.config.update('jax_disable_most_optimizations', True)

jax.config.update('jax_num_cpu_devices', 4)

hypothesis.settings.register_profile(
  'opq', deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile('opq')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Measures coverage in the first case of every test of the rooms: it slows down JAX's tracing.

  Further cases of a test go through the same lines, nearly all of them.
  """
  measured: set[str] = set()
  for item in items:
    name = item.nodeid.partition('[')[0]
    is_of_rooms = not any(item.path.is_relative_to(TESTS / folder) for folder in NOT_MEASURED)
    if name in measured or not is_of_rooms:
      item.add_marker('no_cover')
    measured.add(name)


def pytest_collection_finish() -> None:
  # what is imported lives as long as the tests, so that no collection needs to visit it
  gc.collect()
  gc.freeze()


def pytest_sessionfinish() -> None:
  programs.finish()


@pytest.fixture(scope='module', autouse=True)
def strict_promotion() -> Iterator[None]:
  """Makes a promotion of dtypes or ranks that nobody wrote down an error."""
  strict = {'jax_numpy_dtype_promotion': 'strict', 'jax_numpy_rank_promotion': 'raise'}
  before = {option: getattr(jax.config, option) for option in strict}
  for option, value in strict.items():
    jax.config.update(option, value)
  yield
  for option, value in before.items():
    jax.config.update(option, value)


@pytest.fixture(scope='module', autouse=True)
def programs_of_one_module() -> Iterator[None]:
  """Shares compiled programs with the other workers, and drops them before there are too many."""
  yield
  programs.exchange()
  if programs.number_of_maps() > MANY_MAPS:
    jax.clear_caches()
