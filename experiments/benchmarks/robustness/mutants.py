"""Mutation tests: small errors put into a module, of which its tests must find every one.

    python -m experiments.benchmarks.robustness.mutants --count 50
    python -m experiments.benchmarks.robustness.mutants --again             # survivors, new tests
    python -m experiments.benchmarks.robustness.mutants --again --only new  # tests *new* alone

A mutant is a module with one expression or statement changed, drawn with a fixed seed from all
that `mutations` makes of it; its fast tests run until the first one fails.  Those that all tests
pass with have survived: a test is missing, or the change is none (`equivalent_mutants.json` says
why).

Own operators over `ast`, after those of cosmic-ray: mutmut leaves decorated functions alone, which
here are most (jax.jit, jax.custom_jvp), and cosmic-ray changes the working tree and starts Python
and JAX anew for every mutant, which takes longer than most of these tests.  Here a mutant is
imported in a fork of a process that has imported JAX, and what XLA has compiled once is kept.

XLA compiles a mutant of what is traced again for every test.  So tests come in the order of the
seconds that they took without any mutation over the mutants that they have killed so far, from the
one that tells most a second: all of them run for those mutants alone that survive.  Where that is
too long, `--most` seconds of the quickest tests are all that run, and a mutant that only a slower
one would notice has survived.  A test that takes far longer than it did is taken for one that never
ends.
"""

import argparse
import ast
import dataclasses
import importlib.machinery
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).parents[3]
EXPLAINED = pathlib.Path(__file__).parent / 'equivalent_mutants.json'
TESTS = {
  'allocation.laplace': ['allocation/test_laplace.py'],
  'allocation.allocator': ['allocation/test_allocator.py', 'compression/test_codes.py'],
  'allocation.solver': ['allocation/test_allocator.py', 'compression/test_codes.py'],
  'allocation.rate_search': [
    'allocation/test_rate_search.py',
    'allocation/test_lattices.py',
    'allocation/test_allocator.py',
  ],
  'compression.cells': ['compression/test_codes.py', 'file/test_artifact.py'],
  'compression.codes': ['compression/test_codes.py', 'file/test_artifact.py'],
  'compression.records': ['compression/test_codes.py', 'file/test_artifact.py'],
  'file.checks': ['file/test_artifact.py', 'file/test_hostile_files.py'],
  'file.grids': ['file/test_grids.py', 'file/test_artifact.py', 'file/test_hostile_files.py'],
  'file.reader': ['file/test_artifact.py', 'file/test_hostile_files.py'],
  'file.writer': ['file/test_artifact.py', 'file/test_hostile_files.py'],
  'coding.arrangements': ['coding/test_contexts.py', 'coding/test_payload.py'],
  'coding.context_search': ['coding/test_contexts.py', 'coding/test_payload.py'],
  'coding.contexts': ['coding/test_contexts.py', 'coding/test_payload.py'],
  'coding.neighbours': ['coding/test_contexts.py', 'coding/test_payload.py'],
}
IMPORTED = (
  *('jax', 'flax.core', 'flax.nnx', 'flax.struct', 'optax', 'safetensors.numpy', 'scipy.integrate'),
  *('hypothesis.extra.numpy', 'pytest', 'rich.table', 'orbax.checkpoint'),
)
PROCESSES = 1

