"""Bytes of the codes against their entropy, with and without contexts, and the coder's speed.

    python -m experiments.benchmarks.rate.payload WEIGHTS.safetensors ...

For every file: the payload of all leaves, tables included, over the sum of the leaves' zeroth-order
entropies, at 4, 2.5 and 1.5 bits per weight; millions of weights a second of the process's own time
on one core, which other work on the machine hardly touches.
"""

import os
import pathlib
import sys
import time
import warnings
from typing import Any

import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax.coding import payload as entropy_coding
from opq_jax.core.limits import ESCAPE
from opq_jax.weights import channel_axis, read_weights

_REPEATS = 3


def main(paths: list[str]) -> None:
  rows = []
  for path in paths:
    params = read_weights(path)
    for bits in (4.0, 2.5, 1.5):
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        allocation = opq_jax.allocate(params, compression_rate=32 / bits, channel_axis=channel_axis)
      state = opq_jax.init_state(params, allocation)
      codes = opq_jax.encode(params, state)
      leaves = [np.asarray(codes[k]) for k, s in state.tree.items() if s is not None]
      # a file has 0 in the places of escaped weights, which are stored beside the codes
      leaves = [np.where(leaf == ESCAPE, 0, leaf).astype(np.int8) for leaf in leaves]
      entropy = sum(entropy_coding.entropy(leaf) * leaf.size for leaf in leaves) / 8
      weights = sum(leaf.size for leaf in leaves)
      row: dict[str, Any] = {
        'network': pathlib.Path(path).stem,
        'weights, M': round(weights / 1e6, 2),
        'bits per weight': round(8 * entropy / weights, 3),
      }
      for kind, contexts in (('plain', False), ('contexts', True)):
        encode_seconds, decode_seconds = [], []
        for _ in range(_REPEATS):
          start = time.process_time()
          payloads = [entropy_coding.encode_codes(leaf, contexts=contexts) for leaf in leaves]
          encode_seconds.append(time.process_time() - start)
          start = time.process_time()
          decoded = [
            entropy_coding.decode_codes(payload, leaf.shape)
            for payload, leaf in zip(payloads, leaves, strict=True)
          ]
          decode_seconds.append(time.process_time() - start)
        for leaf, found in zip(leaves, decoded, strict=True):
          np.testing.assert_array_equal(leaf, found)
        row |= {
          f'{kind} / entropy': round(sum(map(len, payloads)) / entropy, 4),
          f'{kind}: encode, M/s': round(weights / 1e6 / np.median(encode_seconds), 1),
          f'{kind}: decode, M/s': round(weights / 1e6 / np.median(decode_seconds), 1),
        }
      rows.append(row)
  names = ' '.join(pathlib.Path(p).name for p in paths)
  harness.report(
    'payload',
    'entropy coding, one core',
    f'python -m experiments.benchmarks.rate.payload {names}',
    rows,
  )


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  main(sys.argv[1:])
