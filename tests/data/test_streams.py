"""The stream of training batches, each a function of the seed and its number alone."""

import itertools
import json

import numpy as np
import pytest

from opq_jax import data
from opq_jax.data import PadCropFlip, streams
from tests.helpers import assets

PLAIN = data.Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
COUNT = 23
EXAMPLES = [
  {'image': np.full((8, 8, 3), number + 1, np.uint8), 'label': number} for number in range(COUNT)
]


def open_stream(**options):
  options = {'batch_size': 4, 'preprocessing': PLAIN, 'seed': 3} | options
  return streams.stream(EXAMPLES, **options)


def take(stream, count):
  return list(itertools.islice(stream, count))


def labels(batches):
  return np.concatenate([batch['label'] for batch in batches])


def assert_same(found, expected):
  for one, other in zip(found, expected, strict=True):
    for name in ('image', 'label'):
      np.testing.assert_array_equal(one[name], other[name])


def test_stream_batch_dtypes():
  batch = next(open_stream())
  assert (batch['image'].shape, batch['image'].dtype) == ((4, 8, 8, 3), np.float32)
  assert (batch['label'].shape, batch['label'].dtype) == ((4,), np.int32)
  np.testing.assert_allclose(batch['image'][:, 0, 0, 0], batch['label'] + 1, rtol=1e-6)


def test_stream_permutes_every_epoch():
  order = labels(take(open_stream(), 3 * COUNT))[: 3 * COUNT].reshape(3, COUNT)
  for epoch in order:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(COUNT))
  assert (order[0] != order[1]).any() and (order[1] != order[2]).any()


def test_stream_is_determined_by_seed():
  options = {'augmentation': PadCropFlip(padding=2)}
  first = take(open_stream(**options), 12)
  assert_same(take(open_stream(**options, threads=1, prefetch=1), 12), first)
  other = take(open_stream(**options, seed=4), 12)
  assert (labels(other) != labels(first)).any()


@pytest.mark.parametrize('count', [2, 4])
def test_stream_shards_are_rows(count):
  options = {'augmentation': PadCropFlip(padding=2), 'batch_size': 8}
  whole = take(open_stream(**options), 6)
  parts = [take(open_stream(**options, shard=(i, count)), 6) for i in range(count)]
  together = [
    {name: np.concatenate([part[k][name] for part in parts]) for name in ('image', 'label')}
    for k in range(6)
  ]
  assert_same(together, whole)


@pytest.mark.parametrize('taken', [0, 1, 7])
def test_stream_continues_in_other_shards(taken):
  options = {'augmentation': PadCropFlip(padding=2), 'batch_size': 8}
  before = open_stream(**options)
  take(before, taken)
  position = json.loads(json.dumps(before.get_state()))
  rest = take(before, 4)
  again = open_stream(**options)
  take(again, 2)
  again.set_state(position)
  assert_same(take(again, 4), rest)
  half = open_stream(**options, shard=(1, 2))
  half.set_state(position)
  assert_same(take(half, 4), [{name: leaf[4:] for name, leaf in b.items()} for b in rest])


def test_stream_views_differ_by_epoch():
  noise = streams.fake((8, 8, 3), classes=2, count=4)
  batches = take(
    streams.stream(noise, batch_size=4, preprocessing=PLAIN, augmentation=PadCropFlip()), 4
  )
  assert len({batch['image'].sum() for batch in batches}) == 4


def test_in_order_yields_examples_once():
  batches = list(streams.in_order(EXAMPLES, batch_size=10, preprocessing=PLAIN))
  assert [len(batch['label']) for batch in batches] == [10, 10, 3]
  np.testing.assert_array_equal(labels(batches), np.arange(COUNT))


def test_in_memory_keeps_order():
  held = streams.in_memory([{**example, 'id': b'x'} for example in EXAMPLES * 50])
  assert len(held) == 50 * COUNT
  assert [e['label'] for e in held] == [e['label'] for e in EXAMPLES] * 50
  assert set(held[0]) == {'image', 'label'}


def test_fake_is_determined_by_seed():
  one, same, other = (streams.fake((4, 4, 3), classes=9, count=70, seed=s) for s in (0, 0, 1))
  assert len(one) == 70 and {e['label'] for e in one} <= set(range(9))
  for example, twin in zip(one, same, strict=True):
    np.testing.assert_array_equal(example['image'], twin['image'])
  assert (one[0]['image'] != other[0]['image']).any()


def test_stream_errors():
  with pytest.raises(
    ValueError, match='batch_size: found 5, expected a positive multiple of the 2'
  ):
    open_stream(batch_size=5, shard=(0, 2))
  with pytest.raises(ValueError, match='examples: found none'):
    streams.stream([], batch_size=4, preprocessing=PLAIN)


def test_stream_of_cifar10():
  folder = assets.assets() / 'tfds'
  source = data.source('cifar10', 'train[:700]', folder)
  options = {'batch_size': 64, 'preprocessing': data.CIFAR, 'augmentation': PadCropFlip()}
  from_disk = take(streams.stream(source, **options), 3)
  assert_same(take(streams.stream(streams.in_memory(source), **options), 3), from_disk)
  assert from_disk[0]['image'].shape == (64, 32, 32, 3)
