"""The endless stream of training batches, identical for any number of processes and threads.

Batch k of a stream is a function of (seed, k) alone: its examples (a new permutation of all in
every epoch; a batch may span two epochs) and the view of each.  Each process reads its own rows of
the batch.  A stream's position is therefore one number, and training resumes on exactly the same
images with other processes, devices or threads.

Examples are any sequence of {'image': uint8 [height, width, 3], 'label': a whole number}: a TFDS
source (`opq_jax.data.source`), one held in memory (`in_memory`), or random numbers (`fake`).
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from opq_jax.core.extras import require
from opq_jax.data.augmentation import UNIFORMS, Augmentation, Pixels
from opq_jax.data.preprocessing import Preprocessing

if TYPE_CHECKING:
  import grain

Examples = Sequence[dict[str, Any]]

_CHUNK = 500  # examples decoded by a thread at a time, so that threads finish together
_FAKE_IMAGES = 64  # distinct images of `fake`, which repeat: memory stays small for any count


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
) -> 'grain.DatasetIterator':
  """Makes an iterator of this process's rows of endless shuffled training batches.

  Args:
    examples: the whole dataset, in every process.
    batch_size: examples in a batch of all processes together.
    preprocessing: from a view to the network's input.
    augmentation: from an image to a view of it; None for none.
    seed: of the order and of the views.
    shard: (index, count) of this share of every batch; by default this JAX process among all.
    threads: number of threads that prepare whole batches ahead while the caller trains.
    prefetch: batches prepared ahead; at least one a thread.

  Returns:
    An iterator of {'image': float32 [rows, height, width, 3], 'label': int32 [rows]}.  Its
    `get_state()` is a small JSON-serializable dict, the position after the last batch that was
    taken; batches prepared ahead do not count.  `set_state` of any stream with the same examples,
    batch size and seed continues from there, without reading the batches before.

  Raises:
    ValueError: there are no examples; the batch size is not a positive multiple of the number of
      shards; or grain cannot be imported.

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
  grain = require('grain', 'data', 'a stream of batches')
  rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
  # two of 32 bits, which is what grain takes
  order_seed, view_seed = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))

  def batch(number: int, ids: Sequence[int]) -> dict[str, np.ndarray]:
    # drawn for all rows, so that no view depends on the number of processes
    uniforms = np.random.default_rng((view_seed, number)).random((batch_size, UNIFORMS))[rows]
    chosen = _take(examples, [int(i) for i in ids[rows]])
    images = [example['image'] for example in chosen]
    if augmentation is not None:
      images = [augmentation(image, u) for image, u in zip(images, uniforms, strict=True)]
    return _batch(chosen, images, preprocessing)

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
  """Yields batches of every example once, not augmented: for evaluation.

  Args:
    examples: the whole dataset, or a share of it.
    batch_size: examples in a batch; the last batch may be smaller.
    preprocessing: from an image to the network's input.

  >>> examples = fake((8, 8, 3), classes=5, count=5)
  >>> plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
  >>> [len(batch['label']) for batch in in_order(examples, batch_size=2, preprocessing=plain)]
  [2, 2, 1]
  """
  for begin in range(0, len(examples), batch_size):
    chosen = _take(examples, range(begin, min(begin + batch_size, len(examples))))
    yield _batch(chosen, [example['image'] for example in chosen], preprocessing)


def in_memory(examples: Examples, *, threads: int = 4) -> Examples:
  """Decodes all examples at once, for small datasets: CIFAR then takes 150 MB of memory.

  Args:
    examples: the dataset; only `image` and `label` are kept.
    threads: number of threads that decode.

  >>> len(in_memory(fake((8, 8, 3), classes=5, count=10)))
  10
  """

  def decoded(begin: int) -> list[dict[str, Any]]:
    ids = range(begin, min(begin + _CHUNK, len(examples)))
    return [{name: e[name] for name in ('image', 'label')} for e in _take(examples, ids)]

  with ThreadPoolExecutor(threads) as pool:
    return list(itertools.chain(*pool.map(decoded, range(0, len(examples), _CHUNK))))


def fake(
  shape: tuple[int, int, int], *, classes: int, count: int = 1024, seed: int = 0
) -> Examples:
  """Makes examples of noise with random labels, for tests and for measuring speed.

  Args:
    shape: (height, width, channels) of the images.
    classes: number of labels.
    count: number of examples.
    seed: of images and labels.

  >>> example = fake((8, 8, 3), classes=5, count=10)[3]
  >>> example['image'].shape, example['image'].dtype, 0 <= example['label'] < 5
  ((8, 8, 3), dtype('uint8'), True)
  """
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (min(count, _FAKE_IMAGES), *shape), np.uint8)
  labels = rng.integers(0, classes, count)
  return [{'image': images[i % len(images)], 'label': int(labels[i])} for i in range(count)]


def _take(examples: Examples, ids: Sequence[int]) -> list[dict[str, Any]]:
  """Returns the examples of these indices, in one read where the source allows that."""
  together = getattr(examples, '__getitems__', None)
  return list(together(ids)) if together else [examples[i] for i in ids]


def _batch(
  examples: Examples, views: Sequence[Pixels], preprocessing: Preprocessing
) -> dict[str, np.ndarray]:
  return {
    'image': np.stack([preprocessing(view) for view in views]),
    'label': np.array([example['label'] for example in examples], np.int32),
  }
