"""kill -9 and Ctrl-C at random moments of a write, and of finetuning: the files left behind.

    python -m experiments.benchmarks.robustness.killed_writes [KILLS [WRITE ...]]

A process writes a new network over an old one and is killed at a moment drawn uniformly from the
duration of the whole call (reading, solving and coding included), measured before on unkilled
processes.  Afterwards the path must hold the complete old or the complete new file.  Partial files
left beside it must be gone after the next write, and at once after Ctrl-C, which ends a command
with exit code 130.  Of an output that is a folder, the old state is that there is none.

    opq compress, in memory      of an .npz file
    opq compress, leaf by leaf   of a .safetensors file
    opq compress, a folder       of Hugging Face, with shards
    opq decompress               to .safetensors
    opq decompress, a folder     the model folder that a file was made of
    opq export, .onnx            into an ONNX file
    opq export, .mlpackage       into a Core ML package, which is a folder
    opq export, .stablehlo       of ResNet-20
    opq_jax.save                 of a tree and its state
    the bytes alone              the last stage of every write, with a large file
    finetuning                   24 steps with a checkpoint after every third.  A run that was
                                 killed is started again, and killed again, until one ends.  Its
                                 latent weights, averages, optimizer state, masks and codebooks must
                                 equal those of an unkilled run, bit for bit.  Then another begins
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import shutil
import signal
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
from opq_jax import cli, data, finetuning, models
from opq_jax.cli import interrupts
from opq_jax.core import files
from opq_jax.data import streams
from opq_jax.file import writer
from opq_jax.weights import carried_files, open_folder

WRITES = (
  'opq compress, in memory',
  'opq compress, leaf by leaf',
  'opq compress, a folder',
  'opq decompress',
  'opq decompress, a folder',
  'opq export, .onnx',
  'opq export, .mlpackage',
  'opq export, .stablehlo',
  'opq_jax.save',
  'the bytes alone',
  'finetuning',
)
SIGNALS = {'kill -9': signal.SIGKILL, 'Ctrl-C': signal.SIGINT}
COMMANDS = tuple(write for write in WRITES if write.startswith('opq '))
"""Writes of the command line, which Ctrl-C ends too."""

LARGE = 64 << 20  # bytes: a write that takes long enough to be killed in
_PATIENCE = 600.0  # seconds in which a process must end
STEPS, EVERY = 24, 3  # of finetuning, and steps from one checkpoint to the next


def main(count: int, writes: Sequence[str] = WRITES) -> None:
  command = f'python -m experiments.benchmarks.robustness.killed_writes {count}'
  rows: list[dict[str, object]] = []
  for write in writes:
    for name in SIGNALS if write in COMMANDS else ['kill -9']:
      with tempfile.TemporaryDirectory() as folder:
        found = killed(write, pathlib.Path(folder), count, sent=SIGNALS[name])
      rows.append({'write': write, 'signal': name, **found})
      print(rows[-1], file=sys.stderr, flush=True)
  rows = harness.with_earlier('killed_writes', rows, ['write', 'signal'])
  rows.sort(key=lambda row: (WRITES.index(str(row['write'])), str(row['signal']) == 'Ctrl-C'))
  harness.report('killed_writes', 'kills, and what the file was afterwards', command, rows)
  is_wrong = lambda row: (
    row['neither']
    or row['left after the next write']
    or (row['signal'] == 'Ctrl-C' and row['parts left'])
  )
  if any(map(is_wrong, rows)):
    sys.exit('found a file that is neither the old nor the new one, or what was left beside it')


def killed(
  write: str,
  folder: pathlib.Path,
  count: int,
  unkilled: int = 5,
  sent: signal.Signals = signal.SIGKILL,
) -> dict[str, Any]:
  """Counts what `count` signals at random moments leave; the duration from `unkilled` runs."""
  path, begun = folder / _output(write), folder / 'checkpoints'
  _make_sources(write, folder)
  is_folder = path.suffix in ('', '.mlpackage')
  old = None
  if not is_folder:
    opq_jax.save(path, {'a': np.ones(3)}, opq_jax.CompressionState({'a': None}))
    old = _content(path)
  _restore(path, old)
  _seconds(write, folder, None)  # compiles
  expected = {*os.listdir(folder), begun.name, path.name}
  lengths = []
  for _ in range(unkilled):
    shutil.rmtree(begun, ignore_errors=True)
    _restore(path, old)
    lengths.append(_seconds(write, folder, None))
  length = statistics.median(lengths)
  new = _content(path)
  assert new != old
  counts = dict.fromkeys(('kills', 'old file', 'new file', 'neither', 'parts left'), 0)
  rng = random.Random(write)
  shutil.rmtree(begun, ignore_errors=True)
  for _ in range(count):
    _restore(path, old)
    _seconds(write, folder, rng.uniform(0, length), sent)
    content = _content(path)
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
    counts['neither'] += _content(path) != new
  _restore(path, old)
  if is_folder:
    _seconds(write, folder, None)
  else:
    files.write_bytes(path, b'next')
  left_at_last = len(set(os.listdir(folder)) - expected)
  return {
    'seconds, unkilled': round(length, 3),
    **counts,
    'left after the next write': left_at_last,
  }


def _content(path: pathlib.Path) -> dict[str, bytes] | None:
  """Returns the files at or below a path, None where nothing is there."""
  if not path.exists():
    return None
  return {
    str(one.relative_to(path)): one.read_bytes()
    for one in [path, *path.rglob('*')]
    if one.is_file()
  }


def _restore(path: pathlib.Path, old: dict[str, bytes] | None) -> None:
  """Puts an old file, or nothing, in the place of what is there."""
  if path.is_dir():
    shutil.rmtree(path)
  if old is not None:
    path.write_bytes(old['.'])


def _seconds(
  write: str,
  folder: pathlib.Path,
  kill_after: float | None,
  sent: signal.Signals = signal.SIGKILL,
) -> float:
  """Returns the seconds of one write, which a signal ends after `kill_after` seconds if given.

  Raises:
    RuntimeError: the process has ended otherwise.
  """
  # forked from a server that has imported everything and started no threads
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(
    [
      'opq_jax.cli',
      'opq_jax.finetuning.checkpoints',
      'opq_jax.data.streams',
      'opq_jax.finetuning.training',
      'opq_jax.export',
      'opq_jax.weights.hugging_face',
      'onnx.external_data_helper',
      'coremltools.proto',
      'jax.export',
      'flax.linen',
    ]
  )
  here, there = context.Pipe()
  process = context.Process(target=_write_once, args=(write, folder, there))
  process.start()
  there.close()  # so that the end of the process is the end of the pipe
  here.recv()
  begin = time.perf_counter()
  here.poll(kill_after)  # or until it is done
  seconds = time.perf_counter() - begin
  if kill_after is not None and process.is_alive():
    assert process.pid is not None
    os.kill(process.pid, sent)
  process.join(_PATIENCE)
  if process.is_alive():
    process.kill()
    raise RuntimeError(f'{write}: found no end {_PATIENCE} seconds after {sent.name}')
  ends = {0} if kill_after is None else {0, -signal.SIGKILL, interrupts.EXIT_CODE}
  if process.exitcode not in ends:
    raise RuntimeError(f'{write}: found exit code {process.exitcode}, expected one of {ends}')
  return seconds


def _weights() -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0).laplace
  return {
    'kernel': draw(size=(512, 256)).astype(np.float32),
    'bias': draw(size=50_000).astype(np.float32),
  }


def _output(write: str) -> str:
  """Returns the name of what a write makes."""
  match write.rpartition(', ')[2]:
    case '.onnx' | '.mlpackage' | '.stablehlo' as suffix:
      return f'out{suffix}'
    case 'a folder' if 'decompress' in write:
      return 'out'
    case 'opq decompress':
      return 'out.safetensors'
  return 'net.opq'


def _make_sources(write: str, folder: pathlib.Path) -> None:
  safetensors.numpy.save_file(_weights(), folder / 'net.safetensors')
  np.savez(folder / 'net.npz', **_weights())
  network = opq_jax.compress(_weights(), compression_rate=12.0)
  opq_jax.save(folder / 'source.opq', network.params, network.state)
  if write.endswith('a folder'):
    _make_folder(folder / 'model')
    model = open_folder(folder / 'model')
    network = opq_jax.compress(dict(model), compression_rate=12.0)
    side_files = carried_files(model).files
    opq_jax.save(folder / 'model.opq', network.params, network.state, side_files=side_files)
  elif write.endswith('.onnx'):
    _make_onnx(folder / 'net.onnx')
  elif write.endswith('.mlpackage'):
    _make_core_ml(folder / 'net.mlpackage')
  elif write.endswith('.stablehlo'):
    model = models.create('resnet20', num_classes=10)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    network = opq_jax.compress(variables, compression_rate=12.0)
    metadata = {'model': 'resnet20', 'source': 'akamaster', 'num_classes': '10'}
    opq_jax.save(folder / 'resnet.opq', network.params, network.state, metadata)


def _make_folder(path: pathlib.Path) -> None:
  path.mkdir()
  (path / 'config.json').write_text('{"model_type": "llama"}')
  places = {}
  for number in range(4):
    file, name = f'model-{number + 1:05}-of-00004.safetensors', f'layer.{number}.weight'
    weights = np.random.default_rng(number).laplace(size=(1024, 512)).astype(np.float32)
    safetensors.numpy.save_file({name: weights}, path / file, {'format': 'pt'})
    places[name] = file
  (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))


def _make_onnx(path: pathlib.Path) -> None:
  import onnx
  from onnx import TensorProto, helper, numpy_helper

  value = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
  node = helper.make_node('MatMul', ['x', 'kernel'], ['y'])
  tensor = numpy_helper.from_array(_weights()['kernel'], 'kernel')
  graph = helper.make_graph([node], 'net', [value('x', 512)], [value('y', 256)], [tensor])
  imports = [helper.make_opsetid('', 17)]
  onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)


def _make_core_ml(path: pathlib.Path) -> None:
  import coremltools as ct
  from coremltools.converters.mil import Builder as mb

  @mb.program(input_specs=[mb.TensorSpec(shape=(1, 512))], opset_version=ct.target.iOS18)
  def program(x: Any) -> Any:
    return mb.matmul(x=x, y=mb.const(val=_weights()['kernel'], name='kernel'))

  model = ct.convert(
    program,
    convert_to='mlprogram',
    compute_precision=ct.precision.FLOAT32,
    minimum_deployment_target=ct.target.iOS18,
    skip_model_load=True,
  )
  model.save(str(path))


def _write_once(
  write: str, folder: pathlib.Path, there: multiprocessing.connection.Connection
) -> None:
  # compiled programs are shared between processes
  jax.config.update('jax_compilation_cache_dir', str(folder / 'cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  step = _step(write, folder)
  if write in COMMANDS:
    interrupts.exit_on_interrupt()
  there.send('ready')
  step(folder / _output(write))
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
  words = {
    'opq compress, in memory': ['compress', 'net.npz', '--rate', '12'],
    'opq compress, leaf by leaf': ['compress', 'net.safetensors', '--rate', '12'],
    'opq compress, a folder': ['compress', 'model', '--rate', '12'],
    'opq decompress': ['decompress', 'source.opq'],
    'opq decompress, a folder': ['decompress', 'model.opq'],
    'opq export, .onnx': ['export', 'source.opq', '--into', str(folder / 'net.onnx')],
    'opq export, .mlpackage': ['export', 'source.opq', '--into', str(folder / 'net.mlpackage')],
    'opq export, .stablehlo': ['export', 'resnet.opq'],
  }
  verb, source, *options = words[write]
  return lambda path: _run([verb, str(folder / source), str(path), *options])


def _run(words: list[str]) -> None:
  with (
    open(os.devnull, 'w') as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    assert cli.main(words) == 0


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
