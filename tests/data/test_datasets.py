"""Batches of a dataset made here, and of CIFAR-10 where the assets are present."""

import io
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from opq_jax import data
from tests.helpers import assets

PLAIN = data.Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
EXAMPLES = 23


def example(number):
  """An image that says its number, and a label."""
  return np.full((6, 8, 3), 10 * number, np.uint8), number % 5


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  with tfds.core.registered.skip_registration():

    class Numbered(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')

      def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format='png')
        label = tfds.features.ClassLabel(num_classes=5)
        features = tfds.features.FeaturesDict({'image': image, 'label': label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, _):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for number in range(EXAMPLES):
          image, label = example(number)
          # TFDS needs TensorFlow to encode an image, but not to store an encoded one
          png = io.BytesIO()
          Image.fromarray(image).save(png, 'PNG')
          png.seek(0)
          yield number, {'image': png, 'label': label}

  Numbered(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def load(data_dir, **options):
  options = {'batch_size': 4, 'preprocessing': PLAIN} | options
  return data.batches('numbered', 'train', data_dir=data_dir, **options)


def numbers(batches):
  """The numbers of the examples, in their order."""
  return [int(value) // 10 for batch in batches for value in batch['image'][:, 0, 0, 0]]


def test_batches_are_in_order(data_dir):
  batches = list(load(data_dir))
  assert [len(batch['label']) for batch in batches] == [4, 4, 4, 4, 4, 3]
  assert numbers(batches) == list(range(EXAMPLES))
  assert [int(label) for batch in batches for label in batch['label']] == [
    number % 5 for number in range(EXAMPLES)
  ]
  for batch in batches:
    assert batch['image'].dtype == np.float32
    assert batch['image'].shape[1:] == (6, 8, 3)
    assert batch['label'].dtype == np.int32


def test_batches_start_anew(data_dir):
  loader = load(data_dir, shuffle=True, seed=3)
  assert numbers(loader) == numbers(loader)


@pytest.mark.parametrize('count', [2, 3, 5])
def test_shards_partition_the_examples(data_dir, count):
  shards = [numbers(load(data_dir, shard=(i, count), batch_size=4 * count)) for i in range(count)]
  assert sorted(itertools.chain(*shards)) == list(range(EXAMPLES))
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_batch_size_is_over_all_shards(data_dir):
  first = next(iter(load(data_dir, shard=(1, 2), batch_size=8)))
  assert len(first['label']) == 4


def test_drop_remainder_makes_shards_equal(data_dir):
  for index in range(3):
    batches = list(load(data_dir, shard=(index, 3), batch_size=6, drop_remainder=True))
    assert [len(batch['label']) for batch in batches] == [2, 2, 2]


def test_shuffle_is_determined_by_seed(data_dir):
  order = numbers(load(data_dir, shuffle=True, seed=0, epochs=2))
  first, second = order[:EXAMPLES], order[EXAMPLES:]
  assert sorted(first) == sorted(second) == list(range(EXAMPLES))
  assert first != second
  assert order == numbers(load(data_dir, shuffle=True, seed=0, epochs=2))
  assert order != numbers(load(data_dir, shuffle=True, seed=1, epochs=2))


def test_batches_without_epochs_are_endless(data_dir):
  batches = iter(load(data_dir, epochs=None, drop_remainder=True))
  seen = numbers([next(batches) for _ in range(30)])
  assert seen == [number % EXAMPLES for number in range(120)]


def test_batches_continue_from_saved_state(data_dir):
  batches = iter(load(data_dir, shuffle=True))
  next(batches)
  state = batches.get_state()
  rest = numbers(batches)
  again = iter(load(data_dir, shuffle=True))
  again.set_state(state)
  assert numbers(again) == rest


def test_source_gives_single_examples(data_dir):
  examples = data.source('numbered', 'train[3:7]', data_dir)
  assert len(examples) == 4
  np.testing.assert_array_equal(examples[1]['image'], example(4)[0])


@pytest.mark.parametrize('name', ['cifar10', 'no_such_dataset'])
def test_source_never_downloads(tmp_path, name):
  with pytest.raises(ValueError, match=f'data_dir: found no {name} in .*expected {name} there'):
    data.source(name, 'test', tmp_path / 'nowhere')
  assert not list(tmp_path.iterdir())


def test_source_names_the_splits(data_dir):
  with pytest.raises(ValueError, match=r"split: found 'test', expected one made of \['train'\]"):
    data.source('numbered', 'test', data_dir)


@pytest.mark.parametrize('batch_size', [0, 5])
def test_batch_size_must_divide(data_dir, batch_size):
  message = f'batch_size: found {batch_size}, expected a positive multiple of the 2 processes'
  with pytest.raises(ValueError, match=message):
    load(data_dir, batch_size=batch_size, shard=(0, 2))


def test_workers_need_parsed_flags(data_dir, monkeypatch):
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  with pytest.raises(ValueError, match='worker_count: found 2'):
    load(data_dir, worker_count=2)


def test_source_reads_cifar10():
  folder = assets.assets() / 'tfds'
  [batch] = data.batches(
    'cifar10', 'test[:50]', data_dir=folder, batch_size=64, preprocessing=data.CIFAR
  )
  assert batch['image'].shape == (50, 32, 32, 3)
  first = data.source('cifar10', 'test', folder)[0]
  np.testing.assert_array_equal(batch['image'][0], data.CIFAR(first['image']))
  assert batch['label'][0] == first['label']
  assert len(data.source('cifar10', 'train', folder)) == 50_000
