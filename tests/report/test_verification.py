import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import importers, models
from opq_jax.cli import command as cli
from opq_jax.compression.codes import CompressionState, encode
from opq_jax.file import writer
from opq_jax.importers import networks
from opq_jax.report import cell_checks, sizes
from opq_jax.report.verification import verify
from tests.helpers.opq_files import escaping, leaf_state, small, state_of, with_escapes
from tests.helpers.variables import random_variables


def changed(params, path, index, value):
  """The tree with one weight of another value."""
  flat, structure = jax.tree.flatten(params)
  leaves = dict(zip(opq_jax.core.trees.named_leaves(params), flat, strict=True))
  leaves[path] = np.array(leaves[path])
  leaves[path][index] = value
  return jax.tree.unflatten(structure, leaves.values())


def test_a_file_holds_against_its_own_weights(tmp_path):
  params, state = small()
  opq_jax.save(tmp_path / 'net.opq', params, state)
  found = verify(tmp_path / 'net.opq', params)
  assert found.holds and found.problems == () and (found.exact, found.corrected) == (2, 0)
  assert found.report == sizes.size_report(params, state)
  values = opq_jax.apply_compression(params, state)
  for row, (path, leaf, value) in zip(
    found.compressed,
    [('a', params['a'], values['a']), ('b/1', params['b'][1], values['b'][1])],
    strict=True,
  ):
    codes = np.asarray(encode({'x': leaf}, CompressionState({'x': leaf_state(leaf)}))['x'])
    assert (row.path, row.weights, row.levels, row.problems) == (path, leaf.size, 4, ())
    assert row.sparsity == pytest.approx(np.mean(codes == 0))
    error = float(np.sum((leaf - np.asarray(value)) ** 2) / np.sum(leaf**2))
    assert row.error == pytest.approx(error, rel=1e-5)
    # levels end at 0.5 + 4 * 0.5
    assert row.clipped == np.count_nonzero(np.abs(leaf) >= 2.5)
    assert 0.4 < row.worst <= 0.5
  assert 'a ' in str(found) and 'yes' in str(found)


@pytest.mark.parametrize(
  ('path', 'index', 'value', 'problem'),
  [
    ('a', (0, 0), 0.75, 'a: found 1 pruned weights above the threshold 0.5'),
    ('a', (0, 1), 0.1, 'a: found 1 survivors that the threshold 0.5 prunes'),
    ('a', (0, 1), +0.6, 'a: found 1 survivors of the other sign'),
    ('a', (0, 1), -1.1, 'a: found 1 survivors outside of their cells'),
    ('a', (0, 1), np.nan, 'a: found 1 survivors that'),
    ('a', (0, 0), np.nan, 'a: found 1 pruned weights above'),
    ('b/0', 3, 1.0, 'b/0: found 1 values that are not the original ones'),
    ('c', (), 4, 'c: found 1 values'),
  ],
)
def test_one_other_weight_is_found(path, index, value, problem):
  params, _ = small()
  params['a'][0, 0], params['a'][0, 1] = 0.25, -0.6
  data = writer.serialize(params, state_of(params))
  assert verify(data, params).holds
  found = verify(data, changed(params, path, index, value))
  assert not found.holds and len(found.problems) >= 1
  assert found.problems[0].startswith(problem)


def test_other_trees_are_found():
  params, state = small()
  data = writer.serialize(params, state)
  other = {**params, 'd': np.zeros(2), 'a': params['a'].T, 'c': np.int16(3)}
  del other['b']
  found = verify(data, other)
  assert found.report is None
  assert found.problems == (
    'a: found float32[12, 5], expected float32[5, 12]',
    'b/0: found in the file, not in the weights',
    'b/1: found in the file, not in the weights',
    'c: found int8[], expected int16[]',
    'd: found in the weights, not in the file',
  )


