"""Large trees: seconds and peak memory by size, leaf by leaf from disk, and in memory.

    python -m experiments.benchmarks.resources.large_trees --weights 1e6 2.5e7 1e8 1e9
    python -m experiments.benchmarks.resources.large_trees --weights 1e9 --folder /a/large/disk
    python -m experiments.benchmarks.resources.large_trees --what memory

Every size runs in a process of its own, whose peak resident set (VmHWM) is read three times: after
a tree of as many leaves and channels with few weights (memory of the libraries, and of the
allocation's programs, which are those of leaves and channels), after the same tree with one leaf of
the largest size (compilers included), and after the whole tree.  A limit on the address space would
be no test: JAX maps much more than it ever touches.  The files are made, and removed again, in a
folder on disk.

Processor time of all cores is given beside the wall clock; other load on the machine does not
change it.

In memory every step is called twice, and the second call is measured: compiling takes seconds at
any size.  Its peak is that of the whole process, including the tree and the step's result; for
loading, without the tree that was saved.
"""

import argparse
import ctypes
import functools
import gc
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors

from experiments.benchmarks import harness
from opq_jax.report import plots

CHANNELS = 1000  # of every leaf
SMALL_ROWS = 100  # of a leaf of few weights
# what the leaves are read from, and the tables
SOURCES = {
  '.safetensors': 'large_trees',
  'Orbax': 'large_trees_orbax',
  'shards': 'large_trees_shards',
  'PyTorch shards': 'large_trees_torch_shards',
}
SHARDS = 4
WHAT = (*SOURCES, 'memory')


