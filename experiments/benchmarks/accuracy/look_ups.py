"""What an error in a table of embeddings costs beside the same error in kernels.

    pip install tokenizers torch transformers
    python -m experiments.benchmarks.accuracy.look_ups FOLDER ... [--text FILE] \
      [--bits 2 3 ...]

Each folder is that of a Hugging Face model and named as the network: sentence encoders, or language
models, which read FILE.  `allocate` gives every leaf the term F = D / sqrt(S), with D its squared
error and S its energy, whether rows of it are looked up or it is multiplied.  Measured is the loss
with the table alone compressed, and with the kernels alone, on the grids of one allocation:

    price     loss / F of the table, over loss / F of the kernels: the factor of the table's F that
              the loss asks for, where it is linear in F
    together  loss with all compressed; and with the table's F times a factor, at equal bits

The loss is 1 - cosine of a sentence encoder's embeddings, and the KL divergence (nats a token) of a
language model's answers, whose table is compressed where it is looked up alone: its last layer
keeps the float table.  Rows of networks and bits that are not asked for are kept.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.accuracy import judged_matrices
from experiments.benchmarks.accuracy.judged_matrices import Leaves, Network

BITS = 2.0, 3.0
FACTORS = 0.125, 0.25, 0.5, 2.0


def rows_of(network: Network, bits_asked: list[float]) -> Iterator[dict[str, object]]:
  table, leaves = network.table, network.leaves
  statistics = {
    name: opq_jax.allocation.leaf_statistics(leaf, -1 if name == table else network.axis)
    for name, leaf in leaves.items()
  }
  energy = {name: float(np.sum(np.square(leaf), dtype=np.float64)) for name, leaf in leaves.items()}

  def coded(bits: float, factor: float) -> tuple[Leaves, Any]:
    omegas = {name: (factor if name == table else 1.0) / np.sqrt(energy[name]) for name in leaves}
    options: dict[str, Any] = {'bits_per_weight': bits, 'objective': omegas}
    allocation = opq_jax.allocate(statistics, compressible=lambda path, leaf: True, **options)
    state = opq_jax.init_state(dict(leaves), allocation)
    values = opq_jax.apply_compression(dict(leaves), state)
    return {name: np.asarray(value) for name, value in values.items()}, allocation

  for bits in bits_asked:
    values, allocation = coded(bits, 1.0)
    term = {name: float(allocation.tree[name].error) * np.sqrt(energy[name]) for name in leaves}
    kernels = {name: value for name, value in values.items() if name != table}
    of_table, of_kernels = network.loss({table: values[table]}), network.loss(kernels)
    price = (of_table / term[table]) / (of_kernels / sum(term[name] for name in kernels))
    row = {'network': network.name, 'bits': f'{bits:g}'}
    report = lambda allocation, loss: {
      'bits of the table': round(float(allocation.tree[table].payload), 2),
      'together': float(f'{loss:.4g}'),
    }
    yield (
      row
      | {
        'table alone': float(f'{of_table:.4g}'),
        'kernels alone': float(f'{of_kernels:.4g}'),
        'price': round(price, 2),
        'factor': '1',
      }
      | report(allocation, network.loss(values))
    )
    for factor in FACTORS:
      values, allocation = coded(bits, factor)
      yield row | {'factor': f'{factor:g}'} | report(allocation, network.loss(values))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folders', nargs='+', type=pathlib.Path, metavar='FOLDER')
  parser.add_argument('--text', type=pathlib.Path, help='that language models read')
  parser.add_argument('--bits', nargs='+', type=float, default=BITS)
  arguments = parser.parse_args()
  rows = []
  for folder in arguments.folders:
    for row in rows_of(judged_matrices.load(folder, arguments.text), arguments.bits):
      rows.append(row)
      print(json.dumps(row), flush=True)
  rows = harness.with_earlier('look_ups', rows, ['network', 'bits', 'factor'])
  networks = list(dict.fromkeys(row['network'] for row in rows))
  rows.sort(key=lambda row: networks.index(row['network']))
  bits = ' '.join(sorted({str(row['bits']) for row in rows}))
  harness.report(
    'look_ups',
    'what an error in a table of embeddings costs',
    f'python -m experiments.benchmarks.accuracy.look_ups FOLDER ... --text FILE --bits {bits}',
    rows,
  )


if __name__ == '__main__':
  main()
