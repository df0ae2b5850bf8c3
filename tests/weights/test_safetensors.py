import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from opq_jax.core import trees
from opq_jax.weights import read_weights, write_safetensors
from tests.helpers.weight_trees import assert_same, flat_tree, nested_tree


def test_write_safetensors_round_trip(tmp_path):
  write_safetensors(tmp_path / 'net.safetensors', flat_tree())
  assert_same(read_weights(tmp_path / 'net.safetensors'), flat_tree())
  assert [path.name for path in tmp_path.iterdir()] == ['net.safetensors']


def test_write_safetensors_joins_names(tmp_path):
  write_safetensors(tmp_path / 'net.safetensors', nested_tree())
  found = read_weights(str(tmp_path / 'net.safetensors'))
  assert_same(found, trees.named_leaves(nested_tree()))
  assert 'params/conv/kernel' in safetensors.numpy.load_file(tmp_path / 'net.safetensors')


def test_write_safetensors_ignores_strides(tmp_path):
  kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T
  write_safetensors(tmp_path / 'net.safetensors', {'kernel': kernel})
  np.testing.assert_array_equal(read_weights(tmp_path / 'net.safetensors')['kernel'], kernel)


def test_write_safetensors_names_the_dtype(tmp_path):
  with pytest.raises(ValueError, match=r'net\.safetensors: b: found dtype int4'):
    write_safetensors(tmp_path / 'net.safetensors', {'b': np.zeros(2, ml_dtypes.int4)})
  assert not list(tmp_path.iterdir())


def test_write_safetensors_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'net.safetensors'
  path.write_bytes(b'old')

  def fail(*_):
    raise OSError('the disk is full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='the disk is full'):
    write_safetensors(path, flat_tree())
  assert path.read_bytes() == b'old'
  assert [file.name for file in tmp_path.iterdir()] == ['net.safetensors']
