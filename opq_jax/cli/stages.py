"""Progress and wall clock of a command's stages."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
  Progress,
  SpinnerColumn,
  TaskProgressColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.text import Text

from opq_jax.cli.console import complain, console
from opq_jax.report.progress_bars import Lines, shown

Stage = Callable[[str], contextlib.AbstractContextManager]
"""`with stage('read') as told: ...` runs a stage under that name; stages of one name add up.
`told(share)` says which share of it is done."""


@contextlib.contextmanager
def timed_stages(stdout: Console, has_times: bool = True) -> Iterator[Stage]:
  """Shows progress on stderr while stages run, and prints one line of their times at the end.

  Where stderr is no terminal, a line a minute says how far a stage is.

  Args:
    stdout: where the line goes.
    has_times: whether it is printed.
  """
  times: dict[str, float] = {}
  columns = (
    *(SpinnerColumn(), TextColumn('{task.description}'), TaskProgressColumn()),
    *(TimeElapsedColumn(), TimeRemainingColumn()),
  )
  stderr = console(sys.stderr)
  # even a transient display leaves a blank line in a file
  with Progress(
    *columns, console=stderr, transient=True, disable=not stderr.is_terminal
  ) as progress:

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[Callable[[float], None]]:
      task, begin = progress.add_task(name, total=1), time.perf_counter()
      with contextlib.nullcontext() if stderr.is_terminal else Lines(name, _say) as lines:

        def told(share: float) -> None:
          progress.update(task, completed=share)
          if lines is not None:
            lines.told(share)

        yield told
      progress.update(task, completed=1)
      times[name] = times.get(name, 0) + time.perf_counter() - begin

    yield stage
  if not has_times:
    return
  lines = [f'{name} {seconds:.1f} s' for name, seconds in times.items()]
  stdout.print(Text(', '.join(lines), style='dim'))


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
  """Gives a function of how much is done and how much there is, shown on stderr with time left.

  Where stderr is no terminal, a line a minute says it.
  """
  with shown(name, console(sys.stderr), _say) as told:
    yield told


def _say(text: str) -> None:
  complain(text, style='dim')
