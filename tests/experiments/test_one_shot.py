"""The one-shot experiment on four images and a network of random weights."""

import csv
import io
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from safetensors.numpy import save_file

import opq_jax
from configs.one_shot import NETWORKS, get_config
from experiments import one_shot
from opq_jax import importers
from opq_jax.importers import networks
from tests.helpers import tiny_resnet

pytestmark = pytest.mark.slow


@pytest.fixture
def data_dir(tmp_path):
  folder = tmp_path / 'tfds'
  folder.mkdir()
  with tfds.core.registered.skip_registration():

    class Photographs(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')

      def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format='png')
        label = tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({'image': image, 'label': label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, _):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        rng = np.random.default_rng(0)
        for number in range(4):
          png = io.BytesIO()
          Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(png, 'PNG')
          png.seek(0)
          yield number, {'image': png, 'label': number}

  Photographs(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def test_one_shot_writes_its_results(tmp_path, data_dir, capsys, monkeypatch):
  pytest.importorskip('matplotlib')
  tiny_resnet.replace_resnet20(monkeypatch)
  save_file(tiny_resnet.tensors(), tmp_path / 'net.safetensors')
  config = get_config('resnet20')
  config.update(
    {
      'weights': str(tmp_path / 'net.safetensors'),
      'num_classes': tiny_resnet.CLASSES,
      'dataset': 'photographs',
      'split': 'train',
      'unlabelled_split': 'train',
      'data_dir': str(data_dir),
      'batch_size': 2,
      'bits': (2.0,),
    }
  )
  workdir = tmp_path / 'out'
  rows = one_shot.run(config, workdir)

  assert [(row['moments'], row['correction'], row['bits_asked']) for row in rows] == [
    ('none', 'none', 32.0),
    ('none', 'none', 2.0),
    ('none', 'noise', 2.0),
    ('none', 'images', 2.0),
    ('synthetic', 'none', 2.0),
    ('synthetic', 'synthetic', 2.0),
    ('images', 'none', 2.0),
    ('images', 'images', 2.0),
  ]
  # feedback changes what the files hold, and not their sizes
  assert rows[5]['file_bytes'] == pytest.approx(rows[2]['file_bytes'], rel=0.01)
  assert rows[7]['file_bytes'] == pytest.approx(rows[3]['file_bytes'], rel=0.01)
  for row in rows[1:]:
    assert row['bits_per_weight'] == pytest.approx(row['bits_asked'], rel=0.01)
    assert row['top1_low'] <= row['top1'] <= row['top1_high']
  path = workdir / 'balanced_error_2_bits.opq'
  assert path.stat().st_size == rows[2]['file_bytes']
  assert networks.load(path).name == 'resnet20'
  with open(workdir / 'results.csv') as file:
    written = list(csv.DictReader(file))
  assert [float(row['top1']) for row in written] == [row['top1'] for row in rows]
  assert (workdir / 'top1_over_file_size.png').read_bytes().startswith(b'\x89PNG')
  record = (workdir / 'run.json').read_text()
  assert json.loads(record)['images'] == 4
  assert str(tmp_path) not in record
  assert 'balanced_error' in capsys.readouterr().out


class Plain(nn.Module):
  """No BatchNorm."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.Conv(16, (3, 3), (4, 4), name='conv')(x))
    return nn.Dense(self.num_classes, name='head')(x.reshape(len(x), -1))


def test_one_shot_without_batch_norm(tmp_path, data_dir, monkeypatch):
  pytest.importorskip('matplotlib')
  variables = Plain().init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  source = importers.sources('resnet20')[0]

  def load(path, **options):
    found = opq_jax.load(path)[0] if str(path).endswith('.opq') else variables
    return networks.Network('resnet20', Plain(), found, source)

  monkeypatch.setattr(networks, 'load', load)
  config = get_config('resnet20')
  config.update({'dataset': 'photographs', 'split': 'train', 'unlabelled_split': 'train'})
  config.update({'data_dir': str(data_dir), 'batch_size': 2, 'bits': (2.0,)})
  rows = one_shot.run(config, tmp_path / 'out')
  assert [(row['moments'], row['correction']) for row in rows[1:]] == [
    ('none', 'none'),
    ('none', 'images'),
    ('synthetic', 'none'),
    ('images', 'none'),
    ('images', 'images'),
  ]
  network, state = opq_jax.load(tmp_path / 'out/balanced_error_2_bits.opq')
  plain = opq_jax.apply_compression(variables, state)
  for layer, leaves in network['params'].items():
    np.testing.assert_array_equal(leaves['kernel'], plain['params'][layer]['kernel'])
    assert (leaves['bias'] != plain['params'][layer]['bias']).any()


def test_get_config_knows_its_networks():
  for network in NETWORKS:
    assert get_config(network).model == network
  with pytest.raises(ValueError, match="network: found 'resnet21', expected one of mobilenet_v1,"):
    get_config('resnet21')
