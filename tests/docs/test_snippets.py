"""Every snippet of README.md, CONTRIBUTING.md and docs/ runs, or says why not and is parsed."""

import importlib.util
import subprocess

import numpy as np
import pytest

from opq_jax import cli
from opq_jax.weights import write_safetensors
from tests.helpers import snippets

PAGES = snippets.pages()
WITH_CODE = [name for name, path in PAGES.items() if snippets.snippets(path)]
# commands of other programs, which are only parsed
OTHERS = {
  'du',
  '.',
  '.ci/run',
  'mypy',
  'npm',
  'pip',
  'pre-commit',
  'pytest',
  'python3',
  'ruff',
  'sphinx-build',
  'tar',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with weights under the name that the pages use."""
  rng = np.random.default_rng(0)
  weights = {
    'embed': {'table': rng.normal(size=(64, 16)).astype(np.float32)},
    'layer': {
      'kernel': rng.laplace(size=(64, 48)).astype(np.float32),
      'bias': np.zeros(48, np.float32),
    },
  }
  write_safetensors(tmp_path / 'weights.safetensors', weights)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('name', WITH_CODE)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_snippets_run(name, folder):
  for package in ('haiku', 'equinox', 'torch'):  # of extras
    if f'import {package}' in PAGES[name].read_text():
      pytest.importorskip(package)
  namespace = {'__name__': 'snippet'}
  for snippet in snippets.snippets(PAGES[name]):
    where = f'{name}:{snippet.line}'
    if snippet.language == 'python':
      code = compile(snippet.text, where, 'exec')
      if snippet.is_run:
        exec(code, namespace)
      continue
    subprocess.run(['bash', '-n'], input=snippet.text, text=True, check=True)
    for command in snippets.commands(snippet.text):
      program = command[0].removeprefix('.venv/bin/')
      if program == 'opq':
        check_opq(command[1:], where, is_run=snippet.is_run)
      elif program == 'python':
        check_module(command, where)
      else:
        assert program in OTHERS and not snippet.is_run, f'{where}: {command}'


def check_opq(arguments, where, *, is_run):
  """Runs a command, or holds its options to the help text of the command."""
  if is_run:
    assert cli.main(arguments) == 0, f'{where}: {arguments}'
    return
  text = subprocess_help(arguments[0])
  for option in [word for word in arguments if word.startswith('--')]:
    assert option in text, f'{where}: found {option}, expected an option of opq {arguments[0]}'


def subprocess_help(command):
  import contextlib
  import io

  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    assert cli.main([command, '--help']) == 0
  return text.getvalue()


def check_module(command, where):
  """`python -m MODULE --config=FILE:NAME`: both exist."""
  assert command[1] == '-m', f'{where}: {command}'
  assert importlib.util.find_spec(command[2]), f'{where}: found no module {command[2]}'
  for word in command[3:]:
    if word.startswith('--config='):
      path = word.removeprefix('--config=').partition(':')[0]
      assert (snippets.ROOT / path).exists(), f'{where}: found no file {path}'


def test_snippets_found():
  """The pages of the guides have code, and most of it runs."""
  found = [snippet for path in PAGES.values() for snippet in snippets.snippets(path)]
  assert sum(snippet.is_run for snippet in found) >= 20
  assert {'README.md', 'docs/index.md', 'docs/guides/frameworks.md'} <= set(WITH_CODE)
