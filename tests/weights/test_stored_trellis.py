"""Codes along a trellis of trees on disk: those in memory, after a kill too, in bounded memory."""

import errno
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from experiments.benchmarks.resources import large_trees
from opq_jax import cli, encoders
from opq_jax.report import payload_report
from opq_jax.weights import compress_stored, open_weights, stored_trellis
from opq_jax.weights.spooled_file import SpooledFile
from tests.helpers.language_models import write_folder

pytestmark = pytest.mark.filterwarnings('ignore:the Laplace density')


def laplace(*shape, seed=0):
  return np.random.default_rng(seed).laplace(size=shape).astype(np.float32)


def tree():
  """Leaves of all kinds: tied ones, a stack, some that the trellis does not serve, outliers."""
  table = laplace(120, 48)
  table[3, :2] = 900, -700
  stack = 0.1 * laplace(3, 40, 32, seed=3)
  stack[1] *= 8
  return {
    'embed': table,
    'half': laplace(64, 40, seed=1).astype(ml_dtypes.bfloat16),
    'head': table.copy(),
    'lattice': np.sign(laplace(32, 32, seed=2)),
    'long_tails': laplace(48, 48, seed=4) ** 7,
    'norm': np.ones(48, np.float32),
    'stack': stack,
    'turned': np.ascontiguousarray(table.T),
  }


OPTIONS = {
  'slices': lambda path, _: int(path == 'stack'),
  'channel_axis': lambda path, _: 0 if path == 'half' else -1,
}


@pytest.fixture
def stored(tmp_path):
  safetensors.numpy.save_file(tree(), tmp_path / 'net.safetensors')
  return open_weights(tmp_path / 'net.safetensors')


def expected(params, **targets):
  network = opq_jax.compress(params, encoder=encoders.Trellis(), **OPTIONS, **targets)
  return opq_jax.file.serialize(network.params, network.state)


def test_trellis_of_a_stored_tree_equals_compress(stored, tmp_path):
  options = {'encoder': encoders.Trellis(), **OPTIONS}
  with pytest.warns(UserWarning, match='long_tails.*does not serve'):
    done = compress_stored(stored, tmp_path / 'net.opq', compression_rate=10.0, **options)
  with pytest.warns(UserWarning, match='long_tails.*does not serve'):
    data = expected(tree(), compression_rate=10.0)
  assert (tmp_path / 'net.opq').read_bytes() == data
  axis = OPTIONS['channel_axis']
  assert done.report == payload_report(data, tree(), channel_axis=axis)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['net.opq', 'net.safetensors']


@pytest.mark.filterwarnings('ignore:.*does not serve')
def test_trellis_of_a_file_rate_equals_compress(stored, tmp_path):
  found = []

  def about(targets):
    found.append(targets['bits_per_weight']) if 'bits_per_weight' in targets else None
    return {}

  options = {'encoder': encoders.Trellis(), 'metadata': about, **OPTIONS}
  compress_stored(stored, tmp_path / 'net.opq', file_rate=9.0, **options)
  data = expected(tree(), bits_per_weight=found[-1])
  assert (tmp_path / 'net.opq').read_bytes() == data
  assert len(data) == pytest.approx(sum(leaf.nbytes for leaf in tree().values()) / 9, rel=0.01)


def test_trellis_of_scaled_outputs_equals_compress(tmp_path):
  costs = np.geomspace(1, 64, 64, dtype=np.float32)[None]
  params = {'a': laplace(96, 64), 'b': laplace(64, 64, seed=1)}
  objective = {'a': costs, 'b': 1.0}
  safetensors.numpy.save_file(params, tmp_path / 'net.safetensors')
  options = {'encoder': encoders.Trellis(), 'objective': objective, 'bits_per_weight': 3.0}
  compress_stored(open_weights(tmp_path / 'net.safetensors'), tmp_path / 'net.opq', **options)
  network = opq_jax.compress(params, **options)
  assert network.state.tree['a'].output_scales is not None
  assert (tmp_path / 'net.opq').read_bytes() == opq_jax.file.serialize(*network[:2])


class Killed(Exception):
  """Stands for the end of a process."""