def test_float64_may_be_compressed_as_float32_and_stays_float64_elsewhere():
  params = {'w': np.random.default_rng(0).laplace(size=(6, 5)), 'b': np.ones(3)}
  narrow = {**params, 'w': params['w'].astype(np.float32)}
  data = writer.serialize(narrow, state_of(narrow))
  assert verify(data, params).holds
  assert verify(data, {**params, 'b': np.ones(3, np.float32)}).problems == (
    'b: found float64[3], expected float32[3]',
  )


@pytest.mark.filterwarnings('ignore:.*Laplace density')
def test_narrow_dtypes_and_leaves_of_zeros_hold():
  params = {
    'brain': np.random.default_rng(0).laplace(size=(30, 20)).astype(ml_dtypes.bfloat16),
    'half': np.random.default_rng(1).laplace(size=(30, 20)).astype(np.float16),
    'zeros': np.zeros((4, 4), np.float32),
    'signs': np.sign(np.random.default_rng(2).normal(size=(8, 8))).astype(np.float32),
  }
  allocation = opq_jax.allocate(params, compression_rate=12.0, corrected=False)
  state = opq_jax.init_state(params, allocation)
  found = verify(writer.serialize(params, state), params)
  assert found.holds, found.problems
  assert [row.error for row in found.compressed if row.path == 'zeros'] == [0.0]


def test_corrected_leaves_are_near_the_corrected():
  params, state = small()
  corrected = changed(params, 'b/0', 2, 7.0)
  stored = changed(params, 'b/0', 2, np.float32(7.0) * (1 + 1e-5))
  data = writer.serialize(stored, state)
  assert not verify(data, params).holds
  found = verify(data, params, corrected=corrected)
  assert found.holds and (found.exact, found.corrected) == (1, 1)
  assert not verify(data, params, corrected=changed(params, 'b/0', 2, 7.1)).holds


def test_codes_of_feedback_hold_against_the_weights_that_they_were_chosen_for():
  rng = np.random.default_rng(0)
  inputs = (rng.normal(size=(256, 48)) @ rng.normal(size=(48, 48))).astype(np.float32)
  params = {'w': rng.laplace(size=(48, 32)).astype(np.float32), 'bias': np.ones(3, np.float32)}
  moments = {'w': (inputs.T @ inputs / 256)[None], 'bias': None}
  encoder = opq_jax.encoders.Feedback(moments)
  coded, state, _ = opq_jax.compress(params, compression_rate=12.0, encoder=encoder)
  data = writer.serialize(coded, state)
  assert not verify(data, params).holds
  found = verify(data, params, coded=coded)
  assert found.holds, found.problems
  # errors are against the weights all the same
  error = np.sum((params['w'] - np.asarray(coded['w'])) ** 2) / np.sum(params['w'] ** 2)
  assert found.compressed[0].error == pytest.approx(error, rel=1e-4)
  flipped = {**coded, 'w': -np.asarray(coded['w'])}
  assert any('of the other sign' in text for text in verify(data, params, coded=flipped).problems)


def test_a_payload_that_is_longer_than_its_codes_need_is_found(monkeypatch):
  params, state = small()
  data = writer.serialize(params, state)
  short = writer.WrittenLeaf(b'short', '', '1')
  monkeypatch.setattr(cell_checks, 'written_leaf', lambda *_, contexts: short)
  problems = verify(data, params).problems
  assert len(problems) == 2 and problems[0].startswith('a: found a payload of ')


# ---- escaped weights ----


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_escaped_weights_hold_and_are_counted(dtype):
  params, state = escaping(dtype)
  found = verify(writer.serialize(params, state), params)
  assert found.holds, found.problems
  (row,) = found.compressed
  assert row.escaped == 5 and row.worst <= 0.5 and 'escaped' in str(found)
  # weights beyond the last cell that do not escape are clipped
  assert row.clipped == np.count_nonzero(np.abs(params['w'].astype(np.float32)) >= 2.5) - 4


