"""The rate of the payloads against the rate that was asked for.

    python -m experiments.benchmarks.rate.rate_control WEIGHTS.safetensors ... \
      [--pruned WEIGHTS.safetensors ...]

For every file and rate: bytes of the compressed leaves as float32, over those of their payloads
without contexts (frequency tables, checksums and escaped weights included), over the rate asked of
`opq_jax.allocate`.  1 is exact; contexts make files smaller still.  The files after --pruned are
also measured with 50 to 95 % of zeros, the smallest magnitudes of the whole network.

A network of few distinct values may be exact with fewer bits than asked.  A smaller file with a
UserWarning that states its rate counts as met; a refusal does not.  The note quotes the first
message.
"""

import argparse
import pathlib
import re
import warnings

import numpy as np

import opq_jax
from experiments.benchmarks import harness
from opq_jax.file import writer
from opq_jax.weights import channel_axis

RATES = (6, 8, 12, 20, 35, 60)
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95)
TOLERANCE = 0.005  # of the rate, either way
GRID_BYTES = 12  # of a leaf in a file, beside its payload


def pruned(params: dict[str, np.ndarray], zeros: float) -> dict[str, np.ndarray]:
  """Sets a share of the weights to 0, those of least magnitude over all leaves.

  >>> pruned({'a': np.array([[3.0, -1.0]]), 'b': np.array([[0.5, 2.0]])}, 0.5)
  {'a': array([[3., 0.]]), 'b': array([[0., 2.]])}
  """
  magnitudes = np.concatenate([np.abs(leaf).reshape(-1) for leaf in params.values()])
  threshold = np.quantile(magnitudes, zeros, method='inverted_cdf')
  return {
    name: np.where(np.abs(leaf) > threshold, leaf, 0).astype(leaf.dtype)
    for name, leaf in params.items()
  }


def measure(params: dict[str, np.ndarray], rate: float) -> tuple[object, bool, str]:
  """Returns the cell of a network at a rate, whether the rate is met, and `allocate`'s message."""
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', UserWarning)
      allocation = opq_jax.allocate(params, compression_rate=rate, channel_axis=channel_axis)
      state = opq_jax.init_state(params, allocation)
      data = writer.serialize(params, state, contexts=False)
  except ValueError as error:
    return 'refused', False, str(error)
  with opq_jax.OpqFile(data) as file:
    payload = sum(size - GRID_BYTES for size in file.sizes().values())
  ratio = 4 * sum(leaf.size for leaf in params.values()) / payload / rate
  notes = [str(w.message) for w in caught if re.search(r'\b(compression_)?rate\b', str(w.message))]
  if found > 1 + TOLERANCE and notes:
    return f'{ratio:.4f}, with a warning', True, notes[0]
  return round(ratio, 4), abs(ratio - 1) <= TOLERANCE, ''


def row_of(network: str, params: dict[str, np.ndarray]) -> dict[str, object]:
  zeros = sum(int(np.count_nonzero(leaf == 0)) for leaf in params.values())
  share = zeros / sum(leaf.size for leaf in params.values())
  found = {f'rate {rate}': measure(params, rate) for rate in RATES}
  met = sum(is_met for _, is_met, _ in found.values())
  return (
    {'network': network, 'zeros': f'{100 * share:.0f} %'}
    | {name: shown for name, (shown, _, _) in found.items()}
    | {'met': f'{met} of {len(RATES)}'}
    | {'note': next((note for _, _, note in found.values() if note), '')}
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--pruned', nargs='+', type=pathlib.Path, default=[])
  arguments = parser.parse_args()

  def compressed(path: pathlib.Path) -> dict[str, np.ndarray]:
    leaves = opq_jax.weights.read_weights(path)
    return {
      name: leaf for name, leaf in leaves.items() if opq_jax.allocation.is_compressible(name, leaf)
    }

  rows = [row_of(path.stem, compressed(path)) for path in arguments.weights]
  for path in arguments.pruned:
    rows += [row_of(path.stem, pruned(compressed(path), share)) for share in ZEROS]
  names = lambda paths: ' '.join(path.name for path in paths)
  command = f'python -m experiments.benchmarks.rate.rate_control {names(arguments.weights)}'
  if arguments.pruned:
    command += f' --pruned {names(arguments.pruned)}'
  harness.report('rate_control', 'rate of the payloads over the rate asked for', command, rows)


if __name__ == '__main__':
  main()
