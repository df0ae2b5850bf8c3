r"""Top-1 and top-5 of a network on a split of any TFDS dataset in array_record format.

    python -m experiments.evaluate --weights=resnet50.pth --model=resnet50 --data_dir=DIR
    python -m experiments.evaluate --weights=resnet50.opq --data_dir=DIR

Weights are anything that `opq_jax.importers.networks.load` reads: files of other frameworks, of
Flax, and .opq files.  A file of `opq compress --model` records its network.  Images are prepared as
by the source of the weights.
"""

import pathlib
import time

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opq_jax import data
from opq_jax.importers import networks
from opq_jax.report import accuracy


def run(
  weights: str,
  data_dir: str,
  *,
  model: str | None = None,
  source: str | None = None,
  dataset: str = 'imagenet2012',
  split: str = 'validation',
  batch_size: int = 50,
) -> dict[str, str]:
  """Evaluates a network, prints a table, and returns its rows."""
  examples = data.source(dataset, split, data_dir)
  classes = examples.dataset_info.features['label'].num_classes
  # a network with one more class has TensorFlow's background class
  network = networks.load(weights, name=model, source=source, num_classes=classes)
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
  console = Console()
  columns = (TextColumn(network.name), BarColumn(), MofNCompleteColumn(), TextColumn('images'))
  with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
    task = progress.add_task('evaluating', total=len(examples))
    for batch in batches:
      images, labels = batch['image'], batch['label']
      # the last batch is padded to the compiled shape
      images = np.resize(images, (batch_size, *images.shape[1:]))
      start = time.perf_counter()
      logits = np.asarray(forward(network.variables, images))[: len(labels)]
      seconds.append(time.perf_counter() - start)
      top_1.append(accuracy.hits(logits, labels))
      top_5.append(accuracy.hits(logits, labels, k=5))
      progress.advance(task, len(labels))

  row = {
    'network': f'{network.name}, {network.model.num_classes} classes',
    'weights': f'{pathlib.Path(weights).name}, prepared as for {network.source.name}',
    'images': f'{len(examples):,} of {dataset}, {split}',
    'top-1': share(np.concatenate(top_1)),
    'top-5': share(np.concatenate(top_5)),
  }
  if seconds[1:]:
    # the first batch compiles
    row['images per second'] = f'{batch_size / np.median(seconds[1:]):.1f} (the network alone)'
  table = Table(show_header=False)
  for name, value in row.items():
    table.add_row(name, value, style='bold' if name == 'top-1' else '')
  console.print(table)
  return row


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
  )


if __name__ == '__main__':
  WEIGHTS = flags.DEFINE_string('weights', None, 'File of weights.', required=True)
  DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of TFDS.', required=True)
  MODEL = flags.DEFINE_string('model', None, 'Name of the network; default: recorded in the file.')
  SOURCE = flags.DEFINE_string('source', None, 'Source of the weights; default: detected.')
  DATASET = flags.DEFINE_string('dataset', 'imagenet2012', 'Name of the dataset in TFDS.')
  SPLIT = flags.DEFINE_string('split', 'validation', 'Split, such as test[:10%].')
  BATCH_SIZE = flags.DEFINE_integer('batch_size', 50, 'Images at a time.', lower_bound=1)
  app.run(main)
