"""File sizes and accuracy against MPEG's NNCodec, on the same networks and images.

    python3 -m venv NNCODEC && NNCODEC/bin/pip install nncodec==2.1.3
    python -m experiments.benchmarks.rivals.against_nncodec TFDS_FOLDER WEIGHTS.safetensors ... \
      --nncodec_python NNCODEC/bin/python

NNCodec (ISO/IEC 15938-17) needs numpy below 2 and so an environment of its own, where
`nncodec_worker.py` runs.  Each file of weights is named as a network (`mobilenet_v1.safetensors`),
with the images of `configs/one_shot.py:NETWORK`.  Rows that experiments/results/against_nncodec
already holds are not made again.

Networks are judged as decoded from files that were written and read back; only our files of kernels
alone stay in memory.  `noise` is `opq_jax.correction.correct_batch_norm` and `synthetic` is
`opq_jax.correction.correct_on_images` with `opq_jax.correction.synthetic_inputs`, for both codecs.
NNCodec's corrected vectors form a stream of their own, quantized as all its vectors; its bytes
replace those of the uncorrected vectors.  Seconds are from the weights to the file, including
correction and moments; the first of a kind includes XLA's compilation.  Processor time is reliable
on a busy machine too.
"""

import argparse
import csv
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from configs import one_shot
from experiments.benchmarks import one_shot_images
from experiments.benchmarks.kernels import kernels_of, squared_error
from experiments.benchmarks.rivals.jobs import FEEDBACK, KERNELS, LAYERS
from experiments.benchmarks.rivals.nncodec_jobs import (
  NNCodec,
  jobs_of_nncodec,
  jobs_of_nncodec_errors,
)
from experiments.benchmarks.rivals.nncodec_summary import RESULTS, UNLABELLED, report
from experiments.benchmarks.rivals.opq_jobs import jobs_of_our_errors, jobs_of_ours
from experiments.benchmarks.rivals.recipe_jobs import jobs_of_recipes
from opq_jax.importers import networks
from opq_jax.report import accuracy

COLUMNS = (
  *('network', 'method', 'setting', 'correction', 'file_bytes', 'times_smaller'),
  *('top1', 'top1_low', 'top1_high', 'top5', 'agreement', 'divergence', 'top1_unseen'),
  *('squared_error', 'bits_per_weight', 'vector_bytes', 'encode_seconds', 'decode_seconds'),
  *('encode_processor', 'decode_processor'),
)


@dataclasses.dataclass
class Table:
  """results.csv, which is written row by row."""

  path: pathlib.Path

  def rows(self) -> list[dict[str, str]]:
    if not self.path.exists():
      return []
    with open(self.path, newline='') as file:
      return list(csv.DictReader(file))

  def made(self) -> set[tuple[str, ...]]:
    names = 'network', 'method', 'setting', 'correction'
    return {tuple(row[name] for name in names) for row in self.rows()}

  def add(self, row: Mapping[str, Any]) -> None:
    is_new = not self.path.exists()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, 'a', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      if is_new:
        writer.writeheader()
      writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def compare(name: str, path: pathlib.Path, data_dir: str, python: str, table: Table) -> None:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  variables = network.variables
  console = Console()

  batches_of = functools.partial(one_shot_images.batches_of, config, network, data_dir)
  with (
    tempfile.TemporaryDirectory() as place,
    Progress(
      *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress,
  ):
    folder = pathlib.Path(place)
    batches = batches_of(config.split)
    judge = one_shot_images.Judge(network, batches)
    # the images of `train` come first where they are among those that are judged
    seen = 0 if config.split == 'test' else sum(len(b['label']) for b in batches_of('train'))
    images = np.concatenate([b['image'] for b in batches_of(config.unlabelled_split)])[:UNLABELLED]
    half = len(images) // 2
    unlabelled = [jax.device_put(images[:half]), jax.device_put(images[half : 2 * half])]
    float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    weights = sum(kernel.size for kernel in kernels_of(variables).values())

    def judged(tree: Any) -> dict[str, float]:
      logits = judge.logits(tree)
      unseen = float(accuracy.hits(logits, judge.labels)[seen:].mean())
      return accuracy.scores(logits, judge.labels, judge.reference) | {'top1_unseen': unseen}

    if (name, 'float32', '', 'none') not in table.made():
      sizes = {'file_bytes': float_bytes, 'times_smaller': 1.0}
      key = {'network': name, 'method': 'float32', 'setting': '', 'correction': 'none'}
      table.add(key | sizes | judged(variables))

    nncodec = NNCodec(python, folder)
    jobs = [
      *jobs_of_ours(network, unlabelled, folder),
      *jobs_of_nncodec(network, nncodec),
      *jobs_of_our_errors(network),
      *jobs_of_nncodec_errors(network, nncodec),
      *jobs_of_recipes(network, folder),
    ]
    done = table.made()
    jobs = [job for job in jobs if (name, *job[:3]) not in done]
    # who has little time has the answers to most questions first
    slow = FEEDBACK, LAYERS
    jobs.sort(key=lambda job: (job.method.startswith(slow), KERNELS in job.method))
    task = progress.add_task(name, total=len(jobs))
    for job in jobs:
      progress.update(task, description=f'{name}: {job.method}, {job.setting}, {job.correction}')
      found = job.make()
      row: dict[str, Any] = {
        'network': name,
        'method': job.method,
        'setting': job.setting,
        'correction': job.correction,
        'file_bytes': found.file_bytes,
        'bits_per_weight': 8 * (found.file_bytes - found.vector_bytes) / weights,
        'vector_bytes': found.vector_bytes,
        'encode_seconds': found.encode.clock,
        'decode_seconds': found.decode.clock,
        'encode_processor': found.encode.processor,
        'decode_processor': found.decode.processor,
        'squared_error': squared_error(
          kernels_of(variables) if job.method.endswith(KERNELS) else variables, found.variables
        ),
      }
      if not job.method.endswith(KERNELS):
        row |= {'times_smaller': float_bytes / found.file_bytes} | judged(found.variables)
      table.add(row)
      progress.advance(task)
    nncodec.close()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('data_dir', help='TFDS folder of array_record files')
  parser.add_argument('weights', nargs='+', type=pathlib.Path)
  parser.add_argument('--nncodec_python', default=sys.executable)
  arguments = parser.parse_args()
  table = Table(RESULTS / 'results.csv')
  for path in arguments.weights:
    name = path.stem.removesuffix('_cifar10')
    compare(name, path, arguments.data_dir, arguments.nncodec_python, table)
  words = ' '.join(path.name for path in arguments.weights)
  command = 'python -m experiments.benchmarks.rivals.against_nncodec TFDS_FOLDER '
  report(table.rows(), f'{command}{words} --nncodec_python NNCODEC/bin/python')


if __name__ == '__main__':
  main()
