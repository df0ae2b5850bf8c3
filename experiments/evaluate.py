r"""Top-1 and top-5 of a network on a split of any TFDS dataset in array_record format.

    python -m experiments.evaluate --weights=resnet50.pth --model=resnet50 --data_dir=DIR
    python -m experiments.evaluate --weights=resnet50.opq --data_dir=DIR --against=resnet50.pth

Weights are anything that `opq_jax.importers.networks.load` reads: files of other frameworks, of
Flax, and .opq files.  A file of `opq compress --model` records its network.  Images are prepared as
by the source of the weights.  `--against` is judged on the same images, each network with its own
preparation, and the difference of their top-1 has a paired interval and McNemar's exact p-value.
"""

import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opq_jax import data
from opq_jax.importers import networks
from opq_jax.report import accuracy


class Judged(NamedTuple):
  """Whether each image is right, and images per second without the first batch, which compiles."""

  top_1: np.ndarray
  top_5: np.ndarray
  speed: float | None


def judge(
  network: networks.Network, dataset: str, split: str, data_dir: str, batch_size: int, images: int
) -> Judged:
  """Evaluates a network on every image of a split."""
  # variables are an argument: XLA would fold constants for minutes
  forward = jax.jit(network.model.apply)
  batches = data.batches(
    dataset,
    split,
    data_dir=data_dir,
    batch_size=batch_size,
    preprocessing=network.source.preprocessing,
  )
  top_1, top_5, seconds = [], [], []
  columns = (TextColumn(network.name), BarColumn(), MofNCompleteColumn(), TextColumn('images'))
  with Progress(*columns, TimeRemainingColumn(), console=Console()) as progress:
    task = progress.add_task('evaluating', total=images)
    for batch in batches:
      pixels, labels = batch['image'], batch['label']
      # the last batch is padded to the compiled shape
      pixels = np.resize(pixels, (batch_size, *pixels.shape[1:]))
      start = time.perf_counter()
      logits = np.asarray(forward(network.variables, pixels))[: len(labels)]
      seconds.append(time.perf_counter() - start)
      top_1.append(accuracy.hits(logits, labels))
      top_5.append(accuracy.hits(logits, labels, k=5))
      progress.advance(task, len(labels))
  speed = float(batch_size / np.median(seconds[1:])) if seconds[1:] else None
  return Judged(np.concatenate(top_1), np.concatenate(top_5), speed)


def run(
  weights: str,
  data_dir: str,
  *,
  model: str | None = None,
  source: str | None = None,
  dataset: str = 'imagenet2012',
  split: str = 'validation',
  batch_size: int = 50,
  against: str | None = None,
) -> dict[str, str]:
  """Evaluates a network, prints a table, and returns its rows.

  Args:
    weights: file of weights.
    data_dir: folder of TFDS.
    model: name of the network, where the file does not record it.
    source: source of the weights, by default detected.
    dataset: name of the dataset in TFDS.
    split: of the dataset.
    batch_size: images at a time.
    against: file of other weights of the same network, usually the float ones, to compare with.

  Returns:
    Cells of the table by the names of their rows.
  """
  examples = data.source(dataset, split, data_dir)
  classes = examples.dataset_info.features['label'].num_classes
  # a network with one more class has TensorFlow's background class
  network = networks.load(weights, name=model, source=source, num_classes=classes)
  # a wrong file is refused before the images are judged
  other = networks.load(against, name=network.name, num_classes=classes) if against else None
  on = dataset, split, data_dir, batch_size, len(examples)
  judged = judge(network, *on)
  row = {
    'network': f'{network.name}, {network.model.num_classes} classes',
    'weights': f'{pathlib.Path(weights).name}, prepared as for {network.source.name}',
    'images': f'{len(examples):,} of {dataset}, {split}',
    'top-1': share(judged.top_1),
    'top-5': share(judged.top_5),
  }
  if judged.speed:
    row['images per second'] = f'{judged.speed:.1f} (the network alone)'
  if other is not None and against is not None:
    reference = judge(other, *on)
    found = accuracy.paired(judged.top_1, reference.top_1)
    row |= {
      'against': f'{pathlib.Path(against).name}, prepared as for {other.source.name}',
      'its top-1': share(reference.top_1),
      'right in one only': f'{found.gained} in {pathlib.Path(weights).name}, '
      f'{found.lost} in {pathlib.Path(against).name}',
      'difference of top-1': difference(found),
      "McNemar's exact p-value": f'{found.p_value:.2g}',
    }
  table = Table(show_header=False)
  for name, value in row.items():
    table.add_row(name, value, style='bold' if name in ('top-1', 'difference of top-1') else '')
  Console().print(table)
  return row


def difference(found: accuracy.Paired) -> str:
  """Returns a paired difference in points, with its 95 % interval.

  >>> difference(accuracy.Paired(3, 10, -0.035, -0.0768, 0.0004, 0.092))
  '-3.50 points (95 %: -7.68 to +0.04)'
  """
  middle, low, high = (100 * x for x in (found.difference, found.low, found.high))
  return f'{middle:+.2f} points (95 %: {low:+.2f} to {high:+.2f})'


def share(is_right: np.ndarray) -> str:
  """Returns a share in percent, with its 95 % interval."""
  low, high = accuracy.interval(int(is_right.sum()), len(is_right))
  return f'{100 * is_right.mean():.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f})'


def main(_: list[str]) -> None:
  run(
    WEIGHTS.value,
    DATA_DIR.value,
    model=MODEL.value,
    source=SOURCE.value,
    dataset=DATASET.value,
    split=SPLIT.value,
    batch_size=BATCH_SIZE.value,
    against=AGAINST.value,
  )


if __name__ == '__main__':
  WEIGHTS = flags.DEFINE_string('weights', None, 'File of weights.', required=True)
  DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of TFDS.', required=True)
  MODEL = flags.DEFINE_string('model', None, 'Name of the network; default: recorded in the file.')
  SOURCE = flags.DEFINE_string('source', None, 'Source of the weights; default: detected.')
  DATASET = flags.DEFINE_string('dataset', 'imagenet2012', 'Name of the dataset in TFDS.')
  SPLIT = flags.DEFINE_string('split', 'validation', 'Split, such as test[:10%].')
  AGAINST = flags.DEFINE_string('against', None, 'Other weights of the network, to compare with.')
  BATCH_SIZE = flags.DEFINE_integer('batch_size', 50, 'Images at a time.', lower_bound=1)
  app.run(main)
