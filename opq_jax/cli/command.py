"""Parses the command line, runs one command and turns its errors into exit codes.

A command is a module of its own name in this package, with `add_arguments(parser)` and
`run(arguments)`.  It is imported when it is asked for, and imports what it needs when it runs, so
that a command pays for nothing that it does not use.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import opq_jax
from opq_jax.cli import help_texts, interrupts, late_callbacks


class _Command(NamedTuple):
  """How a command is listed and described, and whether it compiles programs."""

  short: str
  about: str
  examples: str
  compiles: bool = True


_COMMANDS = {
  'compress': _Command(
    'write weights as an .opq file', help_texts.COMPRESS, help_texts.COMPRESS_EXAMPLES
  ),
  'inspect': _Command(
    'show the contents of an .opq file',
    help_texts.INSPECT,
    help_texts.INSPECT_EXAMPLES,
    compiles=False,
  ),
  'report': _Command(
    'write a page that shows an .opq file, or two',
    help_texts.REPORT,
    help_texts.REPORT_EXAMPLES,
    compiles=False,
  ),
  'card': _Command(
    'write a model card of an .opq file',
    help_texts.CARD,
    help_texts.CARD_EXAMPLES,
    compiles=False,
  ),
  'verify': _Command(
    'check an .opq file against its original weights',
    help_texts.VERIFY,
    help_texts.VERIFY_EXAMPLES,
  ),
  'decompress': _Command(
    'write an .opq file as plain arrays',
    help_texts.DECOMPRESS,
    help_texts.DECOMPRESS_EXAMPLES,
    compiles=False,
  ),
  'export': _Command(
    'write an .opq file for another runtime',
    help_texts.EXPORT,
    help_texts.EXPORT_EXAMPLES,
    compiles=False,
  ),
  'evaluate': _Command(
    'perplexity of a language model on a text, and KL against another',
    help_texts.EVALUATE,
    help_texts.EVALUATE_EXAMPLES,
  ),
  'generate': _Command(
    'let a language model write', help_texts.GENERATE, help_texts.GENERATE_EXAMPLES
  ),
  'demo': _Command(
    'train, compress and evaluate a small network', help_texts.DEMO, help_texts.DEMO_EXAMPLES
  ),
}


def run_process() -> int:
  """Runs the command of this process, which keeps its compiled programs for the next one."""
  interrupts.exit_on_interrupt()
  with contextlib.ExitStack() as stack:
    for name in ('stdout', 'stderr'):
      if getattr(sys, name) is None:  # closed by who has started the process: `opq ... >&-`
        setattr(sys, name, stack.enter_context(open(os.devnull, 'w')))
    return main(keep_programs=True)


def main(argv: Sequence[str] | None = None, *, keep_programs: bool = False) -> int:
  """Runs a command.

  Args:
    argv: its arguments; by default those of the process.
    keep_programs: whether JAX keeps its compiled programs on disk (`program_cache`) from now on,
      for a process that does nothing else.

  Returns:
    The exit code.  0: success.  2: an argument, an input or an output is at fault; one line on
    stderr says which, and nothing was written.  1: a file does not hold what it claims, or the
    reader of stdout has closed it.  Ctrl-C ends a process of `run_process` with 130.
  """
  try:
    arguments = _parser().parse_args(argv)
  except SystemExit as exit_:
    return int(exit_.code or 0)
  late_callbacks.ignore()
  try:
    with contextlib.ExitStack() as stack:
      if keep_programs and _COMMANDS[arguments.command].compiles:
        from opq_jax.cli.program_cache import kept_programs

        stack.enter_context(kept_programs())
      code = _module(arguments.command).run(arguments)
    sys.stdout.flush()
  except BrokenPipeError:
    # `opq inspect net.opq | head`: Python would report the closed pipe once more at its exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError) as error:
    from opq_jax.cli import console

    console.complain(_message(error))
    return 2
  return code or 0


def _module(command: str) -> Any:
  return importlib.import_module(f'opq_jax.cli.{command}')


class _CommandParser(argparse.ArgumentParser):
  """The parser of one command, which takes its arguments from the command's module when used."""

  def __init__(self, command: str | None = None, **options: Any):
    super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter)
    self._command = command

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    if self._command is not None:
      _module(self._command).add_arguments(self)
    return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
  parser = _CommandParser(prog='opq', description=help_texts.OPQ, epilog=help_texts.OPQ_EXAMPLES)
  parser.add_argument('--version', action='version', version=f'opq_jax {opq_jax.__version__}')
  commands: Any = parser.add_subparsers(
    title='commands', metavar='COMMAND', dest='command', required=True
  )
  for name, command in _COMMANDS.items():
    commands.add_parser(
      name,
      command=name,
      help=command.short,
      description=command.about,
      epilog=command.examples,
    )
  return parser


def _message(error: ValueError | OSError) -> str:
  message = str(error)
  if not isinstance(error, OSError):
    return message
  if error.filename is not None:
    message = f'{os.fspath(error.filename)}: {error.strerror}'
  # of `opq_jax.weights.work_folder`; JAX adds notes about tracebacks to other errors
  return '; '.join([message, *getattr(error, '__notes__', ())])
