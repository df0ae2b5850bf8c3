"""`opq compress` of a tree that need not fit into memory."""

import argparse
import sys
from pathlib import Path

import jax
from rich.text import Text

from opq_jax.cli.console import collected_warnings, console, note
from opq_jax.cli.encoding import Encoding, channel_axis
from opq_jax.cli.leaves import chosen_paths
from opq_jax.cli.stages import timed_stages
from opq_jax.core import trees
from opq_jax.report import four_sizes, summary
from opq_jax.weights import compress_stored, open_weights


def compress(arguments: argparse.Namespace, plan: Encoding, about: dict[str, str]) -> None:
  """Reads, encodes and writes one leaf after the other, and prints the table of the whole.

  Args:
    arguments: of `opq compress`.
    plan: targets, objective and channel axis.
    about: further metadata of the file.
  """
  source, output = Path(arguments.input), Path(arguments.output)
  metadata = plan.metadata()
  stdout = console(sys.stdout)
  tree = open_weights(source)
  chosen = chosen_paths(tree, arguments.include, arguments.exclude)
  leaves = [
    leaf.narrowed() if name in chosen else leaf for name, leaf in trees.named_leaves(tree).items()
  ]
  tree = jax.tree.unflatten(jax.tree.structure(tree), leaves)
  with timed_stages(stdout) as stage, collected_warnings() as notes:
    done = compress_stored(
      tree,
      output,
      compressible=lambda path, _: path in chosen,
      channel_axis=channel_axis(metadata),
      metadata=about | metadata,
      contexts=not arguments.fast,
      objective=plan.objective,
      stage=stage,
      **plan.targets,
    )
  for text in notes:
    note(text)
  report = done.report
  stdout.print(summary(tree, done.allocation), four_sizes(report))
  stdout.print(Text(f'{output}: {report.file:,} bytes, {report.file_rate:.2f} times smaller'))