@pytest.mark.filterwarnings('ignore:.*does not serve')
@pytest.mark.parametrize(('count', 'share'), [(0, 2.0), (5, 2.0), (3, 0.0), (7, 0.0), (10, 0.0)])
def test_trellis_goes_on_after_a_kill(stored, tmp_path, monkeypatch, count, share):
  # every leaf for itself; a survey although leaves are small, or steps of a search without one
  monkeypatch.setattr(stored_trellis, '_AT_ONCE', 1)
  monkeypatch.setattr(stored_trellis.survey, '_MAX_SHARE', share)
  options = {'encoder': encoders.Trellis(), 'compression_rate': 10.0, **OPTIONS}
  whole, left = tmp_path / 'whole.opq', []
  code = stored_trellis._Search._coded

  def counted(self, name, *arguments):
    left.append(name)
    if len(left) > count:
      raise Killed
    return code(self, name, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(stored_trellis._Search, '_coded', counted)
    with pytest.raises(Killed):
      compress_stored(stored, tmp_path / 'net.opq', **options)
  assert not (tmp_path / 'net.opq').exists()
  calls = []

  def noted(self, name, *arguments):
    calls.append(name)
    return code(self, name, *arguments)

  monkeypatch.setattr(stored_trellis._Search, '_coded', noted)
  compress_stored(stored, tmp_path / 'net.opq', **options)
  after = len(calls)
  compress_stored(stored, whole, **options)
  # what was done before is not done again
  assert after == len(calls) - after - count
  assert (tmp_path / 'net.opq').read_bytes() == whole.read_bytes()
  assert not (tmp_path / 'net.opq.blocks').exists()


@pytest.mark.filterwarnings('ignore:.*does not serve')
def test_trellis_begins_anew_with_a_warning(stored, tmp_path, monkeypatch):
  options = {'encoder': encoders.Trellis(), 'compression_rate': 10.0, **OPTIONS}

  def killed(*_):
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(stored_trellis._Search, 'survey', killed)
    patch.setattr(stored_trellis._Search, 'trial', killed)
    with pytest.raises(Killed):
      compress_stored(stored, tmp_path / 'net.opq', **options)
  (tmp_path / 'net.opq.blocks' / 'streams.npz').write_bytes(b'PK')
  with pytest.warns(UserWarning, match=r'streams\.npz: found it damaged .* the work begins anew'):
    compress_stored(stored, tmp_path / 'net.opq', **options)


@pytest.mark.parametrize(
  ('encoder', 'targets', 'message'),
  [
    (encoders.Feedback({}), {'compression_rate': 9.0}, r'encoder: found Feedback'),
    (encoders.Trellis({'w': None}), {'compression_rate': 9.0}, 'Trellis.. without moments'),
    (encoders.Trellis(), {'sparsity': 0.5, 'bits': 3.0}, 'together with sparsity and bits'),
    (encoders.Trellis(), {'palette_bits': 4}, 'palette_bits: found it together with codes'),
  ],
)
def test_compress_stored_refuses_encoders(stored, tmp_path, encoder, targets, message):
  with pytest.raises(ValueError, match=message):
    compress_stored(stored, tmp_path / 'net.opq', encoder=encoder, **targets)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['net.safetensors']


def test_command_keeps_foreign_files_beside_its_work(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  write_folder(tmp_path / 'llama', 'llama')
  (tmp_path / 'net.opq.blocks').mkdir()
  (tmp_path / 'net.opq.blocks' / 'mine.txt').write_text('mine')
  assert cli.main(['compress', 'llama', 'net.opq', '--trellis']) == 2
  assert 'net.opq.blocks' in capsys.readouterr().err
  assert (tmp_path / 'net.opq.blocks' / 'mine.txt').read_text() == 'mine'


@pytest.mark.slow
def test_trellis_peak_memory(monkeypatch):
  # compiled in less time: the trees take as much memory
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  found = large_trees.run(32_000_000, 8_000_000, None, encoder='trellis')
  # over that of its largest leaf alone: the whole tree would add three times the leaf, its kinds,
  # codes and values as much again
  assert found['original'] >= 4 * found['largest']
  assert found['peak'] - found['one'] <= 2 * found['largest']
  assert found['one'] - found['constant'] <= 8 * found['largest']


def test_command_says_where_work_is_kept_when_a_disk_is_full(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  write_folder(tmp_path / 'llama', 'llama')

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'net.opq')

  with monkeypatch.context() as patch:
    patch.setattr(SpooledFile, 'place', full)
    assert cli.main(['compress', 'llama', 'net.opq', '--trellis']) == 2
  assert capsys.readouterr().err.endswith(
    'net.opq: No space left on device; what is done is kept in net.opq.blocks: the same run goes '
    'on from there, unless it searches for a file_rate\n'
  )
  assert (tmp_path / 'net.opq.blocks').is_dir()
