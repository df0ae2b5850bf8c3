"""Files that say which network they hold, and networks from files that do not."""

import dataclasses

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import data, importers, models
from opq_jax.importers import networks
from tests.helpers.variables import random_variables

CLASSES = 6


@pytest.fixture(scope='module')
def network():
  variables = random_variables(models.create('resnet20', num_classes=CLASSES))
  tensors = importers.to_tensors('resnet20', variables, 'akamaster')
  return networks.Network('resnet20', *importers.from_tensors('resnet20', tensors))


def save(path, variables, metadata=None):
  state = opq_jax.CompressionState(jax.tree.map(lambda _: None, variables))
  opq_jax.save(path, variables, state, metadata)
  return path


def test_load_uses_names_in_file(tmp_path, network):
  metadata = networks.metadata(network)
  found = networks.load(save(tmp_path / 'net.opq', network.variables, metadata))
  assert (found.name, found.model, found.source.name) == ('resnet20', network.model, 'akamaster')
  jax.tree.map(np.testing.assert_array_equal, found.variables, network.variables)


def test_load_takes_a_given_name(tmp_path, network):
  path = save(tmp_path / 'net.opq', network.variables)
  with pytest.raises(ValueError, match=r'net.opq: found no name of a network in it, expected one'):
    networks.load(path)
  found = networks.load(path, name='resnet20')
  assert (found.model, found.source.name) == (network.model, 'akamaster')
  # the names of a source in an .opq file, and Flax's in another
  tensors = importers.to_tensors('resnet20', network.variables, 'akamaster')
  path = save(tmp_path / 'torch.opq', tensors)
  assert networks.load(path, name='resnet20').model == network.model
  opq_jax.weights.write_safetensors(tmp_path / 'flax.safetensors', network.variables)
  found = networks.load(tmp_path / 'flax.safetensors', name='resnet20')
  jax.tree.map(np.testing.assert_array_equal, found.variables, network.variables)


def test_load_drops_background_class(tmp_path, network):
  path = save(tmp_path / 'net.opq', network.variables, networks.metadata(network))
  found = networks.load(path, num_classes=CLASSES - 1)
  assert found.model.num_classes == CLASSES - 1
  bias = network.variables['params']['head']['bias'][1:]
  np.testing.assert_array_equal(found.variables['params']['head']['bias'], bias)
  with pytest.raises(ValueError, match='num_classes: found 3, expected the 6 of the variables'):
    networks.load(path, num_classes=3)


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'model': 'resnet20'}, 'net.opq: metadata: found'),
    ({'model': 'resnet20', 'source': 'akamaster', 'num_classes': '-1'}, 'expected a name for each'),
    ({'model': 'resnet20', 'source': 'keras', 'num_classes': '6'}, "source: found 'keras'"),
    ({'model': 'resnet', 'source': 'keras', 'num_classes': '6'}, "name: found 'resnet'"),
    (
      {'model': 'resnet32', 'source': 'akamaster', 'num_classes': '6'},
      "the variables are not those of akamaster's resnet32",
    ),
  ],
)
def test_load_refuses_other_networks(tmp_path, network, metadata, message):
  path = save(tmp_path / 'net.opq', network.variables, metadata)
  with pytest.raises(ValueError, match=message):
    networks.load(path)


def test_noise_shape_is_that_of_images():
  sizes = {name: networks.noise_shape(importers.sources(name)[0]) for name in models.names()}
  assert sizes['mobilenet_v1'] == (16, 224, 224, 3)
  assert sizes['resnet110'] == (128, 32, 32, 3)


def test_synthetic_batches_halve_pixels():
  model = models.create('mobilenet_v1_050', num_classes=CLASSES)
  source = importers.sources('mobilenet_v1_050')[0]
  large = networks.Network('mobilenet_v1_050', model, random_variables(model), source)
  shapes = [x.shape for x in jax.eval_shape(lambda: networks.synthetic_batches(large))]
  assert shapes == 8 * [(16, 160, 160, 3)]


def test_correction_noise_has_image_units(network):
  """A network that reads bytes is corrected as the one that reads their standardised values."""

  def corrected(network):
    shrunk = jax.tree.map(
      lambda leaf: 0.8 * leaf if leaf.ndim > 1 else leaf, network.variables['params']
    )
    return networks.correct_batch_norm(network, network.variables | {'params': shrunk})

  # such that noise times (_IMAGE_STD / std) meets the same products
  scale = np.float32(0.226 * 255)
  stem = {'kernel': network.variables['params']['stem']['kernel'] / scale}
  variables = network.variables | {'params': network.variables['params'] | {'stem': stem}}
  raw = data.Preprocessing(mean=(0.5,) * 3, std=(1 / 255,) * 3)
  source = dataclasses.replace(network.source, preprocessing=raw)
  in_bytes = network._replace(variables=variables, source=source)
  found, expected = (corrected(n)['batch_stats'] for n in (in_bytes, network))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)
