"""Converts docstrings to reStructuredText, and documents the public names of a room.

The docstrings of the library are plain text for people: mathematics in indented blocks, names in
single backticks, sections `Args:`, `Returns:`, `Raises:`.  They are not reStructuredText, where
`|w|` and `x *= 2` have meanings of their own, so they are converted here:

    an indented block            a literal block, or a list where it begins with a bullet
    `a name of the library`      a link
    `other text`                 a literal
    Args, Attributes, Raises     fields
    lines from >>> on            as they are
"""

import contextlib
import importlib
import inspect
import io
import os
import pathlib
import re
import unittest.mock
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

TOP = 'opq_jax'
FIELDS = {
  'Args': 'param {}',
  'Attributes': '',
  'Raises': 'raises {}',
  'Warns': 'raises {}',
  'Returns': 'returns',
  'Yields': 'returns',
}
_SECTION = re.compile(rf'({"|".join(FIELDS)}):$')
_BULLET = re.compile(r'(\* |- |\d+\. )')
_CODE = re.compile(r'(`+)(.+?)\1')


def rooms() -> list[str]:
  """Returns the names of the top level and of every room that has an `__all__`."""
  package = importlib.import_module(TOP)
  names = [TOP]
  for folder in sorted(child.name for child in _folders(package)):
    if hasattr(importlib.import_module(f'{TOP}.{folder}'), '__all__'):
      names.append(f'{TOP}.{folder}')
  return names


def _folders(package: Any) -> list[Any]:
  root = pathlib.Path(package.__file__).parent
  return [child for child in root.iterdir() if (child / '__init__.py').exists()]


def public_names(room: str) -> list[str]:
  """Returns the names of the `__all__` of a room, without modules, sorted."""
  module = importlib.import_module(room)
  found = [name for name in module.__all__ if not name.startswith('_')]
  is_module = lambda name: inspect.ismodule(getattr(module, name, module))  # perhaps not imported
  return sorted(name for name in found if not is_module(name))


def places() -> dict[str, str]:
  """Maps every public name, with its room, to its place: the first room that has the object."""
  first: dict[int, str] = {}
  found = {}
  for room in rooms():
    for name in public_names(room):
      thing = getattr(importlib.import_module(room), name)
      is_shared = callable(thing)  # numbers and strings may be equal by accident
      place = first.setdefault(id(thing), f'{room}.{name}') if is_shared else f'{room}.{name}'
      found[f'{room}.{name}'] = place
  return found


_PLACES: dict[str, str] = {}
_SHORT: dict[str, str] = {}


def _learn_places() -> None:
  if _PLACES:
    return
  _PLACES.update(places())
  for place in _PLACES.values():
    _SHORT.setdefault(place.rpartition('.')[2], place)


def escaped(text: str) -> str:
  """Escapes a line of prose, so that reStructuredText finds no markup of its own in it."""
  parts, end = [], 0
  for match in _CODE.finditer(text):
    parts += [_plain(text[end : match.start()]), _code(match[2].strip())]
    end = match.end()
  line = ''.join([*parts, _plain(text[end:])])
  return line.removeprefix('\\ ').removesuffix('\\ ')  # which would join it to the next line


def _plain(text: str) -> str:
  text = re.sub(r'([\\*|`])|(?<=\w)(_)(?!\w)', lambda m: '\\' + m[0], text)
  return re.sub(r'docs/([\w/]+)\.md', r':doc:`/\1`', text)  # links to pages of these documents


def _code(text: str) -> str:
  place = _PLACES.get(text) or _SHORT.get(text)
  if place is not None:
    return f'\\ :py:obj:`{text} <{place}>`\\ '
  return f'\\ ``{text}``\\ '


def _indent(line: str) -> int:
  return len(line) - len(line.lstrip())


def converted(lines: list[str]) -> list[str]:
  """Returns the lines of a docstring as reStructuredText."""
  out: list[str] = []
  i = 0
  while i < len(lines):
    line = lines[i]
    end = i + 1
    if line.lstrip().startswith('>>>'):
      while end < len(lines) and lines[end].strip():
        end += 1
      out += ['', *lines[i:end], '']
    elif match := _SECTION.match(line):
      while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > 0):
        end += 1
      out += ['', *_fields(match[1], lines[i + 1 : end]), '']
    elif line.strip() and _indent(line) > 0:
      while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > 0):
        end += 1
      out += _block(lines[i:end])
    elif _BULLET.match(line):
      while end < len(lines) and lines[end].strip() and not lines[end].startswith('>>>'):
        end += 1
      out += ['', *_bullets(lines[i:end]), '']
    else:
      out.append(escaped(line))
    i = end
  return out


def _block(lines: list[str]) -> list[str]:
  """Converts an indented block: a list, or literal text."""
  width = min(_indent(line) for line in lines if line.strip())
  lines = [line[width:] for line in lines]
  while lines and not lines[-1].strip():
    lines.pop()
  if lines[0].startswith('>>>'):
    return ['', *lines, '']
  if _BULLET.match(lines[0]):
    return ['', *_bullets(lines), '']
  return ['', '::', '', *(f'  {line}'.rstrip() for line in lines), '']


