"""Trees laid over a mesh of eight devices: the checks are in tests/helpers/many_devices.py."""

import functools
import json

import pytest

from tests.helpers import many_devices, processes

pytestmark = pytest.mark.slow


@functools.cache
def failures():
  """Returns the failure of every check, or '', from one process with eight devices."""
  process = processes.start('-m', 'tests.helpers.many_devices')
  return json.loads(process.finish(timeout=600).splitlines()[-1])


@pytest.mark.parametrize('name', list(many_devices.CHECKS))
def test_allocate_on_eight_devices(name):
  assert failures()[name] == ''
