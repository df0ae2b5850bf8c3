"""Batches from a dataset that is made here, and from the assets' where they are."""

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


def test_evaluation_sees_every_example_once_in_order(data_dir):
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


def test_the_loader_starts_anew_every_time(data_dir):
  loader = load(data_dir, shuffle=True, seed=3)
  assert numbers(loader) == numbers(loader)


@pytest.mark.parametrize('count', [2, 3, 5])
def test_shards_together_hold_every_example_once(data_dir, count):
  shards = [numbers(load(data_dir, shard=(i, count), batch_size=4 * count)) for i in range(count)]
  assert sorted(itertools.chain(*shards)) == list(range(EXAMPLES))
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_batch_size_is_that_of_all_processes_together(data_dir):
  first = next(iter(load(data_dir, shard=(1, 2), batch_size=8)))
  assert len(first['label']) == 4


def test_training_shards_have_equally_many_full_batches(data_dir):
  for index in range(3):
    batches = list(load(data_dir, shard=(index, 3), batch_size=6, drop_remainder=True))
    assert [len(batch['label']) for batch in batches] == [2, 2, 2]


def test_shuffling_is_a_new_permutation_each_epoch_determined_by_the_seed(data_dir):
  order = numbers(load(data_dir, shuffle=True, seed=0, epochs=2))
  first, second = order[:EXAMPLES], order[EXAMPLES:]
  assert sorted(first) == sorted(second) == list(range(EXAMPLES))
  assert first != second
  assert order == numbers(load(data_dir, shuffle=True, seed=0, epochs=2))
  assert order != numbers(load(data_dir, shuffle=True, seed=1, epochs=2))


def test_no_number_of_epochs_means_no_end(data_dir):
  batches = iter(load(data_dir, epochs=None, drop_remainder=True))
  seen = numbers([next(batches) for _ in range(30)])
  assert seen == [number % EXAMPLES for number in range(120)]


def test_an_iterator_continues_from_its_saved_state(data_dir):
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
def test_a_missing_dataset_is_an_error_and_no_download(tmp_path, name):
  with pytest.raises(ValueError, match=f'data_dir: found no {name} in .*expected {name} there'):
    data.source(name, 'test', tmp_path / 'nowhere')
  assert not list(tmp_path.iterdir())


def test_a_missing_split_is_an_error_that_names_those_there(data_dir):
  with pytest.raises(ValueError, match=r"split: found 'test', expected one made of \['train'\]"):
    data.source('numbered', 'test', data_dir)


@pytest.mark.parametrize('batch_size', [0, 5])
def test_a_batch_size_that_does_not_divide_among_processes_is_an_error(data_dir, batch_size):
  message = f'batch_size: found {batch_size}, expected a positive multiple of the 2 processes'
  with pytest.raises(ValueError, match=message):
    load(data_dir, batch_size=batch_size, shard=(0, 2))


def test_workers_without_parsed_flags_are_an_error_at_once(data_dir, monkeypatch):
  monkeypatch.setattr(flags, 'FLAGS', flags.FlagValues())
  with pytest.raises(ValueError, match='worker_count: found 2'):
    load(data_dir, worker_count=2)


def test_tf_slim_maps_bytes_to_exactly_minus_one_to_one():
  image = np.arange(256, dtype=np.uint8).repeat(256 * 3).reshape(256, 256, 3)
  prepared = data.TF_SLIM(image)
  assert prepared.shape == (224, 224, 3)
  expected = np.arange(16, 240, dtype=np.float32) / np.float32(127.5) - np.float32(1)
  np.testing.assert_allclose(prepared[:, 0, 0], expected, rtol=0, atol=1e-7)
  ends = np.array([0, 255], np.uint8).repeat(3).reshape(1, 2, 3)
  whole = data.Preprocessing(mean=data.TF_SLIM.mean, std=data.TF_SLIM.std)
  np.testing.assert_array_equal(whole(ends)[0, :, 0], [-1, 1])


def test_channels_are_standardised_each_by_its_own_statistics():
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(data.CIFAR(image), expected, rtol=1e-5, atol=1e-6)


def test_the_crop_is_the_middle_and_an_image_of_the_right_size_is_not_resampled():
  image = np.random.default_rng(0).integers(0, 256, (256, 341, 3), np.uint8)
  cut = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=256, crop=224)(image)
  np.testing.assert_allclose(cut, image[16:240, 58:282], atol=1e-4)


@pytest.mark.parametrize('shape', [(512, 640), (640, 512)])
def test_the_shorter_side_is_resized_with_an_area_that_shrinks_faithfully(shape):
  # a fine checkerboard: picking single pixels would give black or white, an average gives grey
  board = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)
  resize = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=256)
  small = resize(np.repeat(board[:, :, None], 3, axis=2))
  assert small.shape == (shape[0] // 2, shape[1] // 2, 3)
  assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 2


@pytest.mark.parametrize('resample', ['bilinear', 'bicubic'])
def test_resizing_is_pils_with_the_filter_asked_for(resample):
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  resize = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=30, resample=resample)
  expected = Image.fromarray(image).resize((45, 30), Image.Resampling[resample.upper()])
  np.testing.assert_allclose(resize(image), np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (
      np.zeros((300, 300, 3), np.float32),
      r'found float32 of shape \(300, 300, 3\), expected uint8',
    ),
    (np.zeros((300, 300, 1), np.uint8), r'found uint8 of shape \(300, 300, 1\), expected uint8'),
  ],
)
def test_what_is_no_colour_image_is_an_error(image, message):
  with pytest.raises(ValueError, match=message):
    data.TORCHVISION(image)


def test_an_image_smaller_than_the_crop_is_an_error():
  crop = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, crop=224)
  with pytest.raises(ValueError, match='found 32 x 300 pixels, expected at least the crop of 224'):
    crop(np.zeros((32, 300, 3), np.uint8))


def test_cifar10_of_the_assets():
  folder = assets.assets() / 'tfds'
  [batch] = data.batches(
    'cifar10', 'test[:50]', data_dir=folder, batch_size=64, preprocessing=data.CIFAR
  )
  assert batch['image'].shape == (50, 32, 32, 3)
  first = data.source('cifar10', 'test', folder)[0]
  np.testing.assert_array_equal(batch['image'][0], data.CIFAR(first['image']))
  assert batch['label'][0] == first['label']
  assert len(data.source('cifar10', 'train', folder)) == 50_000