def test_escaped_weights_are_the_original_ones():
  params, state = escaping()
  data = writer.serialize(params, state)
  other = changed(params, 'w', (0, 0), np.nextafter(np.float32(40), np.float32(41)))
  assert verify(data, other).problems == (
    'w: found 1 escaped weights that are not the original ones, expected none',
  )
  assert not verify(data, params, coded=other).holds
  assert verify(data, other, coded=params).holds


def test_a_clipped_weight_is_told_from_an_escaped_one():
  params, _ = escaping()
  (row,) = verify(writer.serialize(params, state_of(params)), params).compressed
  assert row.escaped == 0
  assert row.clipped == np.count_nonzero(np.abs(params['w']) >= 2.5)


def test_weights_that_came_back_infinite_are_a_problem():
  params, state = small()
  values = np.array(opq_jax.apply_compression(params, state)['a'])
  values[0, 0], values[0, 1] = np.inf, np.nan
  codes, record = np.asarray(encode(params, state)['a']), state.tree['a']
  row = cell_checks.check_leaf('a', params['a'], params['a'], codes, values, record, 0)
  assert 'a: found 2 finite weights that came back infinite or NaN, expected none' in row.problems


def test_a_mark_without_its_code_is_a_problem():
  params, state = small()
  codes = np.asarray(encode(params, state)['a'])
  marked = with_escapes(state.tree['a'], (0, 0))
  row = cell_checks.check_leaf('a', params['a'], params['a'], codes, params['a'], marked, 0)
  assert 'a: found 1 escaped weights whose code and kind differ, expected none' in row.problems


def test_the_byte_order_of_the_original_does_not_matter():
  params, state = escaping()
  data = writer.serialize(params, state)
  swapped = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder('>')), params)
  found = verify(data, swapped, coded=swapped, corrected=swapped)
  assert found.holds and found.exact == 1 and found.report is not None


# ---- the command ----


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


def test_the_command_verifies(net, capsys):
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


def test_the_command_says_it_to_programs(net, capsys):
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


def test_codes_along_a_trellis_are_chosen_again(tmp_path, monkeypatch, capsys):
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
    assert found['metadata'].get('codes', 'plain') == {'net': 'along a trellis'}.get(name, 'plain')
    errors[name] = [leaf['error'] for leaf in found['compressed']]
  assert all(a < 0.97 * b for a, b in zip(errors['net'], errors['plain'], strict=True))

  tree['fc1.weight'] = tree['fc1.weight'] * np.float32(1.02)
  safetensors.numpy.save_file(tree, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  assert 'fc1.weight: found' in capsys.readouterr().err


def test_the_command_lists_no_more_than_a_page(net, capsys):
  safetensors.numpy.save_file({f'x{i}': np.zeros(1) for i in range(40)}, 'other.safetensors')
  assert run('verify', 'net.opq', '--against', 'other.safetensors') == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 21 and lines[-1].endswith('; 22 more problems like these')


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
def test_the_command_corrects_batch_norm_again(tmp_path, monkeypatch, capsys, options):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(networks, 'noise_shape', lambda source: (4, 32, 32, 3))  # quicker
  variables = random_variables(models.create('resnet20', num_classes=5))
  tensors = importers.to_tensors('resnet20', variables, 'akamaster')
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


def test_names_are_shown_without_what_a_terminal_obeys(tmp_path, capsys):
  params = {'\x1b[2Jname': np.zeros((4, 4), np.float32), '\ud800': np.zeros(2, np.float32)}
  state = CompressionState({'\x1b[2Jname': leaf_state(params['\x1b[2Jname']), '\ud800': None})
  path = tmp_path / 'net.opq'
  opq_jax.save(path, params, state, {'\x1b]0;title': '\x07'})
  assert run('inspect', path) == 0
  out = capsys.readouterr().out
  assert '\\x1b[2Jname' in out and '\x1b' not in out and '\x07' not in out


def test_the_results_are_frozen():
  params, state = small()
  found = verify(writer.serialize(params, state), params)
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.problems = ()
