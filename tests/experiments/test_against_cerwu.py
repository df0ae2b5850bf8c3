"""The comparison with CERWU: what it is given, what is read back, and the summary of its sweep."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import opq_jax
from experiments.benchmarks.rivals import (
  cerwu_jobs,
  cerwu_summary,
  cerwu_worker,
  jobs,
  nncodec_jobs,
  study,
)
from experiments.benchmarks.rivals.nncodec_summary import Point
from opq_jax.core import trees
from opq_jax.importers import networks


class Convolutions(nn.Module):
  """A strided, a depthwise and a dense layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name='strided')(x)
    x = nn.Conv(4, (3, 2), feature_group_count=4, use_bias=False, name='depthwise')(x)
    return nn.Dense(3, name='head')(x.mean(axis=(1, 2)))


@pytest.fixture(scope='module')
def network():
  model = Convolutions()
  variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 2)))
  return networks.Network('small', model, variables, None)


@pytest.fixture(scope='module')
def images():
  return [jax.random.normal(jax.random.key(i), (3, 8, 8, 2)) for i in (1, 2)]


def test_layers_of_give_the_error_of_outputs(network, images):
  layers = cerwu_jobs.layers_of(network, images)
  names = list(trees.named_leaves(network.variables))
  kernels = [name for name in names if name.endswith('kernel')]
  rng = np.random.default_rng(0)

  def outputs(variables, module):
    options = {'capture_intermediates': True, 'mutable': ['intermediates']}
    found = network.model.apply(variables, np.concatenate(images), **options)[1]
    return np.asarray(found['intermediates'][module]['__call__'][0])

  for number, name in enumerate(kernels):
    kernel = np.asarray(trees.named_leaves(network.variables)[name])
    # a change of one layer alone, whose inputs stay the same
    change = rng.normal(size=kernel.shape).astype(np.float32)
    other = trees.replaced(network.variables, {name: kernel + change})
    module = name.split('/')[1]
    error = outputs(other, module) - outputs(network.variables, module)
    hessians = layers[f'{number}/hessian']
    groups = np.split(nncodec_jobs.rows_first(change).reshape(kernel.shape[-1], -1), len(hessians))
    quadratic = sum(
      np.einsum('rk,kl,rl', rows, hessian, rows)
      for rows, hessian in zip(groups, hessians, strict=True)
    )
    assert quadratic == pytest.approx(2 * np.sum(error**2) / 6, rel=1e-4), name


def test_worker_codes_a_grid_of_16_bit_steps():
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(5, 7)).astype(np.float32)
  step = cerwu_worker.step_of(weights, 16)
  assert step.view(np.uint32) & 0xFFFF == 0
  assert 0 <= 8 - np.abs(weights).max() / step < 0.1
  assert cerwu_worker.step_of(np.zeros((2, 2), np.float32), 16) == 0.125 * 8


def test_worker_feeds_errors_to_a_core_that_rounds():
  """At no cost of bits, a core without a rate term is GPTQ on the damped H."""

  class Core:
    class GPTQ:
      def __init__(self, options):
        assert options['max_idx'] == 16

      def run(self, weights, factor, lm):
        weights, codes = weights.copy(), np.zeros(weights.shape, np.int32)
        for i in range(len(factor)):
          codes[:, i] = np.round(weights[:, i])
          error = (weights[:, i] - codes[:, i]) / factor[i, i]
          weights[:, i:] -= np.outer(error, factor[i, i:])
        return codes

  rng = np.random.default_rng(0)
  weights = rng.normal(size=(20, 6)).astype(np.float32)
  inputs = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
  hessian = inputs.T @ inputs / 50
  settings = {'nbins': 16, 'log10_lm': -12}
  codes, step = cerwu_worker.quantized(Core, weights, hessian, settings)
  energy = lambda error: np.einsum('rk,kl,rl', error, hessian, error)
  rounded = np.round(weights / step) * step
  assert energy(weights - codes * step) < 0.7 * energy(weights - rounded)


