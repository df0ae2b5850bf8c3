"""The rate of the payloads against the rate that was asked for.

    python -m experiments.benchmarks.rate_control WEIGHTS.safetensors ...

For every file and rate: bytes of the compressed leaves as float32, over those of their payloads
without contexts (frequency tables and checksums included), over the rate asked of
`opq_jax.allocate`.  1 is exact; contexts make files smaller still.
"""

import pathlib
import sys
import warnings

import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax import entropy_coding, weight_files

RATES = (6, 8, 12, 20, 35, 60)


def main(paths: list[str]) -> None:
  rows: list[dict[str, object]] = []
  for path in paths:
    params = weight_files.read_weights(path)
    row: dict[str, object] = {'network': pathlib.Path(path).stem}
    for rate in RATES:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        allocation = opq_jax.allocate(
          params, compression_rate=rate, channel_axis=weight_files.channel_axis
        )
      state = opq_jax.init_state(params, allocation)
      codes = opq_jax.encode(params, state)
      leaves = [np.asarray(codes[name]) for name, leaf in state.tree.items() if leaf is not None]
      payload = sum(len(entropy_coding.encode_codes(leaf, contexts=False)) for leaf in leaves)
      row[f'rate {rate}'] = round(4 * sum(leaf.size for leaf in leaves) / payload / rate, 4)
    rows.append(row)
  names = ' '.join(pathlib.Path(path).name for path in paths)
  command = f'python -m experiments.benchmarks.rate_control {names}'
  harness.report('rate_control', 'rate of the payloads over the rate asked for', command, rows)


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  main(sys.argv[1:])
