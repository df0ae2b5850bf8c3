"""What `opq compress` prints of a file that it has written."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from rich.text import Text

from opq_jax.allocation import Allocation
from opq_jax.cli.console import console
from opq_jax.cli.json_reports import sizes_as_json
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.report import SizeReport, four_sizes, summary


def print_result(
  arguments: argparse.Namespace,
  tree: PyTree,
  allocation: Allocation,
  report: SizeReport,
  metadata: Mapping[str, str],
  side_files: Mapping[str, bytes],
  lines: Sequence[str] = (),
) -> None:
  """Prints tables and lines, or JSON where it was asked for.

  Args:
    arguments: of `opq compress`.
    tree: the weights.
    allocation: how they were compressed.
    report: the sizes of the file.
    metadata: of the file.
    side_files: the contents of its side files by name.
    lines: more about the network.
  """
  output = arguments.output
  if arguments.json:
    sizes = {name: len(side_files[name]) for name in sorted(side_files)}
    names = [*trees.named_leaves(tree)]
    print(json.dumps(sizes_as_json(output, metadata, report, names, sizes), indent=2))
    return
  stdout = console(sys.stdout)
  stdout.print(summary(tree, allocation), four_sizes(report))
  for line in lines:
    stdout.print(Text(line))
  stdout.print(Text(f'{output}: {report.file:,} bytes, {report.file_rate:.2f} times smaller'))
