"""A ResNet small enough to be compressed in seconds, known by the name of a real one."""

import pytest

from opq_jax import importers, models
from opq_jax.importers import networks
from opq_jax.models import registry
from tests.helpers.variables import random_variables

NAME, SOURCE, CLASSES = 'resnet20', 'akamaster', 5
BATCH = (2, 32, 32, 3)  # a few images for all noise and all synthetic images


def replace_resnet20(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes `resnet20` a network of two stages of one block, which sees batches of two images.

  It has all that a ResNet-20 has: convolutions of equal and of changing width, a shortcut that is
  the input and one without parameters, and BatchNorm everywhere.
  """
  attributes = {**registry._NETWORKS[NAME].attributes, 'blocks': (1, 1)}
  architecture = registry.Architecture('resnet', 'ResNet', attributes)
  monkeypatch.setitem(registry._NETWORKS, NAME, architecture)
  monkeypatch.setattr(networks, 'noise_shape', lambda source: BATCH)


def variables():
  """Returns random variables of the network that `replace_resnet20` puts in its place."""
  return random_variables(models.create(NAME, num_classes=CLASSES))


def tensors():
  """Returns these variables by the names of their source."""
  return importers.to_tensors(NAME, variables(), SOURCE)
