"""`opq card`: a model card of Hugging Face that describes a file."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq card`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    '--base', metavar='NAME', help='repository of the network that was compressed, OWNER/NAME'
  )
  parser.add_argument(
    '--out', metavar='PATH', help='where to write the card, replaced if it exists (default: stdout)'
  )


def run(arguments: argparse.Namespace) -> None:
  """Prints a model card, or writes it."""
  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.described import described
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.core import files
  from opq_jax.report import model_card

  source = Path(arguments.file)
  if arguments.out is None:
    print(model_card(described(source), base=arguments.base), end='')
    return
  output = output_path(arguments.out)
  check_output(source, output)
  files.write_bytes(output, model_card(described(source), base=arguments.base).encode())
  console(sys.stdout).print(Text(f'{output}: a model card of {source}'))
