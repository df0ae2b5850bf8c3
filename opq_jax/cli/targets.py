"""Targets as the metadata of a file say them."""

from collections.abc import Mapping


def targets_text(targets: Mapping[str, float]) -> str:
  """Returns the targets in one line.

  >>> targets_text({'sparsity': 0.5, 'bits': 3.0})
  'sparsity=0.5 bits=3'
  """
  return ' '.join(f'{name}={_number(value)}' for name, value in targets.items())


def _number(value: float) -> str:
  """Returns the shortest text that parses back to the same float."""
  short = f'{value:g}'
  return short if float(short) == value else repr(value)
