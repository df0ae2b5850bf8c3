"""`opq report`: one HTML page that shows a file, or two side by side."""

import argparse
import os
import sys
from pathlib import Path

_SUFFIXES = '.html', '.htm'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq report`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    'other', metavar='OTHER', nargs='?', help='a second .opq file, compared with FILE leaf by leaf'
  )
  parser.add_argument('output', metavar='OUT', help='the .html page, replaced if it exists')


def run(arguments: argparse.Namespace) -> None:
  """Writes the page of one file or two."""
  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.described import described
  from opq_jax.cli.outputs import check_output, output_path
  from opq_jax.core import files
  from opq_jax.report import html_page

  sources = [Path(name) for name in (arguments.file, arguments.other) if name is not None]
  output = output_path(arguments.output)
  for source in sources:
    check_output(source, output)
  # of two files and no page, the second would be replaced
  if output.suffix.lower() not in _SUFFIXES:
    raise ValueError(f'{output}: found no name of a page, expected one that ends in .html')
  files.write_bytes(output, html_page(*map(described, sources)).encode())
  size = os.stat(output).st_size
  console(sys.stdout).print(Text(f'{output}: {size:,} bytes, opens in any browser'))
