"""Codes along a trellis against plain ones, at the same squared error.

    python -m experiments.benchmarks.accuracy.trellis WEIGHTS.safetensors ...

For a million Laplace weights, trellis bits are the entropy of the codes given their subsets, and
plain bits are those of the closed forms of `opq_jax.allocation.laplace` at the best threshold and
step for the same error.  For a network, both are bytes of files of the kernels alone.  The plain
file's bytes at the same error are interpolated, linearly in the logarithm of the error, between
slightly smaller and larger files.  All leaves have the same slope, `objective='squared_error'`.
Speeds are millions of weights a second of processor time over all cores, for choosing codes and for
reading the file.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.kernels import kernels_of, squared_error
from opq_jax.allocation import laplace
from opq_jax.coding import payload as entropy_coding
from opq_jax.file import writer

BITS = 0.5, 1.0, 2.0, 3.0, 4.0
OPTIONS: dict[str, Any] = {'objective': 'squared_error'}
_AROUND = 1.0, 1.07, 1.15


def plain_bits_of_laplace(distortion: float) -> float:
  """Returns the least entropy at which plain codes of Laplace weights of scale 1 reach an error."""
  steps = jnp.linspace(0.2, 8.0, 2000, dtype=jnp.float32)
  thresholds = jnp.linspace(0.05, 6.0, 2000, dtype=jnp.float32)[:, None]
  both = jnp.broadcast_arrays(thresholds, steps[None])
  errors = laplace.distortion(*both, jnp.float32(1))
  bits = laplace.entropy(*both, jnp.float32(1))
  return float(jnp.where(errors <= distortion, bits, jnp.inf).min())


def row(
  name: str, tree: dict[str, Any], asked: float, compare: Callable[..., tuple[float, float]]
) -> dict[str, object]:
  trellis = opq_jax.encoders.Trellis()
  coded, state, allocation = opq_jax.compress(
    tree, compression_rate=32 / asked, encoder=trellis, **OPTIONS
  )
  weights = sum(leaf.size for leaf in tree.values())
  plain_state = opq_jax.init_state(tree, allocation)
  data = writer.serialize(coded, state)
  seconds = harness.in_turn(
    {
      'choose': lambda: trellis.choose_codes(tree, plain_state),
      'read': lambda: opq_jax.load(data),
    },
    rounds=1,
    clock=time.process_time,
  )
  error = squared_error(tree, coded)
  bits, plain = compare(tree, coded, state, data, error)
  return {
    'weights': name,
    'M': round(weights / 1e6, 2),
    'bits per weight': round(bits, 3),
    'squared error, of the energy': round(error, 5),
    'plain codes, bits': round(plain, 3),
    'fewer bits, %': round(100 * (1 - bits / plain), 1),
    **{f'{what}, M/s': round(weights / found / 1e6, 1) for what, found in seconds.items()},
  }


def against_closed_forms(
  tree: dict[str, Any], coded: Any, state: Any, data: bytes, error: float
) -> tuple[float, float]:
  del tree, data
  codes = np.asarray(opq_jax.encode(coded, state)['w'])
  return entropy_coding.entropy(codes), plain_bits_of_laplace(2 * error)


def against_plain_files(
  tree: dict[str, Any], coded: Any, state: Any, data: bytes, error: float
) -> tuple[float, float]:
  del coded, state
  weights = sum(leaf.size for leaf in tree.values())
  bits = 8 * len(data) / weights
  sizes, errors = [], []
  for factor in _AROUND:
    allocation = opq_jax.allocate(tree, compression_rate=32 / (factor * bits), **OPTIONS)
    plain = opq_jax.init_state(tree, allocation)
    sizes.append(8 * len(writer.serialize(tree, plain)) / weights)
    errors.append(np.log(squared_error(tree, opq_jax.apply_compression(tree, plain))))
  line = np.polyfit(errors, sizes, 1)
  return bits, float(np.polyval(line, np.log(error)))


def rows(paths: list[pathlib.Path]) -> Iterator[dict[str, object]]:
  sample = np.random.default_rng(0).laplace(size=(1000, 1000)).astype(np.float32)
  for bits in BITS:
    yield row('Laplace', {'w': sample}, bits, against_closed_forms)
  for path in paths:
    name = path.stem.removesuffix('_cifar10')
    tree = kernels_of(opq_jax.weights.read_weights(path))
    for bits in BITS:
      yield row(name, tree, bits, against_plain_files)


def main() -> None:
  paths = [pathlib.Path(path) for path in sys.argv[1:]]
  found = []
  for line in rows(paths):
    found.append(line)
    print(*line.values(), sep='  ', flush=True)
  words = ''.join(f' {path.name}' for path in paths)
  command = f'python -m experiments.benchmarks.accuracy.trellis{words}'
  harness.report('trellis', 'codes along a trellis', command, found)


if __name__ == '__main__':
  main()