def test_hull_is_above_its_sweep():
  rng = np.random.default_rng(0)
  sweep = [Point(float(s), float(np.log(s) + rng.normal())) for s in rng.uniform(10, 1000, 50)]
  chain = cerwu_summary.hull(sweep)
  sizes, scores = (np.array(axis) for axis in zip(*chain, strict=True))
  assert set(chain) <= set(sweep)
  assert np.all(np.diff(sizes) > 0) and np.all(np.diff(scores) > 0)
  assert np.all(np.diff(np.diff(scores) / np.diff(np.log(sizes))) < 0)
  for point in sweep:
    assert np.interp(np.log(point.size), np.log(sizes), scores) >= point.score - 1e-9


def rows(method, correction, sizes, divergences):
  return [
    {'network': 'small', 'method': method, 'correction': correction, 'setting': f'{i}'}
    | {'file_bytes': str(size), 'divergence': str(divergence), 'top1': '0.5'}
    for i, (size, divergence) in enumerate(zip(sizes, divergences, strict=True))
  ]


def test_summary_of_half_the_bytes():
  table = [
    *rows('float32', 'none', [16_000], [0]),
    *rows(cerwu_summary.THEIRS, 'images', [20, 500, 1000, 2000], [2, 0.4, 0.2, 0.1]),
    *rows(cerwu_summary.OURS[0], 'images', [250, 500, 1000], [0.4, 0.2, 0.1]),
    *rows(cerwu_summary.OURS[1], 'images', [250, 500], [0.4, 0.2]),
  ]
  *lines, mean = cerwu_summary.summary(table)
  assert [line['CERWU, times smaller'] for line in lines] == [8, 10, 12, 14, 16, 20, 24]
  assert [line['CERWU, divergence'] for line in lines[::4]] == ['0.1000', '0.2000']
  assert all(line[f'{jobs.OURS}, feedback'] == 0.5 for line in lines)
  assert mean[f'{jobs.OURS}, feedback'] == '0.500 (7)'
  # where a curve of ours ends, nothing is said of it
  assert lines[0][jobs.FEEDBACK] == 'not reached'
  assert mean[jobs.FEEDBACK] == '0.500 (3)'
  assert jobs.LAYERS not in mean


def test_copied_rows_keep_those_there_are(tmp_path):
  source, target = study.Table(tmp_path / 'source.csv'), study.Table(tmp_path / 'target.csv')
  for row in [*rows('one', 'images', [1, 2], [1, 1]), *rows('other', 'images', [3], [1])]:
    source.add(row)
  target.add(rows('one', 'images', [9], [1])[0])
  study.copied(source, target, 'small', ['one'])
  assert [row['file_bytes'] for row in target.rows()] == ['9', '2']
  study.copied(source, target, 'another', ['one'])
  assert len(target.rows()) == 2


def test_kernels_come_back_in_their_layout(network, images, tmp_path, monkeypatch):
  class Worker:
    """Answers with the weights as they were given."""

    def __init__(self, *_, **__):
      self.stdin, self.stdout = self, self

    def write(self, text):
      if text.strip():
        question = json.loads(text)
        with np.load(question['layers']) as file:
          found = {name.split('/')[0]: file[name] for name in file if name.endswith('weights')}
        np.savez(question['decoded'], **found)

    def flush(self):
      pass

    def readline(self):
      return '{"bytes": 100, "encode": [0, 0], "decode": [0, 0]}'

  monkeypatch.setattr(cerwu_jobs.subprocess, 'Popen', Worker)
  monkeypatch.setitem(cerwu_jobs.GRID, 'small', {16: (-3, -2)})
  cerwu = cerwu_jobs.Cerwu('python', 'modules', tmp_path, network, images)
  decoded, _ = cerwu({})
  leaves = trees.named_leaves(network.variables)
  for name, kernel in decoded.items():
    np.testing.assert_array_equal(kernel, leaves[name])
  # a row's bytes are those of the answer and of the vectors, which are rounded to 16 bits
  job, other = cerwu_jobs.jobs_of_cerwu(network, images, cerwu, tmp_path)
  assert (job.setting, other.setting) == ('nbins=16 log10_lm=-3', 'nbins=16 log10_lm=-2')
  found = job.make()
  assert found.file_bytes == 100 + found.vector_bytes
  bias = np.asarray(trees.named_leaves(found.variables)['params/head/bias'])
  assert found.vector_bytes > 0 and np.all(bias.view(np.uint32) & 0xFFFF == 0)
  assert isinstance(opq_jax.load(tmp_path / 'vectors.opq')[1], opq_jax.CompressionState)
