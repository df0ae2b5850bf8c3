"""kill -9 at random moments of `opq compress` and of `opq_jax.save`: what lies there afterwards.

    python -m experiments.benchmarks.killed_writes [kills of each, by default 25]

A process writes one of two networks over the other, again and again, and is killed within its
first seconds of doing so.  Afterwards the place must hold one of the two, whole.  Parts that were
left beside it must be gone after the next write.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import safetensors.numpy

import opq_jax
from opq_jax import cli

RATES = 8, 12
COMMANDS = 'save', 'compress'


def main(count: int) -> None:
  from experiments.benchmarks import harness

  rows: list[dict[str, object]] = []
  for command in COMMANDS:
    with tempfile.TemporaryDirectory() as folder:
      rows.append({'command': command, **killed(command, pathlib.Path(folder), count)})
  command = f'python -m experiments.benchmarks.killed_writes {count}'
  harness.report('killed_writes', 'kills, and what the file was afterwards', command, rows)
  if any(row['damaged'] or row['missing'] or row['parts left at last'] for row in rows):
    sys.exit('found a file that is neither the old nor the new one, or what was left beside it')


def killed(command: str, folder: pathlib.Path, count: int, seconds: float = 0.5) -> dict[str, Any]:
  """What `count` kills leave."""
  found = dict.fromkeys(('kills', 'first', 'second', 'damaged', 'missing', 'parts left'), 0)
  path = folder / 'net.opq'
  rng = random.Random(command)
  # what one process has compiled the next need not
  environment = {
    **os.environ,
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for _ in range(count):
    arguments = [sys.executable, __file__, command, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
      assert process.stdout is not None
      process.stdout.readline()  # both were written once
      time.sleep(rng.uniform(0, seconds))
      process.send_signal(signal.SIGKILL)
    # writes follow each other at once: the old file is the other of the two
    whole = {(folder / f'{name}.whole').read_bytes(): name for name in ('first', 'second')}
    found['kills'] += 1
    outcome = whole.get(path.read_bytes(), 'damaged') if path.exists() else 'missing'
    found[outcome] += 1
    print(command, found['kills'], outcome, file=sys.stderr, flush=True)
    parts = list(folder.glob('.opq-*'))
    found['parts left'] += sum(part.stat().st_mtime > 1 for part in parts)
    for part in parts:
      os.utime(part, (1, 1))  # as if it were long ago
  opq_jax.save(path, {'a': np.ones(3)}, opq_jax.CompressionState({'a': None}))
  found['parts left at last'] = len(list(folder.glob('.opq-*')))
  return found


def write_for_ever(command: str, folder: pathlib.Path) -> None:
  """Writes one network over the other until somebody ends it."""
  draw = np.random.default_rng(0).laplace
  weights = {
    'kernel': draw(size=(64, 64)).astype(np.float32),
    'bias': draw(size=500_000).astype(np.float32),
  }
  path, source = folder / 'net.opq', folder / 'net.safetensors'
  if command == 'compress':
    safetensors.numpy.save_file(weights, source)
    steps = [lambda rate=rate: _compress(source, path, rate) for rate in RATES]
  else:
    none = opq_jax.CompressionState(dict.fromkeys(weights))
    other = {**weights, 'bias': weights['bias'][::-1]}
    steps = [lambda tree=tree: opq_jax.save(path, tree, none) for tree in (weights, other)]
  for name, step in zip(('first', 'second'), steps, strict=True):
    step()
    (folder / f'{name}.whole').write_bytes(path.read_bytes())
  print('ready', flush=True)
  while True:
    for step in steps:
      step()


def _compress(source: pathlib.Path, path: pathlib.Path, rate: float) -> None:
  with open(os.devnull, 'w') as nowhere:
    out, sys.stdout = sys.stdout, nowhere
    try:
      assert cli.main(['compress', str(source), str(path), '--rate', str(rate)]) == 0
    finally:
      sys.stdout = out


if __name__ == '__main__':
  if len(sys.argv) == 3:
    write_for_ever(sys.argv[1], pathlib.Path(sys.argv[2]))
  else:
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
