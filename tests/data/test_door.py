"""Doors of rooms that use heavy packages: cheap to import, with every public name."""

import importlib
import subprocess
import sys

import pytest

HEAVY = 'grain', 'tensorflow_datasets', 'orbax', 'PIL', 'tensorstore'
ROOMS = 'opq_jax.correction', 'opq_jax.data', 'opq_jax.finetuning'


def test_doors_import_nothing_heavy():
  # streams and training are what a training loop imports before it opens a dataset
  imports = ', '.join(['opq_jax', *ROOMS, 'opq_jax.data.streams', 'opq_jax.finetuning.checkpoints'])
  loaded = f'import sys; import {imports}; print(sorted(sys.modules.keys() & {set(HEAVY)}))'
  output = subprocess.run([sys.executable, '-c', loaded], capture_output=True, text=True)
  assert (output.stdout.strip(), output.returncode) == ('[]', 0), output.stderr


@pytest.mark.parametrize('room', ROOMS)
def test_door_has_all_its_names(room):
  door = importlib.import_module(room)
  assert door.__doc__ and sorted(door.__all__) == sorted(set(door.__all__))
  for name in door.__all__:
    assert getattr(door, name) is not None
    assert name in dir(door)


@pytest.mark.parametrize('package', ['grain', 'tensorflow_datasets'])
def test_missing_package_names_the_extra(package, monkeypatch, tmp_path):
  from opq_jax import data

  monkeypatch.setitem(sys.modules, package, None)
  message = rf'needs {package}, found no such package: pip install opq_jax\[data\]'
  with pytest.raises(ValueError, match=message):
    if package == 'grain':
      examples = data.fake((4, 4, 3), classes=2, count=4)
      data.stream(examples, batch_size=2, preprocessing=data.CIFAR)
    else:
      data.source('cifar10', 'test', tmp_path)
