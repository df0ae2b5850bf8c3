"""The demo does what it prints."""

import sys

import numpy as np
import pytest

import opq_jax
from opq_jax.cli import digits


@pytest.mark.slow
def test_digits_table_is_true(tmp_path, capsys):
  pytest.importorskip('sklearn')
  path = tmp_path / 'digits.opq'
  rows = digits.run(output=path, epochs=4)
  floats, compressed, corrected, finetuned, loaded = rows
  assert floats.accuracy > 0.96
  assert corrected.accuracy > compressed.accuracy
  assert finetuned.accuracy > corrected.accuracy
  assert finetuned.accuracy > floats.accuracy - 0.05
  assert loaded == digits.Row(loaded.network, finetuned.accuracy, path.stat().st_size, loaded.rate)
  assert loaded.rate == floats.size / loaded.size > 28
  out = capsys.readouterr().out
  for row in rows:
    assert f'{row.accuracy:.1%}' in out
  assert str(path) in out.replace('\n', '')

  # who reads the file has a whole network
  variables, state = opq_jax.load(path)
  images, labels = digits._digits(0)[1]
  answers = np.argmax(digits.DigitNet().apply(variables, images), axis=-1)
  assert float(np.mean(answers == labels)) == loaded.accuracy
  again = opq_jax.apply_compression(variables, state)
  digits._check_identical(variables, again)


def test_digits_hold_out_test_images():
  pytest.importorskip('sklearn')
  (images, labels), (test_images, test_labels) = digits._digits(3)
  assert len(images) == len(labels) == 1200
  assert len(test_images) == len(test_labels) == 597
  assert abs(float(images.mean())) < 1e-3
  assert abs(float(images.std()) - 1) < 1e-3
  again = digits._digits(3)[1][0]
  np.testing.assert_array_equal(test_images, again)


def test_digits_notice_a_changed_bit():
  tree = {'a': np.zeros(3, np.float32), 'b': np.ones(2, np.float32)}
  digits._check_identical(tree, dict(tree))
  with pytest.raises(RuntimeError, match=r"\['b'\]"):
    digits._check_identical(tree | {'b': -tree['b']}, tree)
  with pytest.raises(RuntimeError, match=r"\['a'\]"):
    digits._check_identical(tree | {'a': -tree['a']}, tree)  # -0.0 is not 0.0


def test_digits_name_the_missing_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  with pytest.raises(ValueError, match=r'opq_jax\[demo\]'):
    digits.run()
