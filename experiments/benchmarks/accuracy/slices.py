"""The layers of a transformer apart, in stacks of slices, and in stacks that are one matrix each.

    pip install tokenizers torch transformers
    python -m experiments.benchmarks.accuracy.slices FOLDER ... [--text FILE] \
      [--bits 2 3 ...] [--leaves all kernels]

Each folder is that of a Hugging Face model and named as the network: sentence encoders, or language
models, which read FILE.  All its matrices, or the kernels alone without the table of embeddings,
get plain codes of equal bits, with the default objective, F = D / sqrt(S) of squared error D and
energy S, for

    apart             every matrix is a leaf
    slices            matrices of one kind are a stack, and each slice has its own grid and term F:
                      the default, where `usage` or `slices` says so
    slices, S of all  the same with the energy of the whole stack in every term: the objective of
                      before, L slices of equal energy counting as sqrt(L)
    one matrix        a stack has one grid and one term F: all that there was before

The loss is 1 - cosine of a sentence encoder's embeddings, and the KL divergence (nats a token) of a
language model's answers, whose last layer keeps the float table.  Rows of networks and bits
that are not asked for are kept.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

import opq_jax
from experiments.benchmarks import harness
from experiments.benchmarks.accuracy import judged_matrices
from experiments.benchmarks.accuracy.judged_matrices import Leaves, Network

BITS = (3.0,)
LEAVES = 'all', 'kernels'


def stacks_of(names: list[str]) -> dict[str, list[str]]:
  """Returns the names of matrices by those of their stacks; a matrix without a number is alone.

  >>> stacks_of(['h.0.up', 'word', 'h.1.up'])
  {'h.#.up': ['h.0.up', 'h.1.up'], 'word': ['word']}
  """
  found: dict[str, list[str]] = {}
  for name in names:
    found.setdefault(re.sub(r'\d+', '#', name, count=1), []).append(name)
  return found


def rows_of(network: Network, bits_asked: list[float], kind: str) -> Iterator[dict[str, object]]:
  leaves = {name: x for name, x in network.leaves.items() if kind == 'all' or name != network.table}
  stacks = stacks_of(list(leaves))
  stacked: dict[str, Any] = {
    name: np.stack([network.leaves[part] for part in parts])
    if len(parts) > 1
    else network.leaves[parts[0]]
    for name, parts in stacks.items()
  }
  count = lambda path: len(stacks.get(path, ())) if len(stacks.get(path, ())) > 1 else 0
  is_stack = lambda path, _: int(count(path) > 0)

  def axis(path: str, _: Any) -> int:
    """Counts from the end, for leaves and stacks of them alike."""
    return -1 if path == network.table or network.axis == -1 else -2

  def omegas() -> dict[str, Any]:
    energy = {
      name: float(np.sum(np.square(leaf), dtype=np.float64)) for name, leaf in stacked.items()
    }
    return {
      name: np.full(count(name), 1 / np.sqrt(energy[name]))
      if count(name)
      else 1 / np.sqrt(energy[name])
      for name in stacked
    }

  ways: dict[str, tuple[Leaves, dict[str, Any]]] = {
    'apart': (leaves, {}),
    'slices': (stacked, {'slices': is_stack}),
    'slices, S of all': (stacked, {'slices': is_stack, 'objective': omegas()}),
    'one matrix': (stacked, {}),
  }

  for bits in bits_asked:
    for way, (tree, options) in ways.items():
      allocation = opq_jax.allocate(
        dict(tree),
        bits_per_weight=bits,
        compressible=lambda path, leaf: True,
        channel_axis=axis,
        **options,
      )
      sizes = [leaf.size for leaf in tree.values()]
      bits_of_leaves = [float(np.mean(allocation.tree[name].payload)) for name in tree]
      state = opq_jax.init_state(dict(tree), allocation)
      values = opq_jax.apply_compression(dict(tree), state)
      changed = {}
      for name, value in values.items():
        if tree is stacked and count(name):
          changed |= dict(zip(stacks[name], np.asarray(value), strict=True))
        else:
          changed[name] = np.asarray(value)
      yield {
        'network': network.name,
        'compressed': kind,
        'bits asked': f'{bits:g}',
        'matrices': way,
        'bits': round(float(np.sum(np.array(sizes) * bits_of_leaves) / sum(sizes)), 4),
        'bits of the table': round(dict(zip(tree, bits_of_leaves, strict=True))[network.table], 2)
        if kind == 'all'
        else '',
        'loss': float(f'{network.loss(changed):.4g}'),
      }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folders', nargs='+', type=pathlib.Path, metavar='FOLDER')
  parser.add_argument('--text', type=pathlib.Path, help='that language models read')
  parser.add_argument('--leaves', nargs='+', choices=LEAVES, default=list(LEAVES))
  parser.add_argument('--bits', nargs='+', type=float, default=BITS)
  arguments = parser.parse_args()
  rows = []
  for folder in arguments.folders:
    network = judged_matrices.load(folder, arguments.text)
    for kind in arguments.leaves:
      for row in rows_of(network, arguments.bits, kind):
        rows.append(row)
        print(json.dumps(row), flush=True)
  rows = harness.with_earlier('slices', rows, ['network', 'compressed', 'bits asked', 'matrices'])
  networks = list(dict.fromkeys(row['network'] for row in rows))
  rows.sort(key=lambda row: networks.index(row['network']))
  bits = ' '.join(sorted({str(row['bits asked']) for row in rows}))
  harness.report(
    'slices',
    'layers apart, in stacks of slices, and in stacks that are one matrix',
    f'python -m experiments.benchmarks.accuracy.slices FOLDER ... --text FILE --bits {bits}',
    rows,
  )


if __name__ == '__main__':
  main()
