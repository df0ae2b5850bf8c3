"""Trees larger than memory: seconds and peak memory of `opq compress`'s path, by size.

    python -m experiments.benchmarks.large_trees --weights 1e6 1e7 1e8
    python -m experiments.benchmarks.large_trees --weights 1e9 --leaf 3.2e7 --folder /a/large/disk

Every size is a process of its own, since what is measured is the peak of the resident set (VmHWM)
that the kernel keeps for it: once a small tree was compressed, which is what the libraries take;
once a tree of the largest leaf alone was, compilers and all; and after the whole tree.  A limit
on the address space would say nothing: JAX maps much more than it ever touches.  The files are
made, and removed again, in a folder of the disk.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments.benchmarks import harness

CHANNELS = 1000


def write_tree(path: pathlib.Path, weights: int, leaf: int, seed: int = 0) -> None:
  """Float32 Laplace weights in leaves of at most `leaf`, as safetensors; never whole in memory."""
  rng = np.random.default_rng(seed)
  most = max(leaf // CHANNELS, 1)
  rows = [min(most, weights // CHANNELS - i) for i in range(0, max(weights // CHANNELS, 1), most)]
  header, begin = {}, 0
  for i, count in enumerate(rows):
    end = begin + 4 * count * CHANNELS
    header[f'layer_{i:04d}.kernel'] = {
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


def status(field: str) -> int:
  """A field of the process's memory status, in bytes."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measured(folder: str) -> dict[str, float]:
  """Compresses `net.safetensors` in a folder; called in a process of its own."""
  from opq_jax import streaming

  path = pathlib.Path(folder)
  streaming.compress(streaming.open_safetensors(path / 'small.safetensors'), path / 'small.opq')
  constant = status('VmHWM')
  leaves = streaming.open_safetensors(path / 'one.safetensors')
  streaming.compress(leaves, path / 'one.opq', compression_rate=12.8)
  one = status('VmHWM')
  leaves = streaming.open_safetensors(path / 'net.safetensors')
  start = time.perf_counter()
  report = streaming.compress(leaves, path / 'net.opq', compression_rate=12.8).report
  return {
    'seconds': time.perf_counter() - start,
    'constant': constant,
    'one': one,
    'peak': status('VmHWM'),
    'largest': max(leaf.nbytes for leaf in leaves.values()),
    'original': report.original,
    'file_rate': report.file_rate,
  }


def run(weights: int, leaf: int, folder: str | None) -> dict[str, float]:
  """Makes a tree, and measures in a fresh process what compressing it takes."""
  with tempfile.TemporaryDirectory(dir=folder) as place:
    write_tree(pathlib.Path(place) / 'small.safetensors', 100_000, 100_000)
    write_tree(pathlib.Path(place) / 'one.safetensors', min(leaf, weights), leaf, seed=1)
    write_tree(pathlib.Path(place) / 'net.safetensors', weights, leaf)
    command = [sys.executable, '-m', 'experiments.benchmarks.large_trees', '--measure', place]
    root = pathlib.Path(__file__).parents[2]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
  return json.loads(output.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--weights', type=float, nargs='+', default=[1e6, 1e7, 1e8])
  parser.add_argument('--leaf', type=float, default=1.6e7, help='weights of the largest leaf')
  parser.add_argument('--folder', help='where the trees are made')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.measure:
    print(json.dumps(measured(arguments.measure)))
    return
  rows: list[dict[str, object]] = []
  for weights in arguments.weights:
    found = run(int(weights), int(arguments.leaf), arguments.folder)
    mega = lambda name, found=found: round(found[name] / 2**20)
    rows.append(
      {
        'weights': f'{weights:.0e}',
        'tree, MiB': mega('original'),
        'largest leaf, MiB': mega('largest'),
        'peak, MiB': mega('peak'),
        'of the largest leaf alone, MiB': mega('one'),
        'of the libraries, MiB': mega('constant'),
        'seconds': round(found['seconds'], 1),
        'ns a weight': round(found['seconds'] / weights * 1e9, 1),
        'file rate': round(found['file_rate'], 2),
      }
    )
  sizes = ' '.join(f'{weights:g}' for weights in arguments.weights)
  harness.report(
    'large_trees',
    'opq compress, leaf by leaf',
    f'python -m experiments.benchmarks.large_trees --weights {sizes} --leaf {arguments.leaf:g}',
    rows,
  )


if __name__ == '__main__':
  main()
