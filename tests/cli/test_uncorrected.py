"""What `opq compress` says of a network that it has not corrected, and `opq inspect --json` too."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from opq_jax import cli
from opq_jax.cli.uncorrected import uncorrected
from opq_jax.core import trees
from opq_jax.weights import write_safetensors
from tests.helpers.opq_files import laplace


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=True)(nn.Dense(32)(x))


class NNX(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.dense, self.norm = nnx.Linear(16, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)


def haiku_state():
  hk = pytest.importorskip('haiku')
  network = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), True))
  return network.init(jax.random.key(0), np.ones((2, 16), np.float32))


TREES = {
  'torch': lambda: {
    '0.weight': laplace(32, 16),
    '0.bias': np.ones(32, np.float32),
    **{f'1.{name}': np.ones(32, np.float32) for name in ('weight', 'running_mean', 'running_var')},
  },
  'linen': lambda: Linen().init(jax.random.key(0), np.ones((2, 16), np.float32)),
  'nnx': lambda: nnx.to_pure_dict(nnx.state(NNX())),
  'haiku': haiku_state,
  'keras': lambda: {
    'dense/kernel:0': laplace(16, 32),
    'bn/moving_mean:0': np.ones(32, np.float32),
    'bn/moving_variance:0': np.ones(32, np.float32),
  },
}
STATISTICS = {
  'torch': ('1.running_mean', 'opq_jax.correction.torch'),
  'linen': ('batch_stats/BatchNorm_0/mean', 'opq_jax.correction.correct_batch_norm'),
  'nnx': ('norm/mean', 'opq_jax.correction.correct_batch_norm'),
  'haiku': ('1/batch_norm/~/mean_ema/average', 'opq_jax.correction.from_haiku'),
  'keras': ('bn/moving_mean:0', ''),
}


@pytest.mark.parametrize('framework', TREES)
def test_uncorrected_statistics(framework):
  named = trees.named_leaves(TREES[framework]())
  path, function = STATISTICS[framework]
  kernels = [name for name, leaf in named.items() if np.ndim(leaf) > 1]
  found = uncorrected(named, kernels)
  assert found == ('statistics', (path,), function)
  assert f'statistics of a normalization ({path}) not corrected' in found.line()
  assert (function or '--model NAME') in found.line()
  assert uncorrected(named, []) is None  # nothing is compressed


@pytest.mark.parametrize(
  ('paths', 'biases', 'function'),
  [
    (['0.weight', '0.bias', '1.weight', '1.bias'], ('0.bias',), 'torch'),
    (['a.self_attn.in_proj_weight', 'a.self_attn.in_proj_bias'], None, 'torch'),
    (['d/kernel/value', 'd/bias/value', 'n/bias/value'], ('d/bias/value',), 'correct_on_images'),
    (['linear/w', 'linear/b'], ('linear/b',), 'correct_on_images'),
    (['d/kernel', 'n/bias', 'pixel/mean'], (), ''),
  ],
)
def test_uncorrected_biases(paths, biases, function):
  found = uncorrected(paths, paths[:1])
  if biases == ():
    assert found is None
  else:
    assert found == ('biases', biases or (paths[1],), f'opq_jax.correction.{function}')
    assert f'{function}(..., ' in found.line() and found.line().startswith('1 bias of a layer (')


@pytest.mark.parametrize('suffix', ['safetensors', 'npz'])
def test_compress_says_uncorrected(tmp_path, monkeypatch, capsys, suffix):
  """Leaf by leaf and in memory, and once more in the JSON of the file."""
  monkeypatch.chdir(tmp_path)
  write = (
    write_safetensors if suffix == 'safetensors' else lambda path, tree: np.savez(path, **tree)
  )
  write(f'net.{suffix}', TREES['torch']())
  assert cli.main(['compress', f'net.{suffix}', 'net.opq']) == 0
  err = capsys.readouterr().err
  assert err.count('1.running_mean) not corrected for the compressed weights') == 1
  assert 'opq_jax.correction.torch' in ' '.join(err.split())
  assert cli.main(['inspect', 'net.opq', '--json']) == 0
  assert json.loads(capsys.readouterr().out)['uncorrected'] == {
    'kind': 'statistics',
    'paths': ['1.running_mean'],
    'correct_with': 'opq_jax.correction.torch',
  }
  write(f'plain.{suffix}', {'w': laplace(16, 32), 'scale': laplace(32)})
  assert cli.main(['compress', f'plain.{suffix}', 'net.opq']) == 0
  assert 'corrected' not in capsys.readouterr().err
  assert cli.main(['inspect', 'net.opq', '--json']) == 0
  assert json.loads(capsys.readouterr().out)['uncorrected'] is None
