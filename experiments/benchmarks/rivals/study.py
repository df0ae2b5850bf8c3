"""What comparisons with rivals share: networks, judged images, calibration images, and rows."""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from configs import one_shot
from experiments.benchmarks import one_shot_images
from experiments.benchmarks.kernels import kernels_of, squared_error
from experiments.benchmarks.rivals.jobs import KERNELS, Job
from opq_jax.importers import networks
from opq_jax.report import accuracy

UNLABELLED = 128  # calibration images at most; the training photographs are 100
COLUMNS = (
  *('network', 'method', 'setting', 'correction', 'file_bytes', 'times_smaller'),
  *('top1', 'top1_low', 'top1_high', 'top5', 'agreement', 'divergence', 'top1_unseen'),
  *('squared_error', 'bits_per_weight', 'vector_bytes', 'encode_seconds', 'decode_seconds'),
  *('encode_processor', 'decode_processor'),
)
_KEY = 'network', 'method', 'setting', 'correction'


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
    return {tuple(row[name] for name in _KEY) for row in self.rows()}

  def add(self, row: Mapping[str, Any]) -> None:
    is_new = not self.path.exists()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, 'a', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
      if is_new:
        writer.writeheader()
      writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def copied(source: Table, target: Table, network: str, methods: Collection[str]) -> None:
  """Adds the rows of a network and of methods that the source holds and the target lacks."""
  made = target.made()
  for row in source.rows():
    key = tuple(row[name] for name in _KEY)
    if row['network'] == network and row['method'] in methods and key not in made:
      target.add(row)


class Study:
  """One network with the images of `configs/one_shot.py:NETWORK`, and the rows of its files.

  Attributes:
    name: of the network.
    network: of float weights.
    unlabelled: two batches of calibration images, of which ResNets are not judged on any.
  """

  def __init__(self, path: pathlib.Path, data_dir: str):
    self.name = path.stem.removesuffix('_cifar10')
    config = one_shot.get_config(self.name)
    self.network = networks.load(path, name=self.name, num_classes=config.num_classes)
    batches_of = functools.partial(one_shot_images.batches_of, config, self.network, data_dir)
    self._judge = one_shot_images.Judge(self.network, batches_of(config.split))
    # the images of `train` come first where they are among those that are judged
    self._seen = 0 if config.split == 'test' else sum(len(b['label']) for b in batches_of('train'))
    images = np.concatenate([b['image'] for b in batches_of(config.unlabelled_split)])[:UNLABELLED]
    half = len(images) // 2
    self.unlabelled = [jax.device_put(images[:half]), jax.device_put(images[half : 2 * half])]
    variables = self.network.variables
    self._float_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    self._weights = sum(kernel.size for kernel in kernels_of(variables).values())

  def _judged(self, tree: Any) -> dict[str, float]:
    logits, judge = self._judge.logits(tree), self._judge
    unseen = float(accuracy.hits(logits, judge.labels)[self._seen :].mean())
    return accuracy.scores(logits, judge.labels, judge.reference) | {'top1_unseen': unseen}

  def _row(self, job: Job) -> dict[str, Any]:
    found = job.make()
    variables = self.network.variables
    before = kernels_of(variables) if job.method.endswith(KERNELS) else variables
    row: dict[str, Any] = {
      'network': self.name,
      'method': job.method,
      'setting': job.setting,
      'correction': job.correction,
      'file_bytes': found.file_bytes,
      'bits_per_weight': 8 * (found.file_bytes - found.vector_bytes) / self._weights,
      'vector_bytes': found.vector_bytes,
      'encode_seconds': found.encode.clock,
      'decode_seconds': found.decode.clock,
      'encode_processor': found.encode.processor,
      'decode_processor': found.decode.processor,
      'squared_error': squared_error(before, found.variables),
    }
    if not job.method.endswith(KERNELS):
      row['times_smaller'] = self._float_bytes / found.file_bytes
      row |= self._judged(found.variables)
    return row

  def run(self, jobs: Iterable[Job], table: Table) -> None:
    """Adds the rows that a table lacks, the float network's first."""
    name = self.name
    if (name, 'float32', '', 'none') not in table.made():
      key = {'network': name, 'method': 'float32', 'setting': '', 'correction': 'none'}
      sizes = {'file_bytes': self._float_bytes, 'times_smaller': 1.0}
      table.add(key | sizes | self._judged(self.network.variables))
    done = table.made()
    jobs = [job for job in jobs if (name, *job[:3]) not in done]
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console()) as progress:
      task = progress.add_task(name, total=len(jobs))
      for job in jobs:
        progress.update(task, description=f'{name}: {job.method}, {job.setting}, {job.correction}')
        table.add(self._row(job))
        progress.advance(task)
