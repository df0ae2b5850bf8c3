"""The endless stream of training batches, the same whoever reads it and from wherever.

Batch k of a stream is a function of (seed, k) alone: which examples it holds (a permutation of all
in every epoch, batches running on from one into the next) and which view of each.  A process of
many reads its own rows of it.  So a stream's position is one number, and training continues with
other processes, devices or threads on the very same images.

Examples are any sequence of {'image': uint8 [height, width, 3], 'label': a whole number}: a TFDS
source (`opq_jax.data.datasets.source`), one held in memory (`in_memory`), or random numbers
(`fake`).
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np

from opq_jax.data.augmentation import UNIFORMS, Augmentation, Pixels
from opq_jax.data.datasets import Preprocessing

Examples = Sequence[dict[str, Any]]

_CHUNK = 500  # examples that a thread decodes at a time
_FAKE_IMAGES = 64


def stream(
  examples: Examples,
  *,
  batch_size: int,
  preprocessing: Preprocessing,
  augmentation: Augmentation | None = None,
  seed: int = 0,
  shard: tuple[int, int] | None = None,
  threads: int = 2,
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Endless shuffled batches for training: this process's rows of them.

  Args:
    examples: all of them, in every process.
    batch_size: examples in a batch of all processes together.
    preprocessing: from the view to the network's input.
    augmentation: from the image to a view of it; None leaves it as it is.
    seed: of the order and of the views.
    shard: (index, count) of this share of every batch; by default this JAX process among all.
    threads: that prepare whole batches ahead, while the caller trains.
    prefetch: batches that are prepared ahead; at least one a thread.

  Returns:
    An iterator of {'image': float32 [rows, height, width, 3], 'label': int32 [rows]}.  Its
    `get_state()` is a small dict that JSON can hold, the position after the last batch that was
    taken, whatever is prepared ahead; `set_state` of any stream with the same examples, batch size
    and seed goes there at once.

  Raises:
    ValueError: there are no examples, or the batch size is not a positive multiple of the number
      of shards.

  >>> examples = fake((8, 8, 3), classes=5, count=10)
  >>> plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
  >>> batches = stream(examples, batch_size=4, preprocessing=plain)
  >>> next(batches)['image'].shape, batches.get_state()
  ((4, 8, 8, 3), {'next_index': 1})
  """
  index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
  if batch_size <= 0 or batch_size % count:
    raise ValueError(
      f'batch_size: found {batch_size}, expected a positive multiple of the {count} processes'
    )
  if not len(examples):
    raise ValueError('examples: found none, expected at least one')
  rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
  # grain takes 32 bits
  order_seed, view_seed = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))

  def batch(number: int, ids: Sequence[int]) -> dict[str, np.ndarray]:
    # drawn for the whole batch, so that no view depends on the number of processes
    uniforms = np.random.default_rng((view_seed, number)).random((batch_size, UNIFORMS))[rows]
    found = _take(examples, [int(i) for i in ids[rows]])
    images = [example['image'] for example in found]
    if augmentation is not None:
      images = [augmentation(image, u) for image, u in zip(images, uniforms, strict=True)]
    return _batch(found, images, preprocessing)

  batches = (
    grain.MapDataset.range(len(examples))
    .shuffle(seed=order_seed)
    .repeat()
    .batch(batch_size)
    .map_with_index(batch)
  )
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
  return iter(batches.to_iter_dataset(options))


def in_order(
  examples: Examples, *, batch_size: int, preprocessing: Preprocessing
) -> Iterator[dict[str, np.ndarray]]:
  """Every example once, as it is: for evaluation.  The last batch may be smaller."""
  for begin in range(0, len(examples), batch_size):
    found = _take(examples, range(begin, min(begin + batch_size, len(examples))))
    yield _batch(found, [example['image'] for example in found], preprocessing)


def in_memory(examples: Examples, *, threads: int = 4) -> Examples:
  """The same examples, all decoded now: for a dataset like CIFAR, which then costs 150 MB."""

  def decoded(begin: int) -> list[dict[str, Any]]:
    ids = range(begin, min(begin + _CHUNK, len(examples)))
    return [{name: e[name] for name in ('image', 'label')} for e in _take(examples, ids)]

  with ThreadPoolExecutor(threads) as pool:
    return list(itertools.chain(*pool.map(decoded, range(0, len(examples), _CHUNK))))


def fake(
  shape: tuple[int, int, int], *, classes: int, count: int = 1024, seed: int = 0
) -> Examples:
  """Noise with random labels, of the right shapes: for tests and for measuring speed."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (min(count, _FAKE_IMAGES), *shape), np.uint8)
  labels = rng.integers(0, classes, count)
  return [{'image': images[i % len(images)], 'label': int(labels[i])} for i in range(count)]


def _take(examples: Examples, ids: Sequence[int]) -> list[dict[str, Any]]:
  """The examples of these numbers; at once, where the source can."""
  together = getattr(examples, '__getitems__', None)
  return list(together(ids)) if together else [examples[i] for i in ids]


def _batch(
  examples: Examples, views: Sequence[Pixels], preprocessing: Preprocessing
) -> dict[str, np.ndarray]:
  return {
    'image': np.stack([preprocessing(view) for view in views]),
    'label': np.array([example['label'] for example in examples], np.int32),
  }
