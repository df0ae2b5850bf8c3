"""Encoders and corrections with calibration images, from `opq compress` to `opq verify`."""

import json
import tempfile

import jax
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.cli import steps
from opq_jax.importers import networks
from opq_jax.network import InputMoments, StoredMatrix
from tests.helpers import tiny_resnet

Image = pytest.importorskip('PIL.Image')


def run(*argv):
  return cli.main([str(word) for word in argv])


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with a network's weights and images: one more than there are synthetic ones."""
  monkeypatch.chdir(tmp_path)
  tiny_resnet.replace_resnet20(monkeypatch)
  safetensors.numpy.save_file(tiny_resnet.tensors(), 'net.safetensors')
  (tmp_path / 'images').mkdir()
  rng = np.random.default_rng(0)
  for number in range(17):
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    smooth.save(tmp_path / 'images' / f'{number}.png')
  return tmp_path


COMMAND = 'compress', '--model', 'resnet20', 'net.safetensors', 'net.opq', '--rate', '8'
VERIFY = 'verify', 'net.opq', '--against', 'net.safetensors'


def metadata(capsys):
  capsys.readouterr()
  assert run('inspect', 'net.opq', '--json') == 0
  return json.loads(capsys.readouterr().out)['metadata']


@pytest.mark.slow
def test_layer_by_layer_on_images_verifies(folder, capsys):
  options = '--layer-by-layer', '--feedback', '--images', 'images', '--max-images', 16
  assert run(*COMMAND, *options) == 0
  out = ' '.join(capsys.readouterr().out.split())
  assert 'images: 16 of 17 images used' in out and 'BatchNorm corrected from images' in out
  found = metadata(capsys)
  expected = {
    'encoder': 'layer_by_layer',
    'first': 'feedback',
    'moments': 'images',
    'inputs': 'images',
    'images': '16',
    'batch_norm': 'images',
    'compression_rate': '8',
  }
  assert expected.items() <= found.items()
  assert run(*VERIFY, '--images', 'images') == 0

  # images are missing, or others
  capsys.readouterr()
  assert run(*VERIFY) == 2
  assert 'expected --images FOLDER with the same ones' in capsys.readouterr().err
  (folder / 'images' / '0.png').write_bytes((folder / 'images' / '1.png').read_bytes())
  assert run(*VERIFY, '--images', 'images') == 2
  assert '--images: found 16 other images in images' in capsys.readouterr().err


def test_layer_by_layer_rounds_without_first(folder, capsys):
  assert run(*COMMAND, '--layer-by-layer') == 0
  found = metadata(capsys)
  assert (found['first'], found['inputs']) == ('rounding', 'synthetic')
  assert 'moments' not in found
  assert run(*VERIFY) == 0
  assert run(*VERIFY, '--images', 'images') == 2
  assert 'net.opq was made without images' in capsys.readouterr().err


@pytest.mark.slow
def test_layer_by_layer_along_trellis_verifies(folder, capsys):
  assert run(*COMMAND[:-2], '--file-rate', 9, '--layer-by-layer', '--trellis') == 0
  found = metadata(capsys)
  assert (found['encoder'], found['first']) == ('layer_by_layer', 'trellis')
  assert found['file_rate'] == '9' and float(found['bits_per_weight']) < 4
  assert run(*VERIFY) == 0


def test_images_correct_batch_norm(folder, capsys):
  assert run(*COMMAND, '--images', 'images') == 0
  found = metadata(capsys)
  assert (found['encoder'], found['batch_norm'], found['images']) == ('rounding', 'images', '16')
  assert run(*VERIFY, '--images', 'images') == 0


def test_images_that_nothing_reads(folder, monkeypatch, capsys):
  monkeypatch.setattr(networks, 'has_batch_norm', lambda variables: False)  # as of VGG
  monkeypatch.setattr(steps, 'folder_images', pytest.fail)
  for options in (), ('--trellis',):
    assert run(*COMMAND, '--images', 'images', *options) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert (
      '--images: found images, expected --feedback or --layer-by-layer too: resnet20 has no '
      'BatchNorm' in error
    )
  assert not (folder / 'net.opq').exists()


def test_large_moments_lie_on_disk_until_the_file_is_written(folder, monkeypatch):
  options = '--feedback', '--images', 'images', '--max-images', 16
  assert run(*COMMAND, *options) == 0
  in_memory = opq_jax.load('net.opq')[0]

  temporary, found = folder / 'temporary', []
  temporary.mkdir()
  measure = steps.mean_moments

  def measured(*arguments, **folder):
    moments = measure(*arguments, **folder)
    matrices = [entry.matrix for entry in jax.tree.leaves(moments, is_leaf=is_moments)]
    found.extend(matrices)
    assert sum(4 * np.prod(matrix.shape) for matrix in set(matrices)) <= sum(
      file.stat().st_size for file in temporary.rglob('*.npy')
    )
    return moments

  is_moments = lambda node: isinstance(node, InputMoments)
  monkeypatch.setattr(steps, 'mean_moments', measured)
  monkeypatch.setattr(steps, 'MOMENTS_IN_MEMORY', 0)
  monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
  assert run(*COMMAND, *options) == 0
  assert found and all(isinstance(matrix, StoredMatrix) for matrix in found)
  assert not list(temporary.iterdir())
  # the same sums in another order of operations
  for one, other in zip(
    jax.tree.leaves(opq_jax.load('net.opq')[0]), jax.tree.leaves(in_memory), strict=True
  ):
    assert np.mean(np.isclose(one, other, rtol=1e-4, atol=1e-6)) > 0.95
  assert run(*VERIFY, '--images', 'images') == 0
  assert not list(temporary.iterdir())
