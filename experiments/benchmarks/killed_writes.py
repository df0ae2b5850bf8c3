"""kill -9 at random moments of a write: what lies there afterwards.

    python -m experiments.benchmarks.killed_writes [kills of each, by default 50]

A process writes a new network over an old one and is killed at a moment drawn uniformly from the
seconds that an unhindered process takes for the whole of it, which is measured before: reading,
solving and coding included, where they are part of the call.  Afterwards the place must hold the
old file or the new one, whole.  Parts that were left beside it must be gone after the next write.

    opq compress, in memory      of an .npz file
    opq compress, leaf by leaf   of a .safetensors file
    opq_jax.save                 of a tree and its state
    the bytes alone              what every one of them ends in, with a file that takes long
"""

import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors.numpy

import opq_jax
from opq_jax import cli, files

WRITES = (
  'opq compress, in memory',
  'opq compress, leaf by leaf',
  'opq_jax.save',
  'the bytes alone',
)
LARGE = 64 << 20  # bytes


def main(count: int) -> None:
  from experiments.benchmarks import harness

  rows: list[dict[str, object]] = []
  for write in WRITES:
    with tempfile.TemporaryDirectory() as folder:
      rows.append({'write': write, **killed(write, pathlib.Path(folder), count)})
    print(rows[-1], file=sys.stderr, flush=True)
  command = f'python -m experiments.benchmarks.killed_writes {count}'
  harness.report('killed_writes', 'kills, and what the file was afterwards', command, rows)
  if any(row['neither'] or row['left after the next write'] for row in rows):
    sys.exit('found a file that is neither the old nor the new one, or what was left beside it')


def killed(write: str, folder: pathlib.Path, count: int, unkilled: int = 5) -> dict[str, Any]:
  """What `count` kills leave, each at a moment within the seconds of `unkilled` whole writes."""
  path = folder / 'net.opq'
  _make_sources(folder)
  opq_jax.save(path, {'a': np.ones(3)}, opq_jax.CompressionState({'a': None}))
  old = path.read_bytes()
  _seconds(write, folder, None)  # compiles
  expected = set(os.listdir(folder))
  length = statistics.median(_seconds(write, folder, None) for _ in range(unkilled))
  new = path.read_bytes()
  assert new != old
  found = dict.fromkeys(('kills', 'old file', 'new file', 'neither', 'parts left'), 0)
  rng = random.Random(write)
  for _ in range(count):
    path.write_bytes(old)
    _seconds(write, folder, rng.uniform(0, length))
    now = path.read_bytes() if path.exists() else None
    found['kills'] += 1
    found['old file' if now == old else 'new file' if now == new else 'neither'] += 1
    parts = [folder / name for name in set(os.listdir(folder)) - expected]
    found['parts left'] += sum(part.stat().st_mtime > 1 for part in parts)
    for part in parts:
      os.utime(part, (1, 1))  # as if it were long ago
  files.write_bytes(path, old)
  left_at_last = len(set(os.listdir(folder)) - expected)
  return {'seconds, unkilled': round(length, 3), **found, 'left after the next write': left_at_last}


def _seconds(write: str, folder: pathlib.Path, kill_after: float | None) -> float:
  """Of one write; or of one that is killed."""
  # forked of a process that has imported everything and started nothing
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['opq_jax.cli', 'safetensors.numpy'])
  here, there = context.Pipe()
  process = context.Process(target=_write_once, args=(write, folder, there))
  process.start()
  here.recv()
  begin = time.perf_counter()
  here.poll(kill_after)  # or until it is done
  seconds = time.perf_counter() - begin
  if kill_after is not None:
    process.kill()
  process.join()
  return seconds


def _weights() -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0).laplace
  return {
    'kernel': draw(size=(512, 256)).astype(np.float32),
    'bias': draw(size=50_000).astype(np.float32),
  }


def _make_sources(folder: pathlib.Path) -> None:
  safetensors.numpy.save_file(_weights(), folder / 'net.safetensors')
  np.savez(folder / 'net.npz', **_weights())
  state = opq_jax.init_state(_weights(), opq_jax.allocate(_weights()))
  opq_jax.save(folder / 'source.opq', _weights(), state)


def _write_once(
  write: str, folder: pathlib.Path, there: multiprocessing.connection.Connection
) -> None:
  # what one process has compiled the next need not
  jax.config.update('jax_compilation_cache_dir', str(folder / 'cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  step = _step(write, folder)
  there.send('ready')
  step(folder / 'net.opq')
  there.send('done')


def _step(write: str, folder: pathlib.Path) -> Callable[[pathlib.Path], None]:
  """What writes a file."""
  if write == 'the bytes alone':
    data = np.random.default_rng(0).bytes(LARGE)
    return lambda path: files.write_bytes(path, data)
  if write == 'opq_jax.save':
    params, state = opq_jax.load(folder / 'source.opq')
    return lambda path: opq_jax.save(path, params, state)
  source = folder / ('net.npz' if write == 'opq compress, in memory' else 'net.safetensors')
  return lambda path: _compress(source, path)


def _compress(source: pathlib.Path, path: pathlib.Path) -> None:
  with open(os.devnull, 'w') as nowhere:
    out, sys.stdout = sys.stdout, nowhere
    try:
      assert cli.main(['compress', str(source), str(path), '--rate', '12']) == 0
    finally:
      sys.stdout = out


if __name__ == '__main__':
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
