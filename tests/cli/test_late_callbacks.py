"""What is said of callbacks that come too late."""

import sys
import types

from opq_jax.cli import late_callbacks


def test_ignore(monkeypatch):
  said = []
  monkeypatch.setattr(sys, 'unraisablehook', said.append)
  late_callbacks.ignore()
  hook = sys.unraisablehook
  late_callbacks.ignore()
  assert sys.unraisablehook is hook
  others = RuntimeError('another'), ValueError('Event loop is closed')
  for error in (RuntimeError('Event loop is closed'), *others):
    fields = {'exc_type': type(error), 'exc_value': error, 'object': None}
    sys.unraisablehook(types.SimpleNamespace(**fields))
  assert [found.exc_value for found in said] == list(others)
