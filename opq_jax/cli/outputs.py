"""Checks of the place that a command writes to."""

import os
from pathlib import Path

from opq_jax.core import files


def output_path(text: str) -> Path:
  """Returns the path of an output file, as it was typed.

  Raises:
    ValueError: it is `-`, or the name of a folder.
  """
  if text == '-':
    raise ValueError("found '-' for the output, expected the name of a file")
  if text.endswith(('/', os.sep)):
    raise ValueError(f'{text}: found the name of a folder, expected that of a file')
  return Path(text)


def check_output(source: Path, output: Path) -> None:
  """Checks the output path before any work is done.

  Raises:
    ValueError: its folder is missing, it is a folder or a device, or it is the input itself, or a
      file of a folder that is the input; an .opq file there may be replaced.
  """
  files.file_place(output)
  if not output.parent.is_dir():
    raise ValueError(f'{output}: found no folder {output.parent}, expected one')
  if output.is_dir():
    raise ValueError(f'{output}: found a folder, expected the name of a file')
  if output.exists() and source.exists() and output.samefile(source):
    raise ValueError(f'{output}: found the input itself, expected another file for the output')
  is_within = Path(os.path.realpath(source)) in Path(os.path.realpath(output)).parents
  if is_within and output.exists() and output.suffix.lower() != '.opq':
    raise ValueError(f'{output}: found a file of the input, expected another one for the output')


def check_new_folder(output: Path) -> None:
  """Checks the path of a new folder before any work is done.

  Raises:
    ValueError: the folder above is missing, or something is there already.
  """
  if not output.parent.is_dir():
    raise ValueError(f'{output}: found no folder {output.parent}, expected one')
  files.check_free(output)
