"""Compiled programs are kept between runs of the command, and a bad folder costs nothing else."""

import os
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from opq_jax.cli import program_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A folder of its own, where the cache of all tests is not seen."""
  monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / 'cache'))
  for name in list(os.environ):
    if name.startswith('JAX_') and 'CACHE' in name:
      monkeypatch.delenv(name)
  return tmp_path / 'cache'


def program(folder, name, data=b'code'):
  (folder / f'{name}-cache').write_bytes(zlib.compress(data))


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def compress(folder, name):
  command = [sys.executable, '-m', 'opq_jax.cli', 'compress', 'net.safetensors', name]
  result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
  return (folder / name).read_bytes(), 'PERSISTENT COMPILATION CACHE MISS' in result.stderr


@pytest.mark.slow
def test_cache_spares_second_compile(tmp_path, cache, monkeypatch):
  weight = np.random.default_rng(0).laplace(size=(48, 32)).astype(np.float32)
  safetensors.numpy.save_file({'fc.weight': weight}, tmp_path / 'net.safetensors')
  monkeypatch.setenv('JAX_EXPLAIN_CACHE_MISSES', '1')
  file, compiles = compress(tmp_path, 'first.opq')
  assert compiles
  (place,) = cache.iterdir()
  kept = names(place)
  assert kept and all(name.endswith('-cache') for name in kept)
  assert compress(tmp_path, 'second.opq') == (file, False)
  assert names(place) == kept


@pytest.fixture
def place(cache):
  place = program_cache.folder()
  place.mkdir(parents=True)
  return place


def test_cache_links_kept_programs(place):
  program(place, 'old')
  with program_cache._run_folder(place) as one, program_cache._run_folder(place) as two:
    assert names(one) == names(two) == ['lock', 'old-cache']
    program(one, 'new', b'1')
    program(two, 'new', b'2')
    assert names(place)[:1] == ['old-cache']
    program_cache._keep(one, place)
    program_cache._keep(two, place)
  assert names(place) == ['new-cache', 'old-cache']
  assert zlib.decompress((place / 'new-cache').read_bytes()) == b'1'


def test_cache_refuses_cut_programs(place):
  data = zlib.compress(bytes(range(256)))
  with program_cache._run_folder(place) as run:
    for name, part in (('empty', b''), ('half', data[:-9]), ('zstd', b'\x28\xb5\x2f\xfd\0')):
      (run / f'{name}-cache').write_bytes(part)
    program_cache._keep(run, place)
  assert names(place) == []


def test_cache_drops_damaged_programs(place):
  program(place, 'good')
  program(place, 'cut')
  with open(place / 'cut-cache', 'r+b') as file:
    file.truncate(3)
  (place / 'empty-cache').touch()
  with program_cache._run_folder(place) as run:
    assert names(run) == ['good-cache', 'lock']
  assert names(place) == ['good-cache']


def test_cache_drops_interrupted_run(place, monkeypatch):
  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
  with pytest.raises(KeyboardInterrupt), program_cache.kept_programs():
    (run,) = place.iterdir()
    program(run, 'new')
    raise KeyboardInterrupt
  assert names(place) == []


def test_cache_removes_abandoned_runs(place):
  long_ago = (1.0, 1.0)
  for name in ('run_killed', 'run_early', 'run_young'):
    (place / name).mkdir()
    program(place / name, 'half')
  (place / 'run_killed' / 'lock').touch()
  with program_cache._run_folder(place) as alive:
    for name in ('run_killed', 'run_early', alive.name):
      os.utime(place / name, long_ago)
    with program_cache._run_folder(place) as run:
      assert names(place) == sorted(['run_young', alive.name, run.name])


def test_cache_removes_oldest_programs(place, monkeypatch):
  for age, name in enumerate(('newest', 'middle', 'oldest')):
    (place / f'{name}-cache').write_bytes(bytes(1000))
    os.utime(place / f'{name}-cache', (1e9 - age, 1e9 - age))
  monkeypatch.setattr(program_cache, 'MAX_BYTES', 2500)
  program_cache._limit(place.parent)
  assert names(place) == ['middle-cache', 'newest-cache']


def test_cache_folder_by_environment(tmp_path, monkeypatch):
  assert program_cache.folder().parent == tmp_path / 'cache'
  monkeypatch.setenv(program_cache.VARIABLE, '0')
  assert program_cache.folder() is None
  monkeypatch.delenv(program_cache.VARIABLE)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert program_cache.folder().parent == tmp_path / 'opq_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert program_cache.folder().parent == tmp_path / '.cache' / 'opq_jax'
  assert jax.__version__ in program_cache.folder().name


def test_cache_needs_a_folder(tmp_path, cache, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  cache.write_text('a file in the place of the folder')
  with program_cache.kept_programs():
    assert jax.config.jax_compilation_cache_dir == before
  monkeypatch.setenv(program_cache.VARIABLE, '0')
  with program_cache.kept_programs():
    assert jax.config.jax_compilation_cache_dir == before
  monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / 'other'))
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))  # the user's own choice
  with program_cache.kept_programs():
    assert jax.config.jax_compilation_cache_dir == before
  assert not (tmp_path / 'other').exists()
