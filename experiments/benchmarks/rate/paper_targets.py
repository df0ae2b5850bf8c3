"""The paper's networks at its rates: nominal rates, and the sizes of real files.

    python -m experiments.benchmarks.rate.paper_targets [NETWORK=WEIGHTS ...]

`allocate` with the targets of `opq_jax/allocation/paper.py`, the four sizes of what comes out, and
the one `compression_rate` that fills a file of the same size.  A network without a file of weights
has random ones: Laplace kernels of a trained network's scale, and random biases and BatchNorm
statistics, which are incompressible.
"""

import gc
import math
import pathlib
import sys
import warnings

import jax
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax import models
from opq_jax.allocation import paper
from opq_jax.core import trees
from opq_jax.file import rate as file_rate
from opq_jax.importers import networks


def random_variables(name: str) -> dict[str, np.ndarray]:
  """Draws variables by path: kernels as `harness.random_tree` does, other leaves uniform."""
  rng = np.random.default_rng(0)
  leaves = {}
  for path, leaf in trees.named_leaves(models.variable_shapes(models.create(name))).items():
    if len(leaf.shape) > 1:
      # half the memory and time of rng.laplace
      array = rng.standard_exponential(leaf.shape, np.float32)
      array *= rng.integers(0, 2, leaf.shape, np.int8) * 2 - 1
      array /= np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
    else:
      array = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    leaves[path] = array
  return leaves


def compare(name: str, weights: str | None) -> dict[str, object]:
  """Returns the row of a network at the paper's rate."""
  target = paper.TARGETS[name]
  params = networks.load(weights, name=name).variables if weights else random_variables(name)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'the Laplace density')
    allocation = opq_jax.allocate(params, sparsity=target.sparsity, bits=target.bits)
    report = opq_jax.size_report(params, opq_jax.init_state(params, allocation))
    one_target = file_rate.at_file_rate(params, report.file_rate)
  assert abs(report.nominal_rate / target.nominal_rate - 1) < 0.01, report.nominal_rate
  return {
    'network': name,
    'weights': pathlib.Path(weights).name if weights else 'random',
    'pruned': f'{report.sparsity:.1%}',
    'bits of a survivor': f'{8 * report.nominal / report.survivors:.2f}',
    'published': f'{target.nominal_rate:.2f}',
    'nominal': f'{report.nominal_rate:.2f}',
    'packed': f'{report.packed_rate:.2f}',
    'entropy': f'{report.entropy_rate:.2f}',
    'file': f'{report.file_rate:.2f}',
    'file, bytes': f'{report.file:,}',
    'compression_rate of the same size': f'{one_target.compression_rate:.2f}',
    'its file, bytes': f'{one_target.file_bytes:,}',
  }


def main(arguments: list[str]) -> None:
  given = dict(argument.split('=', 1) for argument in arguments)
  rows = []
  for name in paper.TARGETS:
    rows.append(compare(name, given.get(name)))
    # VGG-16 alone is half a gigabyte
    jax.clear_caches()
    gc.collect()
  names = ' '.join(f'{name}={pathlib.Path(path).name}' for name, path in given.items())
  harness.report(
    'paper_targets',
    "rates at the paper's targets",
    f'python -m experiments.benchmarks.rate.paper_targets {names}'.strip(),
    rows,
  )


if __name__ == '__main__':
  main(sys.argv[1:])
