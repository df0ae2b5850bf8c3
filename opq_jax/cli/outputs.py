"""Checks of the place that a command writes to."""

from pathlib import Path


def check_output(source: Path, output: Path) -> None:
  """Checks the output path before any work is done.

  Raises:
    ValueError: its folder is missing, it is a folder, or it is the input itself.
  """
  if not output.parent.is_dir():
    raise ValueError(f'{output}: found no folder {output.parent}, expected one')
  if output.is_dir():
    raise ValueError(f'{output}: found a folder, expected the name of a file')
  if output.exists() and source.exists() and output.samefile(source):
    raise ValueError(f'{output}: found the input itself, expected another file for the output')