def leaf_rows(weights: int, leaf: int) -> list[int]:
  """Returns the rows of `CHANNELS` weights of every leaf: of at most `leaf` weights each."""
  most, rows = max(leaf // CHANNELS, 1), max(weights // CHANNELS, 1)
  return [min(most, rows - i) for i in range(0, rows, most)]


def write_tree(
  path: pathlib.Path, rows: Sequence[int], seed: int = 0, names: str = 'layer'
) -> None:
  """Writes float32 Laplace weights in leaves of these rows as safetensors, leaf by leaf."""
  rng = np.random.default_rng(seed)
  header, begin = {}, 0
  for i, count in enumerate(rows):
    end = begin + 4 * count * CHANNELS
    header[f'{names}_{i:04d}.kernel'] = {
      'dtype': 'F32',
      'shape': [count, CHANNELS],
      'data_offsets': [begin, end],
    }
    begin = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for count in rows:
      scale = np.float32(1 / np.sqrt(count))
      for start in range(0, count, 1000):
        piece = rng.exponential(size=(min(1000, count - start), CHANNELS)).astype(np.float32)
        np.negative(piece, out=piece, where=rng.integers(0, 2, piece.shape, np.int8) > 0)
        (piece * scale).tofile(file)


def write_shards(folder: pathlib.Path, rows: Sequence[int], seed: int, is_torch: bool) -> None:
  """Writes leaves of these rows as a model folder of shards, of safetensors or of PyTorch."""
  folder.mkdir()
  places: dict[str, str] = {}
  count = min(SHARDS, len(rows))
  for i in range(count):
    path = folder / f'model-{i + 1:05}-of-{count:05}.safetensors'
    write_tree(path, rows[i::count], seed + i, f'shard_{i}_layer')
    with safetensors.safe_open(path, 'np') as file:
      names = list(file.keys())
    if is_torch:
      import torch
      from safetensors.torch import load_file

      other = path.with_name(f'pytorch_{path.stem}.bin')
      torch.save(load_file(path), other)
      path.unlink()
      path = other
    places |= dict.fromkeys(names, path.name)
  index = 'pytorch_model.bin.index.json' if is_torch else 'model.safetensors.index.json'
  (folder / index).write_text(json.dumps({'metadata': {}, 'weight_map': places}))


def write_orbax(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the same tree as an Orbax checkpoint, from a memory-mapped file."""
  import orbax.checkpoint as ocp

  with open(source, 'rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(size))
  leaves = {
    name: np.memmap(source, '<f4', 'r', 8 + size + leaf['data_offsets'][0], tuple(leaf['shape']))
    for name, leaf in header.items()
  }
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder.absolute(), leaves)


def status(field: str) -> int:
  """Returns a field of the process's memory status, in bytes."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measured(folder: str, suffix: str, encoder: str) -> dict[str, float]:
  """Compresses `net` of a suffix in a folder, in a process of its own; returns its measures."""
  from opq_jax import encoders
  from opq_jax.weights import compress_stored, open_weights

  path = pathlib.Path(folder)
  chosen = encoders.Trellis() if encoder == 'trellis' else encoders.Rounding()
  compress = functools.partial(compress_stored, compression_rate=12.8, encoder=chosen)
  leaves = lambda name: open_weights(path / f'{name}{suffix}')
  compress(leaves('small'), path / 'small.opq')
  constant = status('VmHWM')
  compress(leaves('one'), path / 'one.opq')
  one = status('VmHWM')
  tree = leaves('net')
  start, cpu = time.perf_counter(), time.process_time()
  report = compress(tree, path / 'net.opq').report
  return {
    'seconds': time.perf_counter() - start,
    'cpu': time.process_time() - cpu,
    'constant': constant,
    'one': one,
    'peak': status('VmHWM'),
    'largest': max(leaf.nbytes for leaf in tree.values()),
    'original': report.original,
    'file_rate': report.file_rate,
  }


def measured_in_memory(folder: str) -> dict[str, dict[str, float]]:
  """Returns seconds and peak memory of every step on the tree of `net.safetensors`, read whole."""
  import jax
  import safetensors.numpy

  import opq_jax

  path = pathlib.Path(folder)
  found: dict[str, dict[str, float]] = {}

  def measure(step: str, function: Callable[[], Any]) -> Any:
    jax.block_until_ready(function())
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    # the peak from now on
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    start, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    found[step] = {
      'seconds': time.perf_counter() - start,
      'cpu': time.process_time() - cpu,
      'peak': status('VmHWM'),
    }
    return result

  stored = safetensors.numpy.load_file(path / 'net.safetensors')
  params = {name: jax.numpy.asarray(stored.pop(name)) for name in list(stored)}
  allocation = measure('allocate', lambda: opq_jax.allocate(params, compression_rate=12.8))
  state = measure('init_state', lambda: opq_jax.init_state(params, allocation))
  measure('apply_compression', lambda: opq_jax.apply_compression(params, state))
  measure('save', lambda: opq_jax.save(path / 'net.opq', params, state))
  # a user who loads has none of them yet
  del params, allocation, state
  measure('load', lambda: opq_jax.load(path / 'net.opq', most_bytes=1 << 40))
  return found


def run(
  weights: int,
  leaf: int,
  folder: str | None,
  source: str = '.safetensors',
  mode: str = '--measure',
  encoder: str = 'rounding',
) -> dict[str, Any]:
  """Makes a tree, and measures its compression in a fresh process.

  Args:
    weights: of the tree.
    leaf: of its largest leaf.
    folder: where it is made.
    source: one of `SOURCES`, of what it is read.
    mode: --measure, or --measure-in-memory.
    encoder: rounding or trellis, of leaves on disk.
  """
  suffix = source if source == '.safetensors' else ''
  with tempfile.TemporaryDirectory(dir=folder) as name:
    place = pathlib.Path(name)
    net = leaf_rows(weights, leaf)
    small = [SMALL_ROWS] * len(net)
    for seed, (stem, rows) in enumerate(
      {'small': small, 'one': net[:1] + small[1:], 'net': net}.items()
    ):
      if 'shards' in source:
        write_shards(place / stem, rows, seed, source == 'PyTorch shards')
        continue
      path = place / f'{stem}.safetensors'
      write_tree(path, rows, seed)
      if source == 'Orbax':
        write_orbax(path, place / stem)
        path.unlink()
    command = [sys.executable, '-m', 'experiments.benchmarks.resources.large_trees', mode, name]
    command += [f'--suffix={suffix}', f'--encoder={encoder}']
    root = pathlib.Path(__file__).parents[3]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
  return json.loads(output.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--weights', type=float, nargs='+', default=[1e6, 2.5e7, 1e8])
  parser.add_argument('--leaf', type=float, default=1.25e7, help='weights of the largest leaf')
  parser.add_argument('--folder', help='where the trees are made')
  parser.add_argument('--what', nargs='+', choices=WHAT, default=WHAT, help='tables to make')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  parser.add_argument('--suffix', help=argparse.SUPPRESS)
  parser.add_argument('--measure-in-memory', help=argparse.SUPPRESS)
  parser.add_argument('--encoder', choices=('rounding', 'trellis'), default='rounding')
  arguments = parser.parse_args()
  if arguments.measure:
    print(json.dumps(measured(arguments.measure, arguments.suffix, arguments.encoder)))
    return
  if arguments.measure_in_memory:
    print(json.dumps(measured_in_memory(arguments.measure_in_memory)))
    return
  sizes = ' '.join(f'{weights:g}' for weights in arguments.weights)
  options = f'--weights {sizes} --leaf {arguments.leaf:g}'
  for what in arguments.what:
    made = in_memory(arguments) if what == 'memory' else leaf_by_leaf(arguments, what)
    name = SOURCES.get(what, 'large_trees_in_memory')
    command = f'python -m experiments.benchmarks.resources.large_trees {options} --what {what}'
    harness.report(name, f'{what}: seconds and peaks', command, made)
  draw()


def leaf_by_leaf(arguments: argparse.Namespace, source: str) -> list[dict[str, object]]:
  """Returns the rows of `opq compress`, a size each."""
  rows: list[dict[str, object]] = []
  for weights in arguments.weights:
    found = run(int(weights), int(arguments.leaf), arguments.folder, source)
    mega = lambda name, found=found: round(found[name] / 2**20)
    rows.append(
      {
        'weights': f'{weights / 1e6:g} M',
        'tree, MiB': mega('original'),
        'largest leaf, MiB': mega('largest'),
        'peak, MiB': mega('peak'),
        'of the largest leaf alone, MiB': mega('one'),
        'of the libraries, MiB': mega('constant'),
        'seconds': round(found['seconds'], 1),
        'of all cores, ns a weight': round(found['cpu'] / weights * 1e9, 1),
        'file rate': round(found['file_rate'], 2),
      }
    )
  return rows


def in_memory(arguments: argparse.Namespace) -> list[dict[str, object]]:
  """Returns the rows of every step at every size."""
  rows: list[dict[str, object]] = []
  for weights in arguments.weights:
    steps = run(int(weights), int(arguments.leaf), arguments.folder, mode='--measure-in-memory')
    rows += [
      {
        'weights': f'{weights / 1e6:g} M',
        'step': f'`{step}`',
        'seconds': round(found['seconds'], 3),
        'ns a weight': round(found['seconds'] / weights * 1e9, 1),
        'of all cores, ns a weight': round(found['cpu'] / weights * 1e9, 1),
        'peak, MiB': round(found['peak'] / 2**20),
        'tree, MiB': round(4 * weights / 2**20),
      }
      for step, found in steps.items()
    ]
  return rows


def draw() -> None:
  """Plots processor time over the number of weights, for all tables present."""
  curves = {}
  for source, name in SOURCES.items():
    path = harness.RESULTS / f'{name}.json'
    rows = json.loads(path.read_text())['rows'] if path.exists() else []
    weights = [1e6 * float(row['weights'].split()[0]) for row in rows]
    curves[source] = [
      (count, 1e-9 * count * row['of all cores, ns a weight'])
      for count, row in zip(weights, rows, strict=True)
    ]
  found = {source: points for source, points in curves.items() if points}
  plots.seconds_over_weights(harness.RESULTS / 'large_trees.png', found)


if __name__ == '__main__':
  main()
