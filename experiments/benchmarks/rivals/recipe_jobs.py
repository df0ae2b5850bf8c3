"""Files of the usual recipes: magnitude pruning, rounding to integers, and LZMA; and of qwix."""

import functools
import io
import lzma
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.kernels import kernels_of, vectors_of
from experiments.benchmarks.rivals.jobs import QWIX, RECIPE, Coded, Job, timed
from opq_jax.core import trees
from opq_jax.importers import networks

RECIPES = (50, 8), (50, 4), (0, 4)  # percent pruned, bits of a weight


def rounded(kernel: np.ndarray, percent: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Prunes the smallest weights and rounds the others to multiples of their channel's step.

  >>> codes, scales = rounded(np.array([[7.0, 0.1], [-2.9, 14.0]], np.float32), 25, 4)
  >>> codes.tolist(), scales.tolist()
  ([[7, 0], [-3, 7]], [[1.0, 2.0]])
  """
  cut = np.partition(np.abs(kernel).ravel(), kernel.size * percent // 100)
  kept = np.where(np.abs(kernel) >= cut[kernel.size * percent // 100], kernel, 0)
  others = tuple(range(kernel.ndim - 1))
  most = 2 ** (bits - 1) - 1
  scales = np.max(np.abs(kept), axis=others, keepdims=True) / np.float32(most)
  scales = np.where(scales > 0, scales, np.float32(1))
  return np.round(kept / scales).astype(np.int8), scales


def jobs_of_recipes(network: networks.Network, folder: pathlib.Path) -> Iterator[Job]:
  """Yields jobs of pruning and rounding, and of qwix where it is installed."""
  variables = network.variables
  path = folder / 'network.xz'

  def archive(leaves: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **leaves)  # type: ignore[arg-type]
    return lzma.compress(file.getvalue(), preset=9)

  def coded(split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], correction: str) -> Coded:
    def encode() -> tuple[list[str], int]:
      pieces = {name: split(kernel) for name, kernel in kernels_of(variables).items()}
      values = {name: codes * scales for name, (codes, scales) in pieces.items()}
      tree = trees.replaced(variables, values)
      if correction == 'noise':
        tree = networks.correct_batch_norm(network, tree)
      vectors = {n: np.asarray(x) for n, x in vectors_of(trees.named_leaves(tree)).items()}
      stored = {f'{n}.{i}': piece for n, pair in pieces.items() for i, piece in enumerate(pair)}
      path.write_bytes(archive(stored | vectors))
      return list(pieces), len(archive(vectors))

    def decode() -> Any:
      with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
        found = dict(file)
      return trees.replaced(
        variables, found | {n: found[f'{n}.0'] * found[f'{n}.1'] for n in names}
      )

    (names, vector_bytes), encoding = timed(encode)
    decoded, decoding = timed(decode)
    return Coded(decoded, path.stat().st_size, vector_bytes, encoding, decoding)

  for percent, bits in RECIPES:
    for correction in ('noise',) if percent == 0 else ('none', 'noise'):
      split = functools.partial(rounded, percent=percent, bits=bits)
      run = functools.partial(coded, split, correction)
      yield Job(RECIPE, f'pruned={percent}% int{bits}', correction, run)
  try:
    from qwix import QArray as _  # noqa: F401
    from qwix import quantize
  except ImportError:
    return

  def by_qwix(kernel: np.ndarray, qtype: str) -> tuple[np.ndarray, np.ndarray]:
    found = quantize(jax.numpy.asarray(kernel), qtype, channelwise_axes=[kernel.ndim - 1])
    return np.asarray(found.qvalue.astype(np.int8)), np.asarray(found.scale)

  for qtype in ('int8', 'int4'):
    for correction in ('none', 'noise'):
      run = functools.partial(coded, functools.partial(by_qwix, qtype=qtype), correction)
      yield Job(QWIX, qtype, correction, run)
