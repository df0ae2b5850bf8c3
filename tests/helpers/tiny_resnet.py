"""A ResNet small enough to be compressed in seconds, known by the name of a real one."""

import pytest

from opq_jax import importers, models
from opq_jax.importers import networks
from opq_jax.models import registry
from tests.helpers.variables import random_variables

NAME, SOURCE, CLASSES = 'resnet20', 'akamaster', 5
BATCH = (2, 32, 32, 3)  # a few images for all noise and all synthetic images


def replace_resnet20(monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes `resnet20` a stem, one residual block and a head, which see batches of two images.

  Its convolutions and its head have three shapes in all, so that little is compiled.
  """
  attributes = {**registry._NETWORKS[NAME].attributes, 'blocks': (1,), 'width': 40}
  architecture = registry.Architecture('resnet', 'ResNet', attributes)
  monkeypatch.setitem(registry._NETWORKS, NAME, architecture)
  monkeypatch.setattr(networks, 'noise_shape', lambda source: BATCH)


def variables():
  """Returns random variables of the network that `replace_resnet20` puts in its place."""
  return random_variables(models.create(NAME, num_classes=CLASSES))


def tensors():
  """Returns these variables by the names of their source."""
  return importers.to_tensors(NAME, variables(), SOURCE)
