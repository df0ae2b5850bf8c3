"""Trees laid over a mesh of eight devices: the checks are in many_devices.py."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import many_devices

HERE = Path(__file__).parents[1] / 'helpers'


@functools.cache
def failures():
  """What every check has to say, of one process with eight devices."""
  command = [sys.executable, str(HERE / 'many_devices.py')]
  path = os.pathsep.join([str(HERE.parents[1]), os.environ.get('PYTHONPATH', '')])
  result = subprocess.run(
    command, capture_output=True, text=True, check=False, env={**os.environ, 'PYTHONPATH': path}
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', [check.__name__ for check in many_devices.CHECKS])
def test_on_eight_devices(name):
  assert failures()[name] == ''
