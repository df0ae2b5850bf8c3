"""Files that say which network they hold, and networks from files that do not."""

import jax
import numpy as np
import pytest
from test_models import random_variables

import opq_jax
from opq_jax import importers, models, networks

CLASSES = 6


@pytest.fixture(scope='module')
def imported():
  variables = random_variables(models.create('resnet20', num_classes=CLASSES))
  tensors = importers.to_tensors('resnet20', variables, 'akamaster')
  return importers.from_tensors('resnet20', tensors)


def save(path, variables, metadata=None):
  state = opq_jax.CompressionState(jax.tree.map(lambda _: None, variables))
  opq_jax.save(path, variables, state, metadata)
  return path


def test_a_file_knows_its_network(tmp_path, imported):
  metadata = networks.metadata('resnet20', imported)
  network = networks.load(save(tmp_path / 'net.opq', imported.variables, metadata))
  assert network.name == 'resnet20'
  assert network[1::2] == (imported.model, imported.source)
  jax.tree.map(np.testing.assert_array_equal, network.variables, imported.variables)


def test_who_names_a_network_needs_no_file_that_does(tmp_path, imported):
  path = save(tmp_path / 'net.opq', imported.variables)
  with pytest.raises(ValueError, match=r'net.opq: found no name of a network in it, expected one'):
    networks.load(path)
  network = networks.load(path, name='resnet20')
  assert (network.model, network.source.name) == (imported.model, 'akamaster')
  # the names of a source in an .opq file, and Flax's in another
  tensors = importers.to_tensors('resnet20', imported.variables, 'akamaster')
  path = save(tmp_path / 'torch.opq', tensors)
  assert networks.load(path, name='resnet20').model == imported.model
  opq_jax.write_safetensors(tmp_path / 'flax.safetensors', imported.variables)
  network = networks.load(tmp_path / 'flax.safetensors', name='resnet20')
  jax.tree.map(np.testing.assert_array_equal, network.variables, imported.variables)


def test_one_class_fewer_drops_the_background(tmp_path, imported):
  path = save(tmp_path / 'net.opq', imported.variables, networks.metadata('resnet20', imported))
  network = networks.load(path, num_classes=CLASSES - 1)
  assert network.model.num_classes == CLASSES - 1
  bias = imported.variables['params']['head']['bias'][1:]
  np.testing.assert_array_equal(network.variables['params']['head']['bias'], bias)
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
def test_a_file_that_names_another_network_is_refused(tmp_path, imported, metadata, message):
  path = save(tmp_path / 'net.opq', imported.variables, metadata)
  with pytest.raises(ValueError, match=message):
    networks.load(path)


def test_noise_has_the_size_of_the_images():
  sizes = {name: networks.noise_shape(importers.sources(name)[0]) for name in models.names()}
  assert sizes['mobilenet_v1'] == (16, 224, 224, 3)
  assert sizes['resnet110'] == (128, 32, 32, 3)
