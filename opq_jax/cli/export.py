"""`opq export`: a compressed network for another runtime."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from opq_jax.export import ExportedModel


_SUFFIXES = '.onnx', '.mlpackage'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq export`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    'output',
    metavar='OUT',
    help='the .onnx file, replaced if it exists; or the new .mlpackage',
  )
  parser.add_argument(
    '--into',
    metavar='NET',
    required=True,
    help='the ONNX file or Core ML package of the float network, whose tensors have the names of '
    'the leaves',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the network, and says what became of every leaf that is not in indices."""
  from opq_jax.export import write_core_ml, write_onnx
  from opq_jax.file.reader import OpqFile

  source, into = Path(arguments.file), Path(arguments.into)
  output = _checked_output(arguments.output, source, into)
  with OpqFile(source) as file:
    if output.suffix.lower() == '.onnx':
      written, size = write_onnx(output, file, into), os.stat(into).st_size
    else:
      written = write_core_ml(output, file, into)
      size = sum(part.stat().st_size for part in into.rglob('*') if part.is_file())
  print_notes(written, source, into)
  _print_sizes(written, output, size)


def _checked_output(text: str, source: Path, into: Path) -> Path:
  """Returns the path of OUT, checked before any work is done.

  Raises:
    ValueError: its suffix is none of those that are written, or not that of NET, or its place is
      not free.
  """
  from opq_jax.cli.outputs import check_new_folder, check_output, output_path

  is_package = Path(text).suffix.lower() == '.mlpackage'
  output = Path(text) if is_package else output_path(text)
  suffix = output.suffix.lower()
  if suffix not in _SUFFIXES:
    raise ValueError(f'{output}: found suffix {suffix!r}, expected {" or ".join(_SUFFIXES)}')
  if into.suffix.lower() != suffix:
    raise ValueError(f'{into}: found suffix {into.suffix!r}, expected {suffix}, that of {output}')
  if is_package:
    check_new_folder(output)
  else:
    check_output(source, output)
    check_output(into, output)
  return output


def _print_sizes(written: 'ExportedModel', output: Path, size: int) -> None:
  """Prints sizes and forms."""
  import collections

  from rich.text import Text

  from opq_jax.cli.console import console

  forms = collections.Counter(leaf.form for leaf in written.leaves)
  counted = ', '.join(f'{number} as {form}' for form, number in forms.most_common())
  line = f'{output}: {written.size:,} bytes, of {size:,} ({counted})'
  console(sys.stdout).print(Text(line), soft_wrap=True)


def print_notes(written: 'ExportedModel', source: Path, into: Path) -> None:
  """Prints on stderr which leaves are floats and why, and which names only one file has."""
  from opq_jax.cli.console import note
  from opq_jax.core.messages import listed

  for reason in dict.fromkeys(leaf.reason for leaf in written.leaves if leaf.reason):
    leaves = [leaf for leaf in written.leaves if leaf.reason == reason]
    size, names = sum(leaf.bytes for leaf in leaves), listed(leaf.name for leaf in leaves)
    note(f'{size:,} bytes of floats, {reason}: {names}')
  left = f'weights of {into} are not in {source}, and stay, {sum(written.left.values()):,} bytes'
  for held, what in (
    (
      written.changed,
      f'leaves that are not compressed differ from those of {into}, and replace them',
    ),
    (written.without_place, f'leaves of {source} are no tensors of {into}'),
    (written.rounded, f'leaves of {source} are rounded to the dtype that they have in {into}'),
    (written.left, left),
  ):
    if held:
      note(f'{len(held)} {what}: {listed(held)}')
