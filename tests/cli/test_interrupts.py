"""Ctrl-C: one line, exit code 130 and nothing left behind, at every moment of a run."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from opq_jax.cli import interrupts
from tests.helpers import processes

# what a process does to interrupt itself in the middle of something, before it runs the command
MOMENTS = {
  'in an import that swallows it': """
    import importlib.abc

    class Finder(importlib.abc.MetaPathFinder):
      def find_spec(self, name, *_):
        if name == 'ml_dtypes':
          try:
            interrupt()
            time.sleep(60)
          except BaseException:
            pass

    sys.meta_path.insert(0, Finder())
  """,
  'in a destructor, which drops it': """
    import importlib.abc

    class Dropped:
      def __del__(self):
        interrupt()
        time.sleep(60)

    class Finder(importlib.abc.MetaPathFinder):
      def find_spec(self, name, *_):
        if name == 'ml_dtypes':
          Dropped()

    sys.meta_path.insert(0, Finder())
  """,
  'while XLA compiles': """
    import jax
    from jax._src import compiler

    before = compiler.backend_compile_and_load

    def compile(*arguments, **options):
      interrupt()
      found = before(*arguments, **options)
      time.sleep(60)
      return found

    compiler.backend_compile_and_load = compile
  """,
  'while the file is written': """
    import opq_jax.core.files as files

    def fsync(file):
      interrupt()
      time.sleep(60)

    files.os = type('os', (), {**vars(os), 'fsync': staticmethod(fsync)})
  """,
}

SCRIPT = """
import os, signal, sys, threading, time

# a shell makes jobs in its background ignore it, and these tests may run in one
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt():
  os.kill(os.getpid(), signal.SIGINT)
{moment}
from opq_jax.cli.command import run_process

sys.argv = ['opq', 'compress', 'net.npz', 'net.opq']
sys.exit(run_process())
"""


@pytest.mark.parametrize('moment', MOMENTS.values(), ids=MOMENTS)
def test_interrupted_at_every_moment(tmp_path, moment):
  np.savez(tmp_path / 'net.npz', w=np.random.default_rng(0).normal(size=(64, 64)).astype('f4'))
  (tmp_path / 'net.opq').write_bytes(b'old')
  (tmp_path / 'cache').mkdir()
  script = SCRIPT.format(moment=textwrap.dedent(moment))
  environment = processes.environment(is_killed=True) | {'OPQ_JAX_CACHE': str(tmp_path / 'cache')}
  # the cache of the tests would be chosen before that of the command
  environment = {k: v for k, v in environment.items() if not k.startswith('JAX_COMPILATION')}
  found = subprocess.run(
    [sys.executable, '-c', script],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert (found.returncode, found.stderr) == (130, 'opq: interrupted\n')
  assert (tmp_path / 'net.opq').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['cache', 'net.npz', 'net.opq']
  assert not list((tmp_path / 'cache').glob('*/run_*'))


def test_jobs_that_ignore_interrupts_go_on(monkeypatch):
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    interrupts.exit_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
