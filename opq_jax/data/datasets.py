"""Batches of images from TensorFlow Datasets, without TensorFlow.

`tfds.data_source` gives random access to a dataset that TFDS prepared as array_record files;
grain's `DataLoader` shards, shuffles, prepares and batches it.  To prepare one, on any machine that
has TensorFlow: `tfds build cifar10 --file_format=array_record --data_dir=…`.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from opq_jax.core.extras import require
from opq_jax.data.preprocessing import Preprocessing

if TYPE_CHECKING:
  import grain

PREFETCHED = 64
"""Examples that threads read ahead: four for each of grain's 16 threads.

Grain looks at all of them for every example that it gives, so a longer queue takes more time.
"""


def source(name: str, split: Any, data_dir: str | os.PathLike[str]) -> Sequence[dict[str, Any]]:
  """Opens one split of a dataset; nothing is ever downloaded.

  Args:
    name: the dataset, `'imagenet2012'`, or with its version, `'cifar10:3.0.2'`.
    split: in the syntax of TFDS: `'train'`, `'train[:10%]'`, `'train+validation'`.
    data_dir: the folder that holds `<name>/<version>/`.

  Returns:
    A sequence of examples as dicts, each decoded when it is indexed.

  Raises:
    ValueError: the folder lacks the dataset, or has it in a format that needs TensorFlow; the
      dataset lacks the split; or TFDS cannot be imported.
  """
  tfds = require('tensorflow_datasets', 'data', f'dataset {name}')
  folder = os.path.expanduser(os.fspath(data_dir))
  expected = f'expected {name} there, prepared by TFDS with file_format=array_record'
  try:
    builder = tfds.builder(name, data_dir=folder)
  # TFDS' own message lists every dataset that it knows
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(f'data_dir: found no {name} in {folder!r}, {expected}') from error
  if not builder.info.splits:
    raise ValueError(f'data_dir: found no {name} in {folder!r}, {expected}')
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:
    found = builder.info.file_format
    raise ValueError(
      f'data_dir: found {name} in {folder!r} as {found and found.value} files, {expected}'
    ) from error
  except ValueError as error:
    raise ValueError(
      f'split: found {split!r}, expected one made of {sorted(builder.info.splits)} ({error})'
    ) from error


def batches(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str],
  batch_size: int,
  preprocessing: Preprocessing,
  shuffle: bool = False,
  seed: int = 0,
  epochs: int | None = 1,
  drop_remainder: bool = False,
  worker_count: int = 0,
  shard: tuple[int, int] | None = None,
) -> 'grain.DataLoader':
  """Makes a loader of this process's batches of prepared images.

  The defaults are for evaluation: all processes together see every example exactly once, in the
  dataset's order, and the last batch may be smaller.  Shards differ by at most one example, so one
  process may have one batch more than another.

  Args:
    name: the dataset; see `source`.
    split: the split; see `source`.
    data_dir: the folder that holds the dataset.
    batch_size: examples in a batch of all processes together.
    preprocessing: from an image to a network's input.
    shuffle: True for a new order in every epoch; each process stays within its own shard.
    seed: of everything random.
    epochs: passes over the data, None for no end.  A batch may span two epochs.
    drop_remainder: True for training: all batches have the same size, and all processes equally
      many.  Left out are at most the last, incomplete batch of each process and the examples that
      do not divide among the processes.
    worker_count: 0 prepares images in this process: threads decode them, and the iterating thread
      prepares them.  n > 0 starts n processes, each of which makes every n-th batch: faster where
      preparation is the bottleneck.  They take seconds to start, and the order of the examples
      depends on n.  Each ends with an incomplete batch of its own (kept, or dropped with
      `drop_remainder`), which may come before the last one.  They copy this program's absl flags,
      which must have been parsed, as `absl.app.run` does.
    shard: (index, count) of this share; by default this JAX process among all.

  Returns:
    An iterable of dicts, `{'image': float32 [batch, height, width, 3], 'label': int32 [batch]}`.
    Each `iter()` starts from the first batch; `get_state` and `set_state` of the iterator are
    grain's.

  Raises:
    ValueError: see `source`; the batch size is not a positive multiple of the number of shards;
      workers are asked for while absl's flags are not parsed; or grain cannot be imported.
  """
  index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
  if batch_size <= 0 or batch_size % count:
    raise ValueError(
      f'batch_size: found {batch_size}, expected a positive multiple of the {count} processes'
    )
  if worker_count > 0:
    _check_flags(worker_count)
  tfds = require('tensorflow_datasets', 'data', f'dataset {name}')
  grain = require('grain', 'data', f'dataset {name}')
  # sharded here: grain's DataLoader rounds the length of a shard down (0.2.18)
  share = tfds.even_splits(split, count, drop_remainder=drop_remainder)[index]
  examples = source(name, share if count > 1 else split, data_dir)
  sampler = grain.samplers.IndexSampler(
    num_records=len(examples),
    shard_options=grain.sharding.NoSharding(),
    shuffle=shuffle,
    num_epochs=epochs,
    # a seed for each shard, or all shards would shuffle alike
    seed=int(np.random.SeedSequence((seed, index)).generate_state(1)[0]),
  )

  class Prepare(grain.transforms.Map):  # type: ignore[name-defined]
    """A decoded example of TFDS -> an input of a training or evaluation step."""

    def map(self, element: dict[str, Any]) -> dict[str, np.ndarray | np.int32]:
      return {'image': preprocessing(element['image']), 'label': np.int32(element['label'])}

  return grain.DataLoader(
    data_source=examples,
    sampler=sampler,
    read_options=grain.ReadOptions(num_threads=16, prefetch_buffer_size=PREFETCHED),
    operations=[
      Prepare(),
      grain.transforms.Batch(batch_size // count, drop_remainder=drop_remainder),
    ],
    worker_count=worker_count,
  )


def _check_flags(worker_count: int) -> None:
  """Raises ValueError unless absl's flags are parsed, which grain's workers copy."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    raise ValueError(
      f"worker_count: found {worker_count} and absl's flags not parsed, expected 0 or a program "
      'that was started by absl.app.run'
    )
