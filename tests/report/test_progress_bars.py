"""Progress of long work in Python: leaves tell, and a bar or lines show it."""

import io
import sys

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax.report import progress_bars


@pytest.fixture(scope='module')
def network():
  kernel = jax.random.laplace(jax.random.key(0), (64, 32))
  # the table is stored once, and still counts as two leaves
  params = {'bias': np.zeros(32, np.float32), 'head': kernel.T, 'kernel': kernel}
  return opq_jax.compress(params, compression_rate=8.0)


def test_save_and_load_tell_after_each_leaf(network, tmp_path):
  path, saved, loaded = tmp_path / 'net.opq', [], []
  opq_jax.save(path, network.params, network.state, told=lambda *numbers: saved.append(numbers))
  opq_jax.load(path, told=lambda *numbers: loaded.append(numbers))
  total = 4 * (32 + 2 * 64 * 32)
  assert saved == loaded == [(128, total), (128 + 8192, total), (total, total)]


def test_progress_shows_bytes_and_time_on_a_terminal(network, monkeypatch):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(sys, 'stderr', screen)
  monkeypatch.setenv('TERM', 'xterm')
  with opq_jax.report.progress('serialize') as told:
    opq_jax.file.serialize(network.params, network.state, told=told)
  text = screen.getvalue()
  assert 'serialize' in text and '16.5/16.5 kB' in text and 'left' in text


def test_progress_is_a_line_a_minute_without_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(progress_bars, '_MINUTE', 0.02)
  with opq_jax.report.progress('load') as told:
    told(1, 4)
    text = ''
    while '25% done' not in text:
      text += capsys.readouterr().err
  assert text.splitlines()[-1].startswith('load: 0 s so far, 25% done')
