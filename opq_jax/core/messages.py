"""Texts of warnings and errors, and warnings that name the line of the user's own code."""

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
  """Issues a warning that points at the first caller outside of the library.

  A fixed `stacklevel` would not do: the same warning is reached through calls of several depths.

  Args:
    message: its text, or a warning that was recorded before and is issued anew.
    category: its class; that of `message` where this is a warning itself.

  >>> with warnings.catch_warnings(record=True) as caught:
  ...   warnings.simplefilter('always')
  ...   warn('three leaves are pruned')
  >>> str(caught[0].message)
  'three leaves are pruned'
  """
  frame, depth = sys._getframe(1), 2
  while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_LIBRARY):
    frame, depth = frame.f_back, depth + 1
  warnings.warn(message, category, stacklevel=depth)


def listed(names: Iterable[str], most: int = 10) -> str:
  """Returns the first names, and how many more there are.

  >>> listed(['a', 'b', 'c'], most=2)
  'a, b and 1 more'
  """
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


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
