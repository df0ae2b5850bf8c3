"""Warnings that name the line of the user's own code that led to them."""

import os
import sys
import warnings

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
