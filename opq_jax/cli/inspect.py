"""`opq inspect`: the leaves, the metadata and the four sizes of a file."""

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq inspect`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    '--json', action='store_true', help='print totals and leaves as JSON, for programs'
  )


def run(arguments: argparse.Namespace) -> None:
  """Prints a table of a file's leaves, or JSON."""
  from rich.text import Text

  from opq_jax.cli.console import console
  from opq_jax.cli.encoding import channel_axis, lacks_optimizer
  from opq_jax.cli.json_reports import sizes_as_json
  from opq_jax.file.reader import OpqFile
  from opq_jax.report import file_report, four_sizes, size_table

  with OpqFile(arguments.file) as file:
    metadata, side_files = file.metadata, file.side_files
    file.read_side_files()  # checked, as every leaf is by its report
    counts = {name: file.slices(name) for name in file}
  axis = channel_axis(metadata, lambda name, _: counts[name])
  report = file_report(arguments.file, channel_axis=axis)
  if lacks_optimizer(metadata):
    from opq_jax.cli.optimizers import report_without_optimizer

    report = report_without_optimizer(report)
  if arguments.json:
    sizes = sizes_as_json(arguments.file, metadata, report, [*counts], side_files)
    print(json.dumps(sizes, indent=2))
    return
  stdout = console(sys.stdout)
  stdout.print(size_table(report), four_sizes(report))
  for name, size in side_files.items():
    what = 'header of weights' if name.endswith('.safetensors') else 'side file'
    stdout.print(Text(f'{what} {name}: {size:,} bytes', style='dim'))
  for key, value in metadata.items():
    stdout.print(Text(f'{key}: {value}', style='dim'))
  stdout.print(Text(f'{arguments.file}: all {report.file:,} bytes read, all checksums hold'))
