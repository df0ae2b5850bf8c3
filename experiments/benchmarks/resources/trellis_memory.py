"""Processor time and peak memory of codes along a trellis with error feedback.

    python -m experiments.benchmarks.resources.trellis_memory

ResNet-50's shapes, with moments that hold as much as those of a network, in memory and on disk; and
stacks of transformer layers under one scan, whose moments are measured on the way.  Every row is a
process of its own.  Peaks are of the whole process (VmHWM): libraries and compilers, tree, moments
and codes.  Processor time is of all cores, compiling included: of `opq_jax.compress` for ResNet-50,
and of one choice of codes for the stacks.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax import encoders
from opq_jax.network import InputMoments, StoredMatrix, second_moments

ROOT = pathlib.Path(__file__).parents[3]
WIDTH, HIDDEN, TOKENS = 128, 1024, 512


def status(field: str) -> int:
  """Returns a field of the process's memory status, in bytes."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def covariance(width: int, seed: int) -> np.ndarray:
  """Returns a positive definite matrix of neighbours that go together, and one common direction."""
  rng = np.random.default_rng(seed)
  scale = np.exp(0.5 * rng.normal(size=width)).astype(np.float32)
  common, place = rng.normal(size=width).astype(np.float32), np.arange(width)
  matrix = np.empty((1, width, width), np.float32)
  for i in range(width):
    near = 0.7 * 0.9 ** np.abs(place - i).astype(np.float32)
    matrix[0, i] = scale[i] * scale * (near + 0.3 * common[i] * common)
  return matrix


def measures(params: Any, choose: Callable[[], Any]) -> dict[str, Any]:
  """Calls what chooses the codes of a tree, and returns its measures."""
  cpu = time.process_time()
  chosen = choose()
  cpu = time.process_time() - cpu
  peak = status('VmHWM')
  return {
    'peak': peak,
    'cpu': cpu,
    'tree': sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    'bytes': len(opq_jax.file.serialize(chosen[0], chosen[1])),
  }


def of_resnet50(version: int, folder: str | None) -> dict[str, Any]:
  """Measures ResNet-50's shapes, with moments in memory or in a folder."""
  params = harness.random_tree(harness.resnet50_shapes())
  moments, size = {}, 0
  for number, (name, leaf) in enumerate(params.items()):
    matrix: Any = covariance(leaf.size // leaf.shape[-1], number)
    size += matrix.nbytes
    if folder is not None:
      path = f'{folder}/{number}.npy'
      np.save(path, matrix)
      matrix = StoredMatrix(path, matrix.shape)
    moments[name] = InputMoments(matrix, tuple(range(leaf.ndim - 1)))
  encoder = encoders.Trellis(moments, version=version)
  compress = functools.partial(opq_jax.compress, compression_rate=12.8, encoder=encoder)
  return measures(params, lambda: compress(params)) | {'moments': size}


def of_stack(layers: int, folder: str | None) -> dict[str, Any]:
  """Measures a scan over transformer layers."""
  rng = np.random.default_rng(0)
  shapes = {
    **dict.fromkeys(('query', 'key', 'value', 'out'), (WIDTH, WIDTH)),
    'up': (WIDTH, HIDDEN),
    'down': (HIDDEN, WIDTH),
  }
  draw = lambda shape: rng.laplace(size=shape).astype(np.float32) / np.sqrt(shape[-2])
  params = {name: jnp.asarray(draw((layers, *shape))) for name, shape in shapes.items()}

  def normed(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

  def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    h = normed(x)
    scores = (h @ w['query']) @ (h @ w['key']).T / np.sqrt(WIDTH)
    x = x + jax.nn.softmax(scores) @ (h @ w['value']) @ w['out']
    return x + jax.nn.relu(normed(x) @ w['up']) @ w['down'], None

  fn = lambda params, x: jax.lax.scan(layer, x, params)[0]
  inputs = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
  moments = second_moments(fn, params, inputs, folder=folder)
  is_moments = lambda node: isinstance(node, InputMoments)
  matrices = {
    str(found.matrix) if folder else id(found.matrix): found.matrix
    for found in jax.tree.leaves(moments, is_leaf=is_moments)
  }
  size = sum(4 * int(np.prod(matrix.shape)) for matrix in matrices.values())
  grids = opq_jax.init_state(
    params, opq_jax.allocate(params, compression_rate=12.8, slices=lambda path, leaf: 1)
  )
  choose = encoders.Trellis(moments).choose_codes
  return measures(params, lambda: choose(params, grids)) | {'moments': size}


def measured(what: str, count: int, is_on_disk: bool) -> dict[str, Any]:
  """Measures one row in a process of its own."""
  command = [sys.executable, '-m', 'experiments.benchmarks.resources.trellis_memory']
  command += ['--measure', what, '--count', str(count), *(['--on-disk'] if is_on_disk else [])]
  output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
  return json.loads(output.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--layers', type=int, nargs='*', default=[12, 48], help='of the stacks')
  parser.add_argument('--versions', type=int, nargs='*', default=[1, 2], help='for ResNet-50')
  parser.add_argument('--measure', choices=('resnet50', 'stack'), help=argparse.SUPPRESS)
  parser.add_argument('--count', type=int, help=argparse.SUPPRESS)
  parser.add_argument('--on-disk', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.measure:
    with tempfile.TemporaryDirectory() as folder:
      measure = of_resnet50 if arguments.measure == 'resnet50' else of_stack
      print(json.dumps(measure(arguments.count, folder if arguments.on_disk else None)))
    return
  jobs = [('resnet50', 1, False)] if 1 in arguments.versions else []
  jobs += [('resnet50', 2, disk) for disk in (False, True)] if 2 in arguments.versions else []
  jobs += [('stack', layers, disk) for layers in arguments.layers for disk in (False, True)]
  rows = []
  for what, count, is_on_disk in jobs:
    found = measured(what, count, is_on_disk)
    mega = lambda name, found=found: round(found[name] / 2**20)
    rows.append(
      {
        'network': "ResNet-50's shapes" if what == 'resnet50' else f'scan of {count} layers',
        'encoder': f'version {count if what == "resnet50" else 2}',
        'moments': 'on disk' if is_on_disk else 'in memory',
        'tree, MiB': mega('tree'),
        'moments, MiB': mega('moments'),
        'peak, MiB': mega('peak'),
        'processor time, s': round(found['cpu']),
        'file, KiB': round(found['bytes'] / 1024),
      }
    )
    print(rows[-1], flush=True)
  rows = harness.with_earlier('trellis_memory', rows, ['network', 'encoder', 'moments'])
  rows.sort(
    key=lambda row: (str(row['network'])[:1], int(str(row['tree, MiB'])), str(row['encoder']))
  )
  harness.report(
    'trellis_memory',
    'codes along a trellis with error feedback: time and peaks',
    'python -m experiments.benchmarks.resources.trellis_memory',
    rows,
  )


if __name__ == '__main__':
  main()
