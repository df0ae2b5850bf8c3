"""Progress and wall clock of a command's stages."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  SpinnerColumn,
  TaskProgressColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.text import Text

from opq_jax.cli.console import complain, console

Stage = Callable[[str], contextlib.AbstractContextManager]
"""`with stage('read') as told: ...` runs a stage under that name; stages of one name add up.
`told(share)` says which share of it is done."""


_MINUTE = 60.0  # seconds between two lines where there is no terminal


class _Lines:
  """Says once a minute on stderr how far a task is, where no terminal shows it: in a log file.

  A thread of its own waits for the minute, because a task may be silent for longer.
  """

  def __init__(self, name: str):
    self._name, self._share, self._begin = name, 0.0, time.perf_counter()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> '_Lines':
    self._thread.start()
    return self

  def __exit__(self, *error: Any) -> None:
    self._ended.set()
    self._thread.join()

  def told(self, share: float) -> None:
    """Takes the share that is done."""
    self._share = share

  def _run(self) -> None:
    while not self._ended.wait(_MINUTE):
      share, seconds = self._share, time.perf_counter() - self._begin
      text = f'{self._name}: {_minutes(seconds)} so far'
      if 0 < share < 1:
        text += f', {share:.0%} done, about {_minutes(seconds / share * (1 - share))} left'
      complain(text, style='dim')


def _minutes(seconds: float) -> str:
  """Returns a duration in words.

  >>> _minutes(20), _minutes(200), _minutes(4000)
  ('20 s', '3 min', '1 h 07 min')
  """
  if seconds < 60:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02d} min'


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
      with contextlib.nullcontext() if stderr.is_terminal else _Lines(name) as lines:

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
  columns = (
    *(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn()),
    *(TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn()),
  )
  stderr = console(sys.stderr)
  with Progress(
    *columns, console=stderr, transient=True, disable=not stderr.is_terminal
  ) as progress:
    task = progress.add_task(name, total=None)
    with contextlib.nullcontext() if stderr.is_terminal else _Lines(name) as lines:

      def told(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        if lines is not None:
          lines.told(done / max(total, 1))

      yield told
