"""Starts processes of Python, and ends those that take too long."""

import atexit
import contextlib
import functools
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

from tests.helpers import programs

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 300  # seconds that a process may take, on a machine that has much else to do


def environment(
  devices: int | None = None, is_killed: bool = False, has_torch: bool = True
) -> dict[str, str]:
  """Returns the variables of a process with so many devices.

  One that is to be killed reads compiled programs and writes none.  tensorboardX imports PyTorch
  wherever it is installed, which takes longer than all other imports: `has_torch=False` hides it.
  """
  variables = {**os.environ}
  if is_killed:
    variables |= programs.READ_ONLY
  hidden = [] if has_torch else [_without_torch()]
  variables['PYTHONPATH'] = os.pathsep.join([*hidden, str(ROOT), os.environ.get('PYTHONPATH', '')])
  if devices is not None:
    variables['JAX_NUM_CPU_DEVICES'] = str(devices)
  return variables


@functools.cache
def _without_torch() -> str:
  """Returns a folder whose PyTorch cannot be imported; removed at the end of this process."""
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  (pathlib.Path(folder) / 'torch.py').write_text("raise ImportError('hidden by a test')\n")
  return folder


class Process(subprocess.Popen):
  """A process that prints to a pipe, and complains into a file, which is never full."""

  def __init__(self, arguments: list[str], **options: object):
    self.complaints = tempfile.TemporaryFile('w+')  # noqa: SIM115 - closed in __exit__
    super().__init__(
      arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.complaints, text=True, **options
    )

  def __exit__(self, *exception: object) -> None:
    super().__exit__(*exception)
    self.complaints.close()

  def finish(self, timeout: float = TIMEOUT) -> str:
    """Waits for an exit with 0; returns what was printed and nobody read yet."""
    with self, self.deadline(timeout):
      output = self.stdout.read()
      assert self.wait() == 0, self.complaint()
    return output

  def wait_for_line(self, number: int = 0) -> None:
    """Waits until a line is a whole number of at least `number`."""
    with self.deadline():
      for line in self.stdout:
        # libraries may print something of their own
        if line.strip().isdigit() and int(line) >= number:
          return
    raise AssertionError(f'found no line with {number} or more: {self.complaint()}')

  def complaint(self) -> str:
    """Returns the end of what it wrote to stderr."""
    self.complaints.seek(0)
    return self.complaints.read()[-10_000:]

  @contextlib.contextmanager
  def deadline(self, seconds: float = TIMEOUT) -> Iterator[None]:
    """Kills the process after so many seconds, which ends its output."""
    timer = threading.Timer(seconds, self.kill)
    timer.start()
    try:
      yield
    finally:
      timer.cancel()


def start(*arguments: object, **options: object) -> Process:
  """Starts `python ARGUMENTS...`, with the options of `environment`."""
  return Process([sys.executable, *map(str, arguments)], env=environment(**options))


def free_port() -> int:
  """Returns a port that nobody listens on."""
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]
