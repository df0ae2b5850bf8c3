"""The command `opq verify`."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.compression import CompressionState
from opq_jax.encoders import survey
from tests.helpers import tiny_resnet
from tests.helpers.opq_files import leaf_state


def run(*argv):
  return cli.main([str(word) for word in argv])


@pytest.fixture
def net(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  draw = np.random.default_rng(0).laplace
  tensors = {'fc.weight': draw(size=(64, 48)).astype(np.float32), 'fc.bias': draw(size=64)}
  safetensors.numpy.save_file(tensors, 'net.safetensors')
  assert run('compress', 'net.safetensors', 'net.opq') == 0
  return tensors


def test_verify_exit_codes(net, capsys):
  capsys.readouterr()
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0
  captured = capsys.readouterr()
  assert 'every claim holds' in captured.out and 'fc.weight' in captured.out
  assert 'bytes on disk' in captured.out and captured.err == ''

  safetensors.numpy.save_file({**net, 'fc.bias': net['fc.bias'] + 1}, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  captured = capsys.readouterr()
  assert captured.err.splitlines() == [
    'opq: fc.bias: found 64 values that are not the original ones, expected none',
    'opq: net.opq does not hold what it claims',
  ]
  # the values of a file are compressed to themselves
  assert run('verify', 'net.opq', '--against', 'net.opq') == 0
  assert run('verify', 'net.safetensors', '--against', 'net.opq') == 2
  assert run('verify', 'net.opq') == 2


def test_verify_json(net, capsys):
  capsys.readouterr()
  command = 'verify', 'net.opq', '--against', 'net.safetensors', '--json'
  assert run(*command) == 0
  found = json.loads(capsys.readouterr().out)
  assert run('inspect', 'net.opq', '--json') == 0
  inspected = json.loads(capsys.readouterr().out)
  assert (found['path'], found['against']) == ('net.opq', 'net.safetensors')
  assert (found['holds'], found['problems'], found['exact'], found['corrected']) == (True, [], 1, 0)
  assert found['metadata'] == inspected['metadata']
  for size in ('original', 'packed', 'entropy', 'file', 'file_rate'):
    assert found['totals'][size] == inspected['totals'][size]
  (leaf,) = found['compressed']
  assert leaf['path'] == 'fc.weight' and leaf['problems'] == [] and 0 < leaf['error'] < 0.3
  assert leaf['stored'] + 12 == inspected['compressed'][0]['file']

  weights = net['fc.weight'] * np.float32(0)
  weights[0, 0] = np.nan
  safetensors.numpy.save_file({'fc.weight': weights}, 'net.safetensors')
  assert run(*command) == 1
  captured = capsys.readouterr()
  found = json.loads(captured.out, parse_constant=pytest.fail)  # JSON has no NaN
  assert captured.err == '' and found['holds'] is False and found['totals'] is None
  assert 'fc.bias: found in the file, not in the weights' in found['problems']
  assert found['compressed'][0]['error'] is None


def test_verify_trellis_against_other_leaves(tmp_path, monkeypatch, capsys):
  """Leaves that one of file and weights lacks are named, whatever their codes are."""
  monkeypatch.chdir(tmp_path)
  draw = np.random.default_rng(0).laplace
  tensors = {name: draw(size=(64, 48)).astype(np.float32) for name in ('a', 'b', 'c')}
  safetensors.numpy.save_file(tensors, 'net.safetensors')
  assert run('compress', 'net.safetensors', 'net.opq', '--trellis', '--bits-per-weight', 3) == 0
  other = {'a': tensors['a'], 'b': tensors['b'], 'd': tensors['c']}
  safetensors.numpy.save_file(other, 'other.safetensors')
  capsys.readouterr()
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  lines = capsys.readouterr().err.splitlines()
  assert 'opq: c: found in the file, not in the weights' in lines
  assert 'opq: d: found in the weights, not in the file' in lines


def test_verify_chooses_trellis_codes_again(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  draw = np.random.default_rng(0).laplace
  wide = {'fc1.weight': draw(size=(96, 64)), 'fc1.bias': draw(size=96)}
  tree = {name: leaf.astype(np.float32) for name, leaf in wide.items()}
  tree |= {'fc2.weight': draw(size=(64, 96)), 'same.weight': draw(size=(20, 20))}
  safetensors.numpy.save_file(tree, 'net.safetensors')
  options = '--rate', 12.3456789, '--exclude', 'same*', '--objective', 'squared_error'
  assert run('compress', 'net.safetensors', 'plain.opq', *options) == 0
  assert run('compress', 'net.safetensors', 'net.opq', *options, '--trellis') == 0
  capsys.readouterr()
  errors = {}
  for name in ('plain', 'net'):
    assert run('verify', f'{name}.opq', '--against', 'net.safetensors', '--json') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['metadata']['encoder'] == {'net': 'trellis', 'plain': 'rounding'}[name]
    errors[name] = [leaf['error'] for leaf in found['compressed']]
  assert all(a < 0.97 * b for a, b in zip(errors['net'], errors['plain'], strict=True))

  tree['fc1.weight'] = tree['fc1.weight'] * np.float32(1.02)
  safetensors.numpy.save_file(tree, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  assert 'fc1.weight: found' in capsys.readouterr().err


def test_verify_repeats_version_of_trellis(tmp_path, monkeypatch, capsys):
  # every other output is enough for a survey
  monkeypatch.setattr(survey, '_MIN_OUTPUTS', 8)
  monkeypatch.setattr(survey, '_MIN_WEIGHTS', 1 << 10)
  monkeypatch.chdir(tmp_path)
  tree = {'fc.weight': np.random.default_rng(0).laplace(size=(96, 64)).astype(np.float32)}
  safetensors.numpy.save_file(tree, 'net.safetensors')
  assert run('compress', 'net.safetensors', 'net.opq', '--rate', 12, '--trellis') == 0
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0
  with opq_jax.OpqFile('net.opq') as file:
    metadata = dict(file.metadata)
  assert metadata.pop('trellis_version') == '2'
  # a file from before there were versions holds the codes of the first one
  old = opq_jax.compress(tree, compression_rate=12.0, encoder=opq_jax.encoders.Trellis(version=1))
  opq_jax.save('old.opq', old.params, old.state, metadata)
  assert run('verify', 'old.opq', '--against', 'net.safetensors') == 0
  opq_jax.save('wrong.opq', old.params, old.state, {**metadata, 'trellis_version': '2'})
  assert run('verify', 'wrong.opq', '--against', 'net.safetensors') == 1
  opq_jax.save('newer.opq', old.params, old.state, {**metadata, 'trellis_version': '3'})
  capsys.readouterr()
  assert run('verify', 'newer.opq', '--against', 'net.safetensors') == 2
  assert "trellis_version: found '3', expected one of 1, 2" in capsys.readouterr().err


def test_verify_lists_at_most_a_page(net, capsys):
  safetensors.numpy.save_file({f'x{i}': np.zeros(1) for i in range(40)}, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 21 and lines[-1].endswith('; 22 more problems like these')


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    [],
    ['--no-correction'],
    ['--inference-only', '--no-correction'],
    ['--inference-only', '--feedback'],
    ['--trellis'],
    ['--trellis', '--feedback'],
  ],
)
def test_verify_corrects_batch_norm_again(tmp_path, monkeypatch, capsys, options):
  monkeypatch.chdir(tmp_path)
  tiny_resnet.replace_resnet20(monkeypatch)
  tensors = tiny_resnet.tensors()
  safetensors.numpy.save_file(tensors, 'net.safetensors')
  command = 'compress', '--model', 'resnet20', 'net.safetensors', 'net.opq', '--rate', 8
  assert run(*command, *options) == 0
  capsys.readouterr()
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0
  out = capsys.readouterr().out
  assert ('corrected' in out) == (options != ['--no-correction'])

  name = next(name for name in tensors if name.endswith('running_mean'))
  tensors[name] = tensors[name] + np.float32(1)
  safetensors.numpy.save_file(tensors, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  # a file for inference has the mean in the bias
  where = '_bn/bias' if '--inference-only' in options else 'batch_stats/'
  assert where in capsys.readouterr().err


def test_inspect_escapes_control_characters(tmp_path, capsys):
  params = {'\x1b[2Jname': np.zeros((4, 4), np.float32), '\ud800': np.zeros(2, np.float32)}
  state = CompressionState({'\x1b[2Jname': leaf_state(params['\x1b[2Jname']), '\ud800': None})
  path = tmp_path / 'net.opq'
  opq_jax.save(path, params, state, {'\x1b]0;title': '\x07'})
  assert run('inspect', path) == 0
  out = capsys.readouterr().out
  assert '\\x1b[2Jname' in out and '\x1b' not in out and '\x07' not in out


def claiming(path, **metadata):
  """Writes a file again with other metadata."""
  params, state = opq_jax.load(path)
  with opq_jax.OpqFile(path) as file:
    opq_jax.save(path, params, state, {**file.metadata, **metadata})


def test_exact_values_take_what_the_file_takes(tmp_path, monkeypatch, capsys):
  # bits of an exact bfloat16 are fewer than 16: exponents repeat
  monkeypatch.chdir(tmp_path)
  kernel = np.random.default_rng(0).laplace(size=(96, 64)).astype(ml_dtypes.bfloat16)
  safetensors.numpy.save_file({'fc.weight': kernel}, 'net.safetensors')
  assert run('compress', 'net.safetensors', 'net.opq', '--bits-per-weight', 11) == 0
  with opq_jax.OpqFile('net.opq') as file:
    np.testing.assert_array_equal(file['fc.weight'], kernel)
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 0
  claiming('net.opq', bits_per_weight='10')
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 1


@pytest.mark.parametrize(
  ('claims', 'problem'),
  [
    ({'palette_bits': '2'}, 'fc.weight: found 13 levels a sign and'),
    ({'file_rate': '99'}, 'file_rate: found 5.'),
    ({'compression_rate': '20'}, 'bits per weight: found 3.1'),
    ({'bits_per_weight': '2'}, 'bits per weight: found 3.1'),
  ],
)
def test_targets_that_a_file_misses_are_named(net, capsys, claims, problem):
  claiming('net.opq', **claims)
  capsys.readouterr()
  assert run('verify', 'net.opq', '--against', 'net.safetensors') == 1
  first, *_, last = capsys.readouterr().err.splitlines()
  assert problem in first and last == 'opq: net.opq does not hold what it claims'


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
def test_weights_from_a_fifo_are_refused_in_one_line(tmp_path, capsys, suffix):
  path = tmp_path / f'net{suffix}'
  os.mkfifo(path)
  assert run('compress', path, tmp_path / 'net.opq') == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f'opq: {path}: found a FIFO, expected a file or a folder'
