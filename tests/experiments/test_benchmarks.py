"""Every benchmark imports, and every recorded command names a module and a config that exist."""

import importlib
import importlib.util
import json
import pathlib
import re

import pytest

import experiments

ROOT = pathlib.Path(experiments.__file__).parents[1]
BENCHMARKS = ROOT / 'experiments' / 'benchmarks'
# this one needs PyTorch, and NNCodec's own environment runs the worker
OPTIONAL = {'inference': 'torch', 'inference_layers': 'torch', 'inference_profile': 'torch'}
ELSEWHERE = 'nncodec_worker'


@pytest.mark.parametrize(
  'path', sorted(BENCHMARKS.glob('*/[!_]*.py')), ids=lambda path: f'{path.parent.name}.{path.stem}'
)
def test_benchmark_imports(path):
  if path.stem in OPTIONAL:
    pytest.importorskip(OPTIONAL[path.stem])
  if path.stem != ELSEWHERE:
    importlib.import_module(f'experiments.benchmarks.{path.parent.name}.{path.stem}')


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
