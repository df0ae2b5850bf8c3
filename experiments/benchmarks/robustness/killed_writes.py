"""kill -9 at random moments of a write, and of finetuning: the files left behind.

    python -m experiments.benchmarks.robustness.killed_writes [KILLS [WRITE ...]]

A process writes a new network over an old one and is killed at a moment drawn uniformly from the
duration of the whole call (reading, solving and coding included), measured before on unkilled
processes.  Afterwards the path must hold the complete old or the complete new file.  Partial files
left beside it must be gone after the next write.

    opq compress, in memory      of an .npz file
    opq compress, leaf by leaf   of a .safetensors file
    opq_jax.save                 of a tree and its state
    the bytes alone              the last stage of every write, with a large file
    finetuning                   24 steps with a checkpoint after every third.  A run that was
                                 killed is started again, and killed again, until one ends.  Its
                                 latent weights, averages, optimizer state, masks and codebooks must
                                 equal those of an unkilled run, bit for bit.  Then another begins
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import safetensors.numpy

import opq_jax
from experiments.benchmarks import harness
from opq_jax import cli, data, finetuning
from opq_jax.core import files
from opq_jax.data import streams
from opq_jax.file import writer

WRITES = (
  'opq compress, in memory',
  'opq compress, leaf by leaf',
  'opq_jax.save',
  'the bytes alone',
  'finetuning',
)
LARGE = 64 << 20  # bytes: a write that takes long enough to be killed in
STEPS, EVERY = 24, 3  # of finetuning, and steps from one checkpoint to the next


def main(count: int, writes: Sequence[str] = WRITES) -> None:
  command = f'python -m experiments.benchmarks.robustness.killed_writes {count}'
  path = harness.RESULTS / 'killed_writes.json'
  document = json.loads(path.read_text()) if path.exists() else {}
  # rows of the same command's other writes are kept
  before = document['rows'] if document.get('command') == command else []
  by_write = {row['write']: row for row in before}
  for write in writes:
    with tempfile.TemporaryDirectory() as folder:
      by_write[write] = {'write': write, **killed(write, pathlib.Path(folder), count)}
    print(by_write[write], file=sys.stderr, flush=True)
  rows = [by_write[write] for write in WRITES if write in by_write]
  harness.report('killed_writes', 'kills, and what the file was afterwards', command, rows)
  if any(row['neither'] or row['left after the next write'] for row in rows):
    sys.exit('found a file that is neither the old nor the new one, or what was left beside it')


def killed(write: str, folder: pathlib.Path, count: int, unkilled: int = 5) -> dict[str, Any]:
  """Counts the files left by `count` kills at random moments; the duration from `unkilled` runs."""
  path, begun = folder / 'net.opq', folder / 'checkpoints'
  _make_sources(folder)
  opq_jax.save(path, {'a': np.ones(3)}, opq_jax.CompressionState({'a': None}))
  old = path.read_bytes()
  _seconds(write, folder, None)  # compiles
  expected = {*os.listdir(folder), begun.name}
  lengths = []
  for _ in range(unkilled):
    shutil.rmtree(begun, ignore_errors=True)
    lengths.append(_seconds(write, folder, None))
  length = statistics.median(lengths)
  new = path.read_bytes()
  assert new != old
  counts = dict.fromkeys(('kills', 'old file', 'new file', 'neither', 'parts left'), 0)
  rng = random.Random(write)
  shutil.rmtree(begun, ignore_errors=True)
  for _ in range(count):
    path.write_bytes(old)
    _seconds(write, folder, rng.uniform(0, length))
    content = path.read_bytes() if path.exists() else None
    counts['kills'] += 1
    counts['old file' if content == old else 'new file' if content == new else 'neither'] += 1
    if content != old:
      shutil.rmtree(begun, ignore_errors=True)
    parts = [folder / name for name in set(os.listdir(folder)) - expected]
    counts['parts left'] += sum(part.stat().st_mtime > 1 for part in parts)
    for part in parts:
      os.utime(part, (1, 1))  # old enough for the next write to remove it
  if begun.exists():
    # the last of the killed runs, to its end
    _seconds(write, folder, None)
    counts['neither'] += path.read_bytes() != new
  files.write_bytes(path, old)
  left_at_last = len(set(os.listdir(folder)) - expected)
  return {
    'seconds, unkilled': round(length, 3),
    **counts,
    'left after the next write': left_at_last,
  }


def _seconds(write: str, folder: pathlib.Path, kill_after: float | None) -> float:
  """Returns the seconds of one write, killed after `kill_after` seconds if given."""
  # forked from a server that has imported everything and started no threads
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(
    [
      'opq_jax.cli',
      'opq_jax.finetuning.checkpoints',
      'opq_jax.data.streams',
      'opq_jax.finetuning.training',
      'flax.linen',
    ]
  )
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
  # compiled programs are shared between processes
  jax.config.update('jax_compilation_cache_dir', str(folder / 'cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  step = _step(write, folder)
  there.send('ready')
  step(folder / 'net.opq')
  there.send('done')


def _step(write: str, folder: pathlib.Path) -> Callable[[pathlib.Path], None]:
  """Returns the function that writes the file."""
  if write == 'the bytes alone':
    data = np.random.default_rng(0).bytes(LARGE)
    return lambda path: files.write_bytes(path, data)
  if write == 'finetuning':
    return lambda path: _finetune(folder / 'checkpoints', path)
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


class _Network(nn.Module):
  """Two dense layers with BatchNorm between."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Dense(64, name='hidden')(x.reshape(len(x), -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x)
    return nn.Dense(5, name='head')(nn.relu(x))


def _finetune(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Runs finetuning from its last checkpoint to its end, and writes its final state."""
  optimizer = optax.adamw(1e-2)
  variables = _Network().init(jax.random.key(0), np.zeros((1, 24), np.float32))
  compressed = lambda tree: opq_jax.init_state(tree, opq_jax.allocate(tree, compression_rate=12.0))
  step_fn = finetuning.pmap_train_step(_Network().apply, optimizer)
  with finetuning.Checkpoints(folder) as manager:
    state = manager.restore_compression(jax.eval_shape(compressed, variables['params']))
    if state is None:
      state = compressed(variables['params'])
      manager.save_compression(state)
    train_state = finetuning.replicate(
      finetuning.init_train_state(variables, optimizer, jax.random.key(1), with_average=True)
    )
    plain = data.Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = streams.stream(
      streams.fake((2, 4, 3), classes=5, count=50), batch_size=8, preprocessing=plain
    )
    restored = manager.restore(train_state)
    if restored is not None:
      train_state, position = restored
      batches.set_state(position)
    for step in range(int(train_state.step) + 1, STEPS + 1):
      train_state, _ = step_fn(train_state, state, next(batches))
      if step % EVERY == 0:
        manager.save(train_state, batches.get_state())
  leaves = jax.device_get(jax.tree.leaves((train_state.replace(rng=None), state)))
  files.write_bytes(path, writer.serialize(leaves, opq_jax.CompressionState([None] * len(leaves))))


if __name__ == '__main__':
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2:] or WRITES)
