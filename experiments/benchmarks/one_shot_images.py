"""The test images of `configs/one_shot.py:NETWORK`, for benchmarks of several networks."""

import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import harness
from opq_jax import data
from opq_jax.core.trees import PyTree
from opq_jax.importers import networks
from opq_jax.report import accuracy


def batches_of(
  config: ml_collections.ConfigDict, network: networks.Network, data_dir: str, split: str
) -> list[dict[str, np.ndarray]]:
  """Returns batches of a split of a config's dataset, preprocessed for a network."""
  options = {'batch_size': config.batch_size, 'preprocessing': network.source.preprocessing}
  return list(data.batches(config.dataset, split, data_dir=data_dir, **options))


class Judge:
  """Scores a network's variables on the images of some batches.

  Attributes:
    labels: of all images.
    reference: the float network's logits.
  """

  def __init__(self, network: networks.Network, batches: Sequence[dict[str, np.ndarray]]):
    # faster on a CPU; see `experiments.benchmarks.resources.inference`
    options = {'xla_cpu_experimental_ynn_fusion_type': ''} if jax.default_backend() == 'cpu' else {}
    self._forward = jax.jit(network.model.apply, compiler_options=options)
    self._images = [batch['image'] for batch in batches]
    self.labels = np.concatenate([batch['label'] for batch in batches])
    self.reference = self.logits(network.variables)

  def logits(self, variables: PyTree) -> np.ndarray:
    return np.concatenate([np.asarray(self._forward(variables, x)) for x in self._images])

  def scores(self, variables: PyTree) -> dict[str, float]:
    """Returns `opq_jax.report.accuracy.scores` against the float network."""
    return accuracy.scores(self.logits(variables), self.labels, self.reference)


def cells(scores: dict[str, float]) -> dict[str, object]:
  """Returns scores as cells of a table."""
  percent = {key: 100 * value for key, value in scores.items()}
  return {
    'top-1, % (95 %)': '{top1:.2f} ({top1_low:.1f} to {top1_high:.1f})'.format(**percent),
    'same answer as float32, %': round(percent['agreement'], 2),
    'divergence': round(scores['divergence'], 4),
  }


def main(
  name: str,
  title: str,
  compare: Callable[[str, pathlib.Path, str], Iterator[dict[str, object]]],
  usage: str | None,
) -> None:
  """Runs a benchmark whose arguments are TFDS_FOLDER WEIGHTS.safetensors ...

  Rows of other networks are kept.

  Args:
    name: FOLDER.NAME of the benchmark; NAME is also that of its results.
    title: of its table.
    compare: (network, its weights, TFDS folder) -> rows.
    usage: printed where arguments are missing.
  """
  if len(sys.argv) < 3:
    sys.exit(usage)
  data_dir, *paths = sys.argv[1:]
  rows: list[dict[str, object]] = []
  for path in map(pathlib.Path, paths):
    for row in compare(path.stem.removesuffix('_cifar10'), path, data_dir):
      rows.append(row)
      print(*row.values(), sep='  ', flush=True)
  short = name.split('.')[-1]
  command = f'python -m experiments.benchmarks.{name} TFDS_FOLDER WEIGHTS.safetensors ...'
  harness.report(short, title, command, harness.with_earlier(short, rows, ['network']))
