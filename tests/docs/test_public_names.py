"""The list of public names in docs/reference/index.md is that of every `__all__`."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import opq_jax
from opq_jax import deprecated
from tests.helpers import snippets


def exported():
  """{room: names that are no modules} of the top level and of every room."""
  found = {}
  for room in [
    'opq_jax',
    *(f'opq_jax.{part.name}' for part in pkgutil.iter_modules(opq_jax.__path__)),
  ]:
    module = importlib.import_module(room)
    if pathlib.Path(module.__file__).name != '__init__.py':
      continue
    is_module = lambda name, room=module: inspect.ismodule(getattr(room, name, room))
    names = [name for name in getattr(module, '__all__', ()) if not is_module(name)]
    if names:
      found[room] = sorted(names)
  return found


def listed():
  text = (snippets.ROOT / 'docs' / 'reference' / 'index.md').read_text()
  sections = re.split(r'^## ', text, flags=re.MULTILINE)[1:]
  return {
    section.splitlines()[0]: sorted(re.findall(r'^- `(\w+)`$', section, re.MULTILINE))
    for section in sections
  }


def test_reference_lists_names():
  assert listed() == exported()


def test_reference_page_of_room():
  folder = snippets.ROOT / 'docs' / 'reference'
  for room in exported():
    page = folder / f'{room.partition(".")[2] or "top"}.md'
    assert f'.. door:: {room}\n' in page.read_text()


def test_unknown_name_fresh_process():
  """`hasattr` of a name that never was is False, also before anything else is imported."""
  code = 'import opq_jax; raise SystemExit(hasattr(opq_jax, "no_such_name"))'
  subprocess.run([sys.executable, '-c', code], check=True, cwd=snippets.ROOT, timeout=120)


def test_changelog_lists_renames():
  """Every name that warns has a row with its new place."""
  rows = re.findall(
    r'^\| `opq_jax\.(\w+)(?:\(.*\))?` \| `(.*)` \|$',
    (snippets.ROOT / 'CHANGELOG.md').read_text(),
    re.MULTILINE,
  )
  moved = {name: f'opq_jax.{room}.{name}' for name, room in deprecated._MOVED.items()}
  moved |= {name: f'opq_jax.{place}' for name, place in deprecated._MODULES.items()}
  listed = dict(rows)
  assert len(rows) == len(listed)
  assert {name: listed.get(name) for name in moved} == moved
  assert set(listed) == {*moved, *deprecated._FUNCTIONS}