OPERATORS: dict[type[ast.AST], list[type[ast.AST]]] = {
  ast.Add: [ast.Sub],
  ast.Sub: [ast.Add],
  ast.Mult: [ast.Div],
  ast.Div: [ast.Mult],
  ast.FloorDiv: [ast.Mult],
  ast.Mod: [ast.Mult],
  ast.Pow: [ast.Mult],
  ast.BitAnd: [ast.BitOr],
  ast.BitOr: [ast.BitAnd],
  ast.LShift: [ast.RShift],
  ast.RShift: [ast.LShift],
  ast.Lt: [ast.LtE, ast.GtE],
  ast.LtE: [ast.Lt, ast.Gt],
  ast.Gt: [ast.GtE, ast.LtE],
  ast.GtE: [ast.Gt, ast.Lt],
  ast.Eq: [ast.NotEq],
  ast.NotEq: [ast.Eq],
  ast.Is: [ast.IsNot],
  ast.IsNot: [ast.Is],
  ast.In: [ast.NotIn],
  ast.NotIn: [ast.In],
  ast.And: [ast.Or],
  ast.Or: [ast.And],
}
CALLS = {
  'minimum': 'maximum',
  'maximum': 'minimum',
  'min': 'max',
  'max': 'min',
  'any': 'all',
  'all': 'any',
  'floor': 'ceil',
  'ceil': 'floor',
  'round': 'floor',
  'expm1': 'exp',
  'log1p': 'log',
  'zeros': 'ones',
  'argmin': 'argmax',
  'abs': 'negative',
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A module with one change.

  Attributes:
    function: where it is.
    line: number of its line.
    text: the line as it was.
    change: what became what.
    source: the whole module.
  """

  function: str
  line: int
  text: str
  change: str
  source: str

  def key(self) -> str:
    """What names it for as long as its line stays as it is."""
    return f'{self.function}: {self.text}: {self.change}'


def mutations(source: str) -> list[Mutant]:
  """All mutants of a module."""
  data, found = source.encode(), []
  lines = data.splitlines(keepends=True)
  begins = [0]
  for line in lines:
    begins.append(begins[-1] + len(line))
  for function, node, text in _changes(ast.parse(source), ''):
    begin = begins[node.lineno - 1] + node.col_offset
    end = begins[node.end_lineno - 1] + node.end_col_offset
    before = data[begin:end].decode()
    mutated = (data[:begin] + text.encode() + data[end:]).decode()
    change = ' '.join(f'{before} -> {text}'.split())
    found.append(
      Mutant(function, node.lineno, lines[node.lineno - 1].decode().strip(), change, mutated)
    )
  return found


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, Any, str]]:
  """Function, node and new text of every change; annotations, text and decorators stay."""
  if isinstance(node, ast.JoinedStr):
    return
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    function = f'{function}.{node.name}'.lstrip('.')
  for text in _new_texts(node):
    yield function, node, text
  if isinstance(node, ast.If | ast.While):
    yield function, node.test, f'(not ({ast.unparse(node.test)}))'
  for field, value in ast.iter_fields(node):
    if field in ('annotation', 'returns', 'decorator_list'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.AST):
        yield from _changes(child, function)


def _new_texts(node: ast.AST) -> Iterator[str]:
  match node:
    case ast.BinOp() | ast.BoolOp():
      for operator in OPERATORS.get(type(node.op), []):
        yield f'({ast.unparse(_with(node, op=operator()))})'
    case ast.Compare():
      for operator in OPERATORS.get(type(node.ops[0]), []):
        yield f'({ast.unparse(_with(node, ops=[operator(), *node.ops[1:]]))})'
    case ast.UnaryOp():
      if not isinstance(node.operand, ast.Constant):
        yield f'({ast.unparse(node.operand)})'
    case ast.Constant(value=bool()):
      yield str(not node.value)
    case ast.Constant(value=int() | float()):
      yield f'({node.value + 1})'
      yield f'({node.value - 1})'
    case ast.IfExp():
      yield f'({ast.unparse(_with(node, body=node.orelse, orelse=node.body))})'
    case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
      if name in CALLS:
        field = 'attr' if isinstance(node.func, ast.Attribute) else 'id'
        new = _with(node.func, **{field: CALLS[name]})
        yield ast.unparse(_with(node, func=new))
      if name == 'where' and len(node.args) == 3:
        condition, then, otherwise = node.args
        yield ast.unparse(_with(node, args=[condition, otherwise, then]))
      if name == 'clip' and len(node.args) == 3:
        yield ast.unparse(node.args[0])
    case ast.Raise():
      yield 'pass'
    case ast.Expr(value=ast.Call()) | ast.AugAssign():
      yield 'pass'
    case ast.Continue():
      yield 'break'


def _with(node: ast.AST, **changes: Any) -> ast.AST:
  """The node with other fields."""
  fields = {name: getattr(node, name) for name in node._fields}
  return ast.fix_missing_locations(ast.copy_location(type(node)(**fields | changes), node))


class _Loader(importlib.machinery.SourceFileLoader):
  """A module of other source than its file's."""

  source = ''

  def get_code(self, fullname: str) -> Any:
    return compile(self.source, self.path, 'exec')


class _Finder:
  """Finds the one module that is mutated."""

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
  """A plugin of pytest: the order of tests, and the seconds and failures that there were.

  Args:
    seconds: that each test took without any mutation.
    kills: mutants that each has killed.
    most: seconds of the quickest tests, which are all that run.
    path: where the answer goes.
  """

  def __init__(self, seconds: dict[str, float], kills: dict[str, int], most: float, path: str):
    self.seconds, self.kills, self.most, self.path = seconds, kills, most, path
    self.took: dict[str, float] = {}
    self.failed: list[str] = []

  def pytest_collection_modifyitems(self, items: list[Any]) -> None:
    seconds = lambda item: self.seconds.get(item.nodeid, 0.0)
    items.sort(key=seconds)
    ends = itertools.accumulate(map(seconds, items))
    items[:] = [item for item, end in zip(items, ends, strict=True) if end <= self.most]
    items.sort(key=lambda item: seconds(item) / (1 + self.kills.get(item.nodeid, 0)))

  def pytest_runtest_setup(self, item: Any) -> None:
    if self.seconds:
      # of this process, whatever else the machine does; what the fixtures that a file shares take
      # falls to whoever comes first
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
  """The tests of a module, `only` those of some names, and what is known of them; see `_Order`."""

  module: str
  folder: str
  most: float = math.inf
  only: str = ''
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  kills: dict[str, int] = dataclasses.field(default_factory=dict)

  def measure(self) -> float:
    """Runs them without any mutation, and says in how many seconds."""
    said, answer, took = self._run(_source(self.module), 3600)
    if said != 'survived':
      raise ValueError(
        f'{self.module}: found tests that fail without any mutation: {said}, {answer["failed"]}'
      )
    self.seconds = answer['seconds']
    return took

  def outcome(self, source: str, limit: float) -> tuple[str, str, float]:
    """What they say of a source, the first of them that failed, and in how many seconds."""
    said, answer, seconds = self._run(source, limit)
    for test in answer['failed'][:1]:
      self.kills[test] = self.kills.get(test, 0) + 1
    return said, ' '.join(answer['failed'][:1]), seconds

  def _run(self, source: str, limit: float) -> tuple[str, dict[str, Any], float]:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory(dir=self.folder) as place:
      log, path = (pathlib.Path(place) / name for name in ('log', 'answer'))
      begin = time.monotonic()
      order = _Order(self.seconds, self.kills, self.most, str(path))
      cache = os.path.join(self.folder, 'cache')
      arguments = self.module, source, str(log), cache, self.only, order
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


def _run_tests(module: str, source: str, log: str, cache: str, only: str, order: _Order) -> None:
  """In a process of its own: the tests of a module with another source; the exit code tells."""
  assert not any(name.startswith('opq_jax') for name in sys.modules)
  os.chdir(ROOT)
  for stream in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
  sys.meta_path.insert(0, _Finder(f'opq_jax.{module}', source))
  import jax
  import pytest

  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  # Hypothesis is there already
  options = ['-x', '-p', 'no:cacheprovider', '-W', 'ignore::pytest.PytestAssertRewriteWarning']
  options += ['-k', only]
  tests = [f'tests/{name}' for name in TESTS[module]]
  sys.exit(int(pytest.main([*options, *tests], plugins=[order])))


def tried(
  module: str, count: int, seconds: float, most: float, folder: str
) -> list[dict[str, str]]:
  """What became of the first `count` mutants of a module, or of those that there was time for."""
  tests = Tests(module, folder, most)
  baseline = tests.measure()
  print(f'{module}: {len(tests.seconds)} tests in {baseline:.0f} s', file=sys.stderr)
  possible, end = mutations(_source(module)), time.monotonic() + seconds

  def one(mutant: Mutant) -> dict[str, str] | None:
    if time.monotonic() > end:
      return None
    said, test, took = tests.outcome(mutant.source, 60 + 5 * baseline)
    print(f'{module} {said} {took:.0f} s: {mutant.line}: {mutant.key()} {test}', file=sys.stderr)
    return {
      'module': module,
      'function': mutant.function,
      'line': mutant.text,
      'change': mutant.change,
      'outcome': said,
    }

  with ThreadPoolExecutor(PROCESSES) as pool:
    found = pool.map(one, random.Random(0).sample(possible, min(count, len(possible))))
    return [mutant for mutant in found if mutant is not None]


def tried_again(mutants: list[dict[str, str]], only: str, folder: str) -> None:
  """Tries those that have survived against the tests of now."""
  tests: dict[str, Tests] = {}
  for mutant in mutants:
    same = [
      found
      for found in mutations(_source(mutant['module']))
      if (found.function, found.text, found.change)
      == (mutant['function'], mutant['line'], mutant['change'])
    ]
    if mutant['outcome'] == 'survived' and not _why(mutant) and same:
      module = mutant['module']
      if module not in tests:
        tests[module] = Tests(module, folder, only=only)
        tests[module].measure()
      # a line may hold the same change twice
      said = [tests[module].outcome(found.source, 3600)[0] for found in same]
      mutant['outcome'] = 'survived' if 'survived' in said else said[0]
      print(mutant, said, file=sys.stderr)


def _source(module: str) -> str:
  return (ROOT / 'opq_jax' / f'{module.replace(".", "/")}.py').read_text()


def _why(mutant: dict[str, str]) -> str:
  """Why nothing can notice a mutant, where that is known."""
  explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
  return explained.get(': '.join(mutant[name] for name in ('module', 'line', 'change')), '')


def write(mutants: list[dict[str, str]], options: dict[str, str]) -> None:
  """Rows for the README, and every mutant.

  Args:
    mutants: of all modules.
    options: of the command that each module's were drawn with.
  """
  from experiments.benchmarks import harness

  rows: list[dict[str, object]] = []
  for module in dict.fromkeys(mutant['module'] for mutant in mutants):
    of_it = [mutant for mutant in mutants if mutant['module'] == module]
    survived = [mutant for mutant in of_it if mutant['outcome'] == 'survived']
    rows.append(
      {
        'module': f'`{module}`',
        'mutants': len(mutations(_source(module))),
        'drawn': len(of_it),
        'killed': len(of_it) - len(survived),
        'equivalent': sum(bool(_why(mutant)) for mutant in survived),
        'survived': sum(not _why(mutant) for mutant in survived),
      }
    )
  commands = []
  for option in dict.fromkeys(options.values()):
    modules = ' '.join(module for module in TESTS if options.get(module) == option)
    commands.append(
      f'python -m experiments.benchmarks.robustness.mutants {option} --modules {modules}'
    )
  command = '` and `'.join(commands)
  harness.report('mutants', 'mutants, and what the tests say of them', command, rows)
  path = harness.RESULTS / 'mutants.json'
  listed = [
    mutant | {'why': _why(mutant)} if mutant['outcome'] == 'survived' else mutant
    for mutant in mutants
  ]
  document = {'command': command, 'options': options, 'rows': rows, 'mutants': listed}
  path.write_text(json.dumps(document, indent=1) + '\n')


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--count', type=int, default=50, help='mutants of each module')
  parser.add_argument('--seconds', type=float, default=3600, help='for each module, at most')
  parser.add_argument('--most', type=float, default=math.inf, help='seconds of quickest tests')
  parser.add_argument('--modules', nargs='+', default=list(TESTS), choices=list(TESTS))
  parser.add_argument('--again', action='store_true', help='only those that have survived so far')
  parser.add_argument('--only', default='', help='with --again: tests of these names, as for -k')
  arguments = parser.parse_args()
  from experiments.benchmarks import harness

  path = harness.RESULTS / 'mutants.json'
  document = json.loads(path.read_text()) if path.exists() else {'mutants': [], 'options': {}}
  mutants, options = document['mutants'], document['options']
  with tempfile.TemporaryDirectory() as folder:
    if arguments.again:
      tried_again(mutants, arguments.only, folder)
      write(mutants, options)
      return
    for module in arguments.modules:
      # what was found of the others before stays
      mutants = [mutant for mutant in mutants if mutant['module'] != module]
      mutants += tried(module, arguments.count, arguments.seconds, arguments.most, folder)
      mutants.sort(key=lambda mutant: list(TESTS).index(mutant['module']))
      options[module] = f'--count {arguments.count} --seconds {arguments.seconds:g}'
      if arguments.most < math.inf:
        options[module] += f' --most {arguments.most:g}'
      write(mutants, options)


if __name__ == '__main__':
  main()
