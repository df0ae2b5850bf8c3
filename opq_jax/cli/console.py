"""Consoles, one-line messages on stderr, and warnings as such messages."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from opq_jax.report import tables

_LEFT_OUT = (
  'the Laplace density',
  'Error reading persistent compilation cache',
  'Error writing persistent compilation cache',
)


class _Console(Console):
  """A console whose texts hold no control characters but the ends of lines.

  Names of files and leaves are untrusted.  Errors name their stream: of a full disk behind it, say.
  """

  def print(self, *objects: Any, **options: Any) -> None:
    """Prints as rich does, texts with their control characters escaped.

    Raises:
      OSError: the stream cannot be written.
    """
    try:
      super().print(*map(_shown, objects), **options)
      self.file.flush()
    except BrokenPipeError:  # whoever reads the stream has seen enough
      raise
    except OSError as error:
      name = 'standard error' if self.file is sys.stderr else 'standard output'
      raise OSError(error.errno, error.strerror, name) from error


def _shown(printed: Any) -> Any:
  if not isinstance(printed, Text):
    return printed
  return Text('\n'.join(map(tables.visible, printed.plain.split('\n'))), style=printed.style)


def console(stream: Any) -> Console:
  """A console on a stream; one that is no terminal is as wide as the tables need."""
  return _Console(file=stream, width=None if stream.isatty() else tables.WIDTH)


def complain(text: str, style: str = 'red') -> None:
  """Prints one line on stderr."""
  line = ' '.join(text.split())
  console(sys.stderr).print(Text(f'opq: {line}', style=style), soft_wrap=True)


def note(text: str) -> None:
  """Prints one line on stderr about a result that differs from what was asked."""
  complain(f'note: {text}', style='yellow')


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
  """Collects the texts of UserWarnings, each once, into the list that it gives.

  Left out are warnings about the fit of the Laplace density, because the table marks such leaves,
  and about kept programs that JAX could not read or write, because it then compiles them.  Warnings
  of other libraries are collected too.  `warnings.catch_warnings` acts on the whole process, so
  only one of its threads may run a command.
  """
  texts: list[str] = []
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', UserWarning)
    yield texts
  messages = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
  texts += dict.fromkeys(text for text in messages if not text.startswith(_LEFT_OUT))
