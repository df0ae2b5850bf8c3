"""Benchmarks import, and recorded commands name modules and configs that exist."""

import doctest
import importlib
import importlib.util
import json
import pathlib
import re

import pytest

import experiments
from configs import finetune_base
from experiments import make_results, result_tables
from experiments.benchmarks import harness
from experiments.benchmarks.robustness import mutants, mutations

ROOT = pathlib.Path(experiments.__file__).parents[1]
BENCHMARKS = ROOT / 'experiments' / 'benchmarks'
# packages of rivals and references, which no extra installs; NNCodec's own environment runs the
# worker
OPTIONAL = {
  'core_ml_packages': ('torch',),
  'litert_floats': ('ai_edge_litert', 'litert_converter'),
  'inference': ('torch',),
  'inference_layers': ('torch',),
  'inference_profile': ('torch',),
  'encoder_forms': ('equinox',),
  'sentence_encoder_forms': ('equinox',),
  'language_model': ('torch', 'transformers', 'tokenizers'),
  'torch_modules': ('torch',),
}
ELSEWHERE = 'nncodec_worker'


@pytest.mark.parametrize(
  'path', sorted(BENCHMARKS.glob('*/[!_]*.py')), ids=lambda path: f'{path.parent.name}.{path.stem}'
)
def test_benchmark_doctests(path):
  for package in OPTIONAL.get(path.stem, ()):
    pytest.importorskip(package)
  if path.stem != ELSEWHERE:
    module = importlib.import_module(f'experiments.benchmarks.{path.parent.name}.{path.stem}')
    assert doctest.testmod(module).failed == 0


def test_experiment_doctests():
  for module in (finetune_base, make_results, result_tables):
    assert doctest.testmod(module).failed == 0


def test_recorded_commands_name_modules():
  commands = {}
  for path in (ROOT / 'experiments' / 'results').rglob('*.json'):
    commands[path] = json.loads(path.read_text())['command']
  assert len(commands) > 40
  for path, command in commands.items():
    modules = re.findall(r'-m (experiments\.\S+)', command)
    assert modules and all(map(importlib.util.find_spec, modules)), path
    for config in re.findall(r'--config=(\S+\.py)', command):
      assert (ROOT / config).exists(), path


def test_with_earlier_keeps_other_cases(tmp_path, monkeypatch):
  monkeypatch.setattr(harness, 'RESULTS', tmp_path)
  row = lambda kind, bits, loss: {'kind': kind, 'bits': bits, 'loss': loss}
  first = [row('a', 2, 0.3), row('a', 3, 0.2), row('b', 2, 0.4)]
  columns = ['kind', 'bits']
  assert harness.with_earlier('table', first, columns) == first
  harness.report('table', '', 'python', first)
  again = [row('a', 3, 0.1), row('c', 2, 0.5)]
  assert harness.with_earlier('table', again, columns) == [first[0], first[2], *again]


def test_mutants_name_modules_and_tests():
  for module, files in mutants.TESTS.items():
    assert importlib.util.find_spec(f'opq_jax.{module}'), module
    for name in files:
      assert (ROOT / 'tests' / name).exists(), name


def test_mutations_change_one_expression():
  source = (
    '@jit\ndef f(x: int = 1) -> int:\n  """1 + 1"""\n  if x < 2:\n    return x + 1\n  raise E\n'
  )
  found = mutations.mutations(source)
  assert {mutant.change for mutant in found} == {
    *('1 -> (2)', '1 -> (0)', '2 -> (3)', '2 -> (1)', 'x + 1 -> (x - 1)', 'raise E -> pass'),
    *('x < 2 -> (x <= 2)', 'x < 2 -> (x >= 2)', 'x < 2 -> (not (x < 2))'),
  }
  for mutant in found:
    before, after = mutant.change.split(' -> ')
    assert mutant.function == 'f'
    assert mutant.source in {
      source[:i] + after + source[i + len(before) :]
      for i in range(len(source))
      if source.startswith(before, i)
    }
