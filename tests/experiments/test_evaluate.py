"""Accuracy of files: real ResNet-20 weights on CIFAR images, compressed and not."""

import numpy as np
import pytest
import scipy.stats

from experiments import evaluate
from opq_jax import cli, data
from opq_jax.importers import networks
from opq_jax.report import accuracy
from tests.helpers import assets

pytestmark = pytest.mark.slow

CIFAR = {'dataset': 'cifar10:3.0.2', 'split': 'test[:300]', 'batch_size': 128}


def percent(row):
  return float(row['top-1'].split(' ')[0])


@pytest.fixture(scope='module')
def compressed(tmp_path_factory):
  weights = assets.assets() / 'weights/resnet20_cifar10.safetensors'
  path = tmp_path_factory.mktemp('opq') / 'resnet20.opq'
  command = ['compress', '--model', 'resnet20', str(weights), str(path), '--rate', '12.8']
  assert cli.main(command) == 0
  return path


def test_evaluate_equals_logits(capsys):
  folder = assets.assets()
  weights = folder / 'weights/resnet20_cifar10.safetensors'
  row = evaluate.run(str(weights), str(folder / 'tfds'), model='resnet20', **CIFAR)
  assert row['network'] == 'resnet20, 10 classes'
  assert row['images'] == '300 of cifar10:3.0.2, test[:300]'
  network = networks.load(weights, name='resnet20')
  (batch,) = data.batches(
    'cifar10',
    'test[:300]',
    data_dir=folder / 'tfds',
    batch_size=300,
    preprocessing=network.source.preprocessing,
  )
  hits = accuracy.hits(
    np.asarray(network.model.apply(network.variables, batch['image'])), batch['label']
  )
  low, high = accuracy.interval(int(hits.sum()), 300)
  expected = f'{100 * hits.mean():.2f} % (95 %: {100 * low:.2f} to {100 * high:.2f})'
  assert row['top-1'] == expected
  assert expected in capsys.readouterr().out
  assert 88 < percent(row) < 97


def test_evaluate_opq_file(compressed):
  row = evaluate.run(str(compressed), str(assets.assets() / 'tfds'), **CIFAR)
  assert row['network'] == 'resnet20, 10 classes'
  assert row['weights'] == 'resnet20.opq, prepared as for akamaster'
  assert 86 < percent(row) < 97


def test_evaluate_against_float_is_paired(compressed):
  folder = assets.assets()
  weights, data_dir = folder / 'weights/resnet20_cifar10.safetensors', folder / 'tfds'
  row = evaluate.run(str(compressed), str(data_dir), **CIFAR, against=str(weights))
  small, whole = networks.load(compressed), networks.load(weights, name='resnet20')
  options = {'batch_size': 300, 'preprocessing': whole.source.preprocessing}
  (batch,) = data.batches('cifar10', 'test[:300]', data_dir=data_dir, **options)
  right, reference = (
    np.argmax(network.model.apply(network.variables, batch['image']), -1) == batch['label']
    for network in (small, whole)
  )
  gained, lost = int(np.sum(right & ~reference)), int(np.sum(~right & reference))
  assert row['right in one only'] == f'{gained} in resnet20.opq, {lost} in {weights.name}'
  assert row['difference of top-1'].startswith(f'{(gained - lost) / 3:+.2f} points')
  p_value = scipy.stats.binomtest(min(gained, lost), gained + lost).pvalue
  assert float(row["McNemar's exact p-value"]) == pytest.approx(p_value, rel=0.05)


def test_evaluate_refuses_other_classes(compressed):
  folder = str(assets.assets() / 'tfds')
  with pytest.raises(ValueError, match='num_classes: found 1000, expected the 10 of the variables'):
    evaluate.run(str(compressed), folder)
