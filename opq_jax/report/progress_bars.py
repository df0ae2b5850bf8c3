"""How far long work is: a bar with time left, or a line a minute where there is no terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

_MINUTE = 60.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
  """Gives a function of how many bytes are done and how many there are, shown on stderr.

  With the time that is left; where stderr is no terminal, a line a minute says it.

  Args:
    name: of the work.

  >>> import jax, numpy as np, opq_jax
  >>> params = {'kernel': jax.random.laplace(jax.random.key(0), (256, 64)), 'bias': np.zeros(64)}
  >>> network = opq_jax.compress(params, compression_rate=16.0)
  >>> with progress('serialize') as told:
  ...   data = opq_jax.file.serialize(network.params, network.state, told=told)
  """
  stderr = Console(file=sys.stderr)
  say = lambda line: stderr.print(line, soft_wrap=True, markup=False)
  with shown(name, stderr, say, DownloadColumn()) as told:
    yield told


@contextlib.contextmanager
def shown(
  name: str,
  stderr: Console,
  say: Callable[[str], None],
  numbers: ProgressColumn | None = None,
) -> Iterator[Callable[[int, int], None]]:
  """Does what `progress` does, on a console, or by `say` where the console is no terminal.

  Args:
    name: of the work.
    stderr: the console.
    say: takes a line.
    numbers: shows what is done of what there is; plain numbers by default.
  """
  columns = (
    *(TextColumn('{task.description}'), BarColumn(), numbers or MofNCompleteColumn()),
    *(TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn()),
  )
  # even a transient display leaves a blank line in a file
  with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
    task = bar.add_task(name, total=None)
    with contextlib.nullcontext() if stderr.is_terminal else Lines(name, say) as lines:

      def told(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if lines is not None:
          lines.told(done / max(total, 1))

      yield told


class Lines:
  """Says once a minute how far a task is, where no terminal shows it: in a log file.

  A thread of its own waits for the minute, because a task may be silent for longer.

  Args:
    name: of the task.
    say: takes one line.
  """

  def __init__(self, name: str, say: Callable[[str], None]):
    self._name, self._say = name, say
    self._share, self._begin = 0.0, time.perf_counter()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> 'Lines':
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
      self._say(text)


def _minutes(seconds: float) -> str:
  """Returns a duration in words.

  >>> _minutes(20), _minutes(200), _minutes(4000)
  ('20 s', '3 min', '1 h 07 min')
  """
  if seconds < 60:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02d} min'