def _bullets(lines: list[str]) -> list[str]:
  out: list[str] = []
  for line in lines:
    match = _BULLET.match(line)
    if match:
      out += ['', f'* {escaped(line[match.end() :])}']
    else:
      out.append(f'  {escaped(line.strip())}'.rstrip())
  return out


def _fields(section: str, lines: list[str]) -> list[str]:
  """Converts the entries of a section to fields."""
  lines = [*lines, '']
  width = min((_indent(line) for line in lines if line.strip()), default=0)
  lines = [line[width:] for line in lines]
  if section in ('Returns', 'Yields'):
    return [f':{FIELDS[section]}:', *(f'  {line}'.rstrip() for line in converted(lines))]
  out: list[str] = []
  if section == 'Attributes':
    for name, body in _entries(lines):
      first, *rest = _entry_body(body)
      out += [f'  * ``{name.strip("`")}`` -- {first.strip()}', *(f'  {line}' for line in rest), '']
    return [':Attributes:', *out]
  for name, body in _entries(lines):
    text = _entry_body(body)
    first, *others = map(_bare, re.split(r',\s*', name))
    out += [f':{FIELDS[section].format(first)}:', *text]
    out += [f':{FIELDS[section].format(other)}: see \\ ``{first}``' for other in others]
  return out


def _bare(name: str) -> str:
  """Returns a name as fields take it, with * escaped."""
  return name.strip().strip('`').replace('*', '\\*')


def _entries(lines: list[str]) -> list[tuple[str, list[str]]]:
  """Splits a section into entries: a name, and its text with the indented lines below."""
  found: list[tuple[str, list[str]]] = []
  for line in lines:
    match = re.match(r'([\w*`, .]+): (.*)$', line)
    if match and _indent(line) == 0:
      found.append((match[1], [match[2]]))
    elif found:
      found[-1][1].append(line)
    elif line.strip():
      found.append(('…', [line]))
  return found


def _entry_body(lines: list[str]) -> list[str]:
  """Converts the text of an entry, whose first line has no indentation."""
  first, *rest = lines
  width = min((_indent(line) for line in rest if line.strip()), default=0)
  return [f'  {line}'.rstrip() for line in converted([first, *(line[width:] for line in rest)])]


class Door(Directive):
  """Documents the public names of a room: `{door} opq_jax.encoders`."""

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    _learn_places()
    room = self.arguments[0]
    lines: list[str] = []
    module = importlib.import_module(room)
    lines += [*converted((inspect.getdoc(module) or '').splitlines()), '']
    elsewhere = []
    for name in public_names(room):
      place = _PLACES[f'{room}.{name}']
      if place != f'{room}.{name}':
        elsewhere.append(f':py:obj:`{name} <{place}>`')
        continue
      thing = getattr(module, name)
      kind = 'class' if inspect.isclass(thing) else 'function' if callable(thing) else 'data'
      if inspect.isclass(thing) and issubclass(thing, BaseException):
        kind = 'exception'
      lines.append(f'.. auto{kind}:: {place}')
      if kind == 'class' and name in ('OpqFile',):
        lines += ['   :members:']
      lines.append('')
    if elsewhere:
      lines += [f'Also public here, and described elsewhere: {", ".join(elsewhere)}.', '']
    container = nodes.section()
    container.document = self.state.document
    self.state.nested_parse(StringList(lines, f'<door {room}>'), self.content_offset, container)
    return container.children


class CommandHelp(Directive):
  """Shows the help texts of `opq` and of its commands."""

  def run(self) -> list[nodes.Node]:
    found: list[nodes.Node] = []
    text = _help([])
    listed = text.partition('\ncommands:')[2].partition('\n\n')[0]
    for command in ['', *re.findall(r'^    (\w+)(?: |$)', listed, re.MULTILINE)]:
      title = f'opq {command}'.strip()
      section = nodes.section(ids=[nodes.make_id(title)])
      section += nodes.title(text=title)
      section += nodes.literal_block(text=_help([command] if command else []), language='text')
      self.state.document.note_explicit_target(section)
      found.append(section)
    return found


def _help(arguments: list[str]) -> str:
  from opq_jax import cli

  text = io.StringIO()
  with contextlib.redirect_stdout(text), unittest.mock.patch.dict(os.environ, COLUMNS='96'):
    cli.main([*arguments, '--help'])
  return text.getvalue().strip()


def _process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
  _learn_places()
  if what == 'data' and (type(thing).__doc__ or '').split() == ' '.join(lines).split():
    lines.clear()  # the docstring of float, say
  lines[:] = converted(lines)


def setup(app: Any) -> dict[str, Any]:
  app.connect('autodoc-process-docstring', _process, priority=400)
  app.add_directive('door', Door)
  app.add_directive('command-help', CommandHelp)
  return {'parallel_read_safe': True}
