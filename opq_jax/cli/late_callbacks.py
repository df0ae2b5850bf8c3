"""Keeps quiet about callbacks that come after the event loop of Orbax has ended.

Orbax reads in an event loop.  Where a file is damaged it ends the loop at once, and the reads that
are still under way call back into it, from threads of C++: Python reports each of them with a
traceback on stderr, beside the one line that says what is wrong with the file.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

_MESSAGE = 'Event loop is closed'


def ignore() -> None:
  """Makes this process not report such callbacks, from now on: they come at any time."""
  before = sys.unraisablehook
  if not (isinstance(before, functools.partial) and before.func is _report):
    sys.unraisablehook = functools.partial(_report, before)


def _report(before: Callable[[Any], Any], found: Any) -> None:
  if not (found.exc_type is RuntimeError and str(found.exc_value) == _MESSAGE):
    before(found)
