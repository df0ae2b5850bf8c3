"""`opq verify`: a file against the weights that it was made of."""

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

_MAX_PROBLEMS = 20  # lines on stderr; more would hide the first


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `opq verify`."""
  parser.add_argument('file', metavar='FILE', help='an .opq file')
  parser.add_argument(
    '--against',
    metavar='WEIGHTS',
    required=True,
    help='the original weights: a file, a model folder, or the folder of an Orbax checkpoint',
  )
  parser.add_argument(
    '--images',
    metavar='FOLDER',
    help='the images of a file that was made with --images',
  )
  parser.add_argument(
    '--json',
    action='store_true',
    help='print the verdict, problems and leaves as JSON, for programs',
  )


def run(arguments: argparse.Namespace) -> int:
  """Prints what holds and what does not; returns the exit code."""
  from rich.text import Text

  from opq_jax.cli.console import complain, console
  from opq_jax.cli.encoding import Encoding, channel_axis, lacks_optimizer
  from opq_jax.cli.folders import carried_problems
  from opq_jax.cli.json_reports import verification_as_json
  from opq_jax.cli.optimizers import report_without_optimizer
  from opq_jax.cli.recomputation import recomputed
  from opq_jax.cli.stages import timed_stages
  from opq_jax.cli.targets import target_problems
  from opq_jax.file.reader import OpqFile
  from opq_jax.report import four_sizes, verify

  path, against = arguments.file, arguments.against
  stdout = console(sys.stdout)
  with OpqFile(path) as file, contextlib.ExitStack() as scratch:
    metadata = file.metadata
    counts = {name: file.slices(name) for name in file}
    with timed_stages(stdout, has_times=False) as stage:
      with stage('read and recompute'):
        expected = recomputed(path, file, against, arguments.images, scratch)
      with stage('verify') as told:
        verified = verify(
          path,
          expected.params,
          coded=expected.coded,
          corrected=expected.corrected,
          channel_axis=channel_axis(metadata, lambda name, _: counts.get(name, 0)),
          told=lambda done, total: told(done / max(total, 1)),
        )
  if verified.report is not None and lacks_optimizer(metadata):
    report = report_without_optimizer(verified.report)
    verified = dataclasses.replace(verified, report=report)
  problems = (
    *verified.problems,
    *carried_problems(path, against),
    *target_problems(Encoding.of(metadata), verified.compressed, verified.report),
  )
  verified = dataclasses.replace(verified, problems=problems)
  if arguments.json:
    content: dict[str, Any] = verification_as_json(path, against, metadata, verified)
    print(json.dumps(content, indent=2, allow_nan=False))
    return 0 if verified.holds else 1
  stdout.print(verified)
  if verified.report is not None:
    stdout.print(four_sizes(verified.report))
  if verified.holds:
    stdout.print(Text(f'{path}: every claim holds against {against}'))
    return 0
  for problem in verified.problems[:_MAX_PROBLEMS]:
    complain(problem)
  more = len(verified.problems) - _MAX_PROBLEMS
  complain(
    f'{path} does not hold what it claims'
    + (f'; {more} more problems like these' if more > 0 else '')
  )
  return 1
