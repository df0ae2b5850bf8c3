"""Runs the tests of a module with mutated source, each run in a fork that has imported JAX.

XLA compiles a mutant of traced code again for every test.  So tests are ordered by their seconds
without any mutation over the mutants that they have killed so far: all tests run only for mutants
that survive.  A test that takes far longer than without mutation counts as one that never ends.
"""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
# preloaded by the server that runs are forked from; nothing of opq_jax, which is mutated
IMPORTED = (
  *('jax', 'flax.core', 'flax.nnx', 'flax.struct', 'optax', 'safetensors.numpy', 'scipy.integrate'),
  *('hypothesis.extra.numpy', 'pytest', 'rich.table', 'orbax.checkpoint'),
)


def source_of(module: str) -> str:
  """Returns the source of a module of `opq_jax`."""
  return (ROOT / 'opq_jax' / f'{module.replace(".", "/")}.py').read_text()


class _Loader(importlib.machinery.SourceFileLoader):
  """Loads a module from a string instead of its file."""

  source = ''

  def get_code(self, fullname: str) -> Any:
    return compile(self.source, self.path, 'exec')


class _Finder:
  """Finds the mutated module, before the usual finders do."""

  def __init__(self, name: str, source: str):
    self.name, self.source = name, source

  def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
    if name != self.name:
      return None
    file = str(ROOT / (name.replace('.', '/') + '.py'))
    loader = _Loader(name, file)
    loader.source = self.source
    return importlib.util.spec_from_file_location(name, file, loader=loader)


class _Order:
  """A plugin of pytest that orders tests, and records their seconds and failures.

  Args:
    seconds: of each test without any mutation.
    kills: number of mutants that each test has killed.
    budget: seconds; only the quickest tests that fit into it run.
    path: of the JSON file that the record is written to.
  """

  def __init__(self, seconds: dict[str, float], kills: dict[str, int], budget: float, path: str):
    self.seconds, self.kills, self.budget, self.path = seconds, kills, budget, path
    self.took: dict[str, float] = {}
    self.failed: list[str] = []

  def pytest_collection_modifyitems(self, items: list[Any]) -> None:
    seconds = lambda item: self.seconds.get(item.nodeid, 0.0)
    items.sort(key=seconds)
    ends = itertools.accumulate(map(seconds, items))
    items[:] = [item for item, end in zip(items, ends, strict=True) if end <= self.budget]
    items.sort(key=lambda item: seconds(item) / (1 + self.kills.get(item.nodeid, 0)))

  def pytest_runtest_setup(self, item: Any) -> None:
    if self.seconds:
      # processor time: independent of other load.  Shared fixtures count for the first test of a
      # file, hence 60 seconds more.
      signal.setitimer(signal.ITIMER_PROF, 60 + 5 * self.seconds.get(item.nodeid, 0.0))

  def pytest_runtest_logreport(self, report: Any) -> None:
    self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
    if report.failed:
      self.failed.append(report.nodeid)

  def pytest_sessionfinish(self) -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    answer = {'seconds': self.took, 'failed': self.failed}
    pathlib.Path(self.path).write_text(json.dumps(answer))


@dataclasses.dataclass
class Tests:
  """The tests of a module, and what their runs have shown so far.

  Attributes:
    module: that is mutated, such as `allocation.laplace`.
    files: of its tests, under tests/.
    folder: for logs, answers and compiled programs.
    budget: seconds; only the quickest tests that fit into it run.
    only: an expression as for pytest's -k.
    seconds, kills: see `_Order`.
  """

  module: str
  files: list[str]
  folder: str
  budget: float = math.inf
  only: str = ''
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  kills: dict[str, int] = dataclasses.field(default_factory=dict)

  def measure(self) -> float:
    """Runs the tests without any mutation; returns their seconds."""
    outcome, answer, took = self._run(source_of(self.module), 3600)
    if outcome != 'survived':
      raise ValueError(
        f'{self.module}: found tests that fail without any mutation: {outcome}, {answer["failed"]}'
      )
    self.seconds = answer['seconds']
    return took

  def outcome(self, source: str, limit: float) -> tuple[str, str, float]:
    """Returns the outcome for a source, the first test that failed, and the seconds taken."""
    outcome, answer, seconds = self._run(source, limit)
    for test in answer['failed'][:1]:
      self.kills[test] = self.kills.get(test, 0) + 1
    return outcome, ' '.join(answer['failed'][:1]), seconds

  def _run(self, source: str, limit: float) -> tuple[str, dict[str, Any], float]:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory(dir=self.folder) as place:
      log, path = (pathlib.Path(place) / name for name in ('log', 'answer'))
      begin = time.monotonic()
      order = _Order(self.seconds, self.kills, self.budget, str(path))
      cache = os.path.join(self.folder, 'cache')
      arguments = self.module, source, self.files, str(log), cache, self.only, order
      process = context.Process(target=_run_tests, args=arguments)
      process.start()
      process.join(limit)
      is_hung = process.is_alive()
      if is_hung:
        process.kill()
        process.join()
      seconds = time.monotonic() - begin
      answer = json.loads(path.read_text()) if path.exists() else {'seconds': {}, 'failed': []}
      if is_hung or process.exitcode == -signal.SIGPROF:
        return 'killed by the time', answer, seconds
      if process.exitcode == 0:
        return 'survived', answer, seconds
      if process.exitcode not in (1, 2, 4):
        print(log.read_text(errors='replace')[-2000:], process.exitcode, file=sys.stderr)
      return 'killed', answer, seconds


def _run_tests(
  module: str, source: str, files: list[str], log: str, cache: str, only: str, order: _Order
) -> None:
  """Runs the tests of a module with another source in this process, and exits with their code."""
  assert not any(name.startswith('opq_jax') for name in sys.modules)
  os.chdir(ROOT)
  for stream in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
  # programs of mutants are kept apart from the tests' own (tests/helpers/programs.py)
  os.environ['OPQ_TEST_PROGRAMS'] = cache
  sys.meta_path.insert(0, _Finder(f'opq_jax.{module}', source))
  import pytest

  # the warning: Hypothesis is preloaded, so pytest cannot rewrite its assertions
  options = ['-x', '-p', 'no:cacheprovider', '-W', 'ignore::pytest.PytestAssertRewriteWarning']
  options += ['-k', only]
  tests = [f'tests/{name}' for name in files]
  sys.exit(int(pytest.main([*options, *tests], plugins=[order])))
