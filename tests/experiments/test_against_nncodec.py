"""The summary of the comparison with NNCodec, and the layout of its arrays."""

import json

import numpy as np
import pytest

from experiments.benchmarks.rivals import (
  jobs,
  nncodec_jobs,
  nncodec_summary,
  study,
)
from experiments.benchmarks.rivals.nncodec_summary import Point


def rows(method, correction, sizes, tops, **more):
  return [
    {'network': 'small', 'method': method, 'correction': correction, 'setting': f'bits={i + 1}'}
    | {
      'file_bytes': str(size),
      'top1': str(top1),
      'top1_unseen': str(top1),
      'divergence': str(1 - top1),
    }
    | {name: str(value) for name, value in more.items()}
    for i, (size, top1) in enumerate(zip(sizes, tops, strict=True))
  ]


def test_monotone_passes_rising_points():
  curve = [Point(100, 0.2), Point(200, 0.5), Point(400, 0.9)]
  np.testing.assert_allclose(nncodec_summary.monotone(curve[::-1]), curve)
  for size, score in curve:
    assert nncodec_summary.size_at(curve, score) == pytest.approx(size)
    assert nncodec_summary.score_at(curve, size) == pytest.approx(score)


def test_curves_do_not_extrapolate():
  curve = [Point(100, 0.2), Point(200, 0.5)]
  assert nncodec_summary.size_at(curve, 0.6) is None
  assert nncodec_summary.size_at([], 0.6) is None
  assert nncodec_summary.score_at(curve, 300) is None


def test_ratios_of_half_the_size():
  theirs = [Point(100, 0.2), Point(200, 0.5), Point(400, 0.9)]
  ours = [Point(size / 2, score) for size, score in theirs]
  found = nncodec_summary.ratios(ours, [theirs], (110, 150, 300, 500))
  assert found == pytest.approx([0.5] * 3)


def test_ratios_take_the_best_of_their_settings():
  ours = [Point(50, 0.2), Point(100, 0.5), Point(200, 0.9)]
  better = [Point(100, 0.2), Point(200, 0.5), Point(400, 0.9)]
  worse = [Point(150, 0.2), Point(600, 0.9)]
  for theirs in ([better, worse], [worse, better]):
    found = nncodec_summary.ratios(ours, theirs, (200, 500))
    # at 500 bytes only the worse has a file: .2 + .7 log(500 / 150) / log(600 / 150)
    score = 0.2 + 0.7 * np.log(500 / 150) / np.log(4)
    mine = 100 * 2 ** ((score - 0.5) / 0.4)
    assert found == pytest.approx([0.5, mine / 500])


def test_rows_first_is_inverted():
  rng = np.random.default_rng(0)
  for shape in ((3, 3, 4, 8), (4, 8), (8,)):
    kernel = rng.normal(size=shape).astype(np.float32)
    there = nncodec_jobs.rows_first(kernel)
    assert there.shape[0] == 8
    np.testing.assert_array_equal(nncodec_jobs.rows_last(there), kernel)


def test_summary_answers_from_rows():
  both = {f'{what}_{how}': 1.0 for what in ('encode', 'decode') for how in ('seconds', 'processor')}
  table = [
    *rows('float32', 'none', [16_000], [0.95]),
    *rows(jobs.OURS, 'none', [500, 1000, 2000], [0.2, 0.5, 0.9], **both),
    *rows(jobs.OURS, 'noise', [500, 1000, 2000], [0.7, 0.8, 0.9], **both),
    *rows(jobs.SHIPPED, 'none', [1000, 2000, 4000], [0.1, 0.8, 0.9], **both),
    *rows(jobs.COARSER, 'noise', [1000, 2000, 4000], [0.7, 0.8, 0.9]),
    *rows(jobs.TUNED, 'noise', [1000, 2000, 4000], [0.6, 0.7, 0.8]),
  ]
  lines = nncodec_summary.summary(table)
  found = {(line['question'][0], line['ours']): line for line in lines}
  # of the sizes 2000, 1600, 1333, 1143 and 1000, all lie on both curves
  assert found['a', 'opq_jax, noise']['ratio'] == pytest.approx(0.5)
  assert found['a', 'opq_jax, noise']['points'] == 5
  # at .85 ours has sqrt(1000 * 2000) bytes, theirs sqrt(2000 * 4000)
  assert found['c', 'opq_jax, noise']['ratio'] == pytest.approx(0.5)
  # nothing is said of what has no rows
  assert len(lines) == 4
  assert found['e', 'opq_jax']['ratio'] == 1


def test_nncodec_tensors_have_short_names(tmp_path, monkeypatch):
  asked = {}

  class Worker:
    def __init__(self, *_, **__):
      self.stdin, self.stdout = self, self

    def write(self, text):
      if text.strip():
        question = json.loads(text)
        with np.load(question['params']) as file:
          asked.update(file)
        np.savez(question['decoded'], **asked)

    def flush(self):
      pass

    def readline(self):
      return '{"bytes": 1, "encode": [0, 0], "decode": [0, 0]}'

  monkeypatch.setattr(nncodec_jobs.subprocess, 'Popen', Worker)
  rng = np.random.default_rng(0)
  shapes = {'params/block/conv/kernel': (3, 3, 4, 8), 'params/block/conv/bias': (8,)}
  leaves = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  decoded, _ = nncodec_jobs.NNCodec('python', tmp_path)(leaves, {'qp': -20})
  assert list(asked) == ['0', '1'] and asked['0'].shape == (8, 4, 3, 3)
  for name, leaf in leaves.items():
    np.testing.assert_array_equal(decoded[name], leaf)


def test_table_remembers_rows(tmp_path):
  table = study.Table(tmp_path / 'results.csv')
  assert not table.made()
  key = {'network': 'small', 'method': 'm', 'setting': 'qp=-20', 'correction': 'none'}
  table.add({**key, 'top1': 0.123456789})
  table.add({**key, 'correction': 'noise'})
  assert table.made() == {('small', 'm', 'qp=-20', 'none'), ('small', 'm', 'qp=-20', 'noise')}
  assert table.rows()[0]['top1'] == '0.12346'
