"""Ctrl-C ends the command at once, at every moment: one line, exit code 130, nothing left behind.

Python's own answer is an exception in the main thread, wherever that is.  In an import it may be
caught as a failed import; in a destructor, a callback of a weak reference or one of C++ it is
printed and dropped; in the middle of XLA's compiling it waits; and on its way out the interpreter
tears down what threads of other libraries still use.  So there is no exception: the handler of the
system, which runs at once, wakes a thread that waits for it, removes the temporary files of this
process and ends it without any teardown.
"""

import contextlib
import os
import signal
import socket
import threading

from opq_jax.core import temporaries

EXIT_CODE = 128 + signal.SIGINT
"""130, as shells have it."""

_SHOW_CURSOR = b'\x1b[?25h\n'


def exit_on_interrupt() -> None:
  """Makes Ctrl-C end this process at once, from now on.

  Does nothing outside of the main thread, and where whoever has started the process wants it to
  ignore Ctrl-C (a job in the background of a script).
  """
  if threading.current_thread() is not threading.main_thread():
    return
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  threading.Thread(target=_wait, args=(reader, writer), name='interrupts', daemon=True).start()
  signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  # last: an interrupt before this line still ends the process, by the thread and by an exception
  signal.signal(signal.SIGINT, lambda *_: None)


def _wait(reader: socket.socket, writer: socket.socket) -> None:
  """Waits for the signal; keeps both ends open while it does."""
  while signal.SIGINT not in reader.recv(64):
    pass
  writer.detach()
  temporaries.remove_all()
  # the streams of Python may be locked by the main thread
  with contextlib.suppress(OSError):
    for stream in (1, 2):
      if os.isatty(stream):  # a bar of progress has hidden it
        os.write(stream, _SHOW_CURSOR)
    os.write(2, b'opq: interrupted\n')
  os._exit(EXIT_CODE)
