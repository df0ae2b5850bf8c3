"""Texts of warnings and errors, and warnings that name the line of the user's own code."""

import collections
import contextlib
import contextvars
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_collected: contextvars.ContextVar[list[Warning] | None] = contextvars.ContextVar(
  'collected', default=None
)


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
  """Issues a warning that points at the first caller outside of the library.

  Inside of `collected` it is kept instead.  A fixed `stacklevel` would not do: the same warning is
  reached through calls of several depths.

  Args:
    message: its text, or a warning that was recorded before and is issued anew.
    category: its class; that of `message` where this is a warning itself.

  >>> with warnings.catch_warnings(record=True) as caught:
  ...   warnings.simplefilter('always')
  ...   warn('three leaves are pruned')
  >>> str(caught[0].message)
  'three leaves are pruned'
  """
  found = _collected.get()
  if found is not None:
    found.append(message if isinstance(message, Warning) else category(message))
    return
  frame, depth = sys._getframe(1), 2
  while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_LIBRARY):
    frame, depth = frame.f_back, depth + 1
  warnings.warn(message, category, stacklevel=depth)


@contextlib.contextmanager
def collected() -> Iterator[list[Warning]]:
  """Keeps the warnings of `warn` in a list, for a search that issues those of its last trial alone.

  It keeps what its own thread warns of.  `warnings.catch_warnings` would replace a function of the
  whole process: of two threads that do so in turn, one may leave the process without warnings.

  >>> with collected() as found:
  ...   warn('three leaves are pruned')
  >>> found
  [UserWarning('three leaves are pruned')]
  """
  found: list[Warning] = []
  outer = _collected.set(found)
  try:
    yield found
  finally:
    _collected.reset(outer)


def listed(names: Iterable[str], most: int = 10) -> str:
  """Returns the first names, and how many more there are.

  Where there are more than `most`, those that differ in one number are written as one.

  >>> listed(['a', 'b', 'c'], most=2)
  'a, b and 1 more'
  >>> listed(['h.0.w', 'h.0.b', 'h.1.w', 'h.2.w', 'h.5.w', 'h.5.b', 'z'], most=3)
  'h.{0-2,5}.w, h.{0,5}.b, z'
  """
  names = list(dict.fromkeys(names))
  groups = [[name] for name in names] if len(names) <= most else _groups(names)
  left = sum(map(len, groups[most:]))
  more = f' and {left:,} more' if left else ''
  return ', '.join(map(_in_one, groups[:most])) + more


_NUMBER = re.compile(r'(\d+)')


def _groups(names: Sequence[str]) -> list[list[str]]:
  """Groups names that differ in one number, in the order of the first of each group."""
  counts = collections.Counter(pattern for name in names for pattern in _patterns(name))
  groups: dict[tuple[str, ...], list[str]] = {}
  for name in names:
    # each name joins the names of its most common pattern
    groups.setdefault(max(_patterns(name), key=counts.__getitem__), []).append(name)
  return list(groups.values())


def _patterns(name: str) -> list[tuple[str, ...]]:
  """Returns the words and numbers of a name, each time without another one of its numbers."""
  words = _NUMBER.split(name)
  return [(*words[:i], '', *words[i + 1 :]) for i in range(1, len(words), 2)] or [(name,)]


def _in_one(names: Sequence[str]) -> str:
  """Returns names that differ in one number as one: a.{0-2,5}.b."""
  if len(names) == 1:
    return names[0]
  words = [_NUMBER.split(name) for name in names]
  (place,) = (i for i, each in enumerate(zip(*words, strict=True)) if len(set(each)) > 1)
  numbers = sorted({each[place] for each in words}, key=int)
  ranges: list[list[str]] = []
  for number in numbers:
    if ranges and int(number) == int(ranges[-1][-1]) + 1:
      ranges[-1].append(number)
    else:
      ranges.append([number])
  parts = ['-'.join([run[0], run[-1]]) if len(run) > 2 else ','.join(run) for run in ranges]
  return ''.join([*words[0][:place], '{', ','.join(parts), '}', *words[0][place + 1 :]])


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
  """Returns an indented line for every name at which two mappings differ, sorted by name.

  >>> differences({'a': (2,), 'b': (3,)}, {'a': (2,), 'c': (4,)})
  ['  b: found (3,), expected nothing', '  c: found nothing, expected (4,)']
  """
  return [
    f'  {name}: found {found.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
    for name in sorted(found.keys() | expected.keys())
    if found.get(name) != expected.get(name)
  ]
