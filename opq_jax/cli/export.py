"""`opq export`: a compressed network for another runtime."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from opq_jax.export import ExportedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq export`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument('output', metavar='OUT', help='the .onnx file; replaced if it exists')
  parser.add_argument(
    '--into',
    metavar='NET',
    required=True,
    help='the ONNX file of the float network, whose initializers have the names of the leaves',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the network, and says what became of every leaf that is not in indices."""
  import collections

  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.export import write_onnx
  from opq_jax.file.reader import OpqFile

  source, into = Path(arguments.file), Path(arguments.into)
  output = output_path(arguments.output)
  if output.suffix.lower() != '.onnx':
    raise ValueError(f'{output}: found suffix {output.suffix!r}, expected .onnx')
  check_output(source, output)
  check_output(into, output)
  with OpqFile(source) as file:
    written = write_onnx(output, file, into)
  print_notes(written, source, into)
  forms = collections.Counter(leaf.form for leaf in written.leaves)
  counted = ', '.join(f'{number} as {form}' for form, number in forms.most_common())
  line = f'{output}: {written.size:,} bytes, of {os.stat(into).st_size:,} ({counted})'
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
    (written.left, left),
  ):
    if held:
      note(f'{len(held)} {what}: {listed(held)}')
