"""Judges files or folders of a network's weights, and adds rows of `.opq` files to the results.

    python -m experiments.benchmarks.language_models.add_file smollm2|iglm FOLDER WEIGHTS... \\
      [--text TEXT] [--setting SETTING --data DATA [--seconds N]]

FOLDER holds the float network.  WEIGHTS are what `opq_jax` reads of it after a codec: an `.opq`
file, `.safetensors`, or a Hugging Face folder.  With --setting, the one `.opq` file becomes a row
of opq_jax: files that it carries, such as a tokenizer, are not counted.
"""

import argparse
import json
import pathlib
from typing import Any

import opq_jax
from experiments.benchmarks.language_models import networks, rows
from experiments.benchmarks.language_models.coded import Coded
from experiments.benchmarks.language_models.measure import Judge
from experiments.benchmarks.language_models.networks import Network
from opq_jax.importers import language_files, language_models


def of_file(network: Network, path: pathlib.Path, folder: pathlib.Path | None = None) -> Coded:
  """Returns the leaves of an `.opq` file, with the bits of each.

  Args:
    network: the network.
    path: of the file; its leaves are the tensors of transformers, or those of our networks.
    folder: with config.json, where the file has none.
  """
  leaves = networks.leaves(language_files.load(path, folder=folder).variables)
  with opq_jax.OpqFile(path) as file:
    sizes, carried = file.sizes(), file.side_bytes()
  bits = {
    leaf: 8.0 * (sizes[leaf] if leaf in sizes else sum(sizes[name] for name in place.names))
    for leaf, place in language_models.places(network.model).items()
  }
  return Coded(leaves, bits, 8.0 * (path.stat().st_size - carried) - sum(bits.values()))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('network', choices=networks.NAMES)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--text', type=pathlib.Path)
  parser.add_argument('--setting', help="as 'trellis, 3 bits, calibrated'")
  parser.add_argument('--data', choices=('none', 'random tokens', 'own text', 'text'))
  parser.add_argument('--seconds', type=int, default=0)
  arguments = parser.parse_args()
  network = networks.open_network(arguments.network, arguments.folder, arguments.text)
  judge = Judge(network)
  if not arguments.setting:
    for path in arguments.weights:
      params = language_files.load(path, folder=arguments.folder).variables
      print(path, json.dumps(judge.scores(params).row()), flush=True)
    return
  if len(arguments.weights) > 1 or not arguments.data:
    parser.error('--setting: expected one file, and --data')
  made = of_file(network, arguments.weights[0], arguments.folder)
  row: dict[str, Any] = {'codec': 'opq_jax', 'setting': arguments.setting, 'data': arguments.data}
  row |= {'embedding': 'opq_jax'} | made.sizes(network.params)
  row |= judge.scores(made.params(network.params)).row()
  rows.of_network(network, judge).append(row | {'seconds': arguments.seconds, 'note': ''})
  print(json.dumps(row))


if __name__ == '__main__':
  main()
