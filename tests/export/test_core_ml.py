"""Compressed networks as Core ML packages, decompressed by coremltools."""

import os
import pathlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

import opq_jax
from opq_jax import cli
from opq_jax.compression import CompressionState
from opq_jax.export import write_core_ml
from opq_jax.file import serialize
from opq_jax.weights import graph_uses, read_weights
from tests.helpers import opq_files

pytest.importorskip('coremltools')

from tests.helpers import core_ml_programs as programs

LAYERS = [
  'conv',
  'transposed',
  'linear',
  'heads',
  'first',
  'table',
  'lstm_ih',
  'lstm_hh',
  'inner',
  'other',
]
GOLDEN = sorted((pathlib.Path(__file__).parents[1] / 'golden').glob('version_2_*.opq'))


def size(path):
  return sum(part.stat().st_size for part in pathlib.Path(path).rglob('*') if part.is_file())


@pytest.mark.parametrize(('precision', 'end'), [('FLOAT32', ''), ('FLOAT16', '_to_fp16')])
def test_layers_are_exact(tmp_path, monkeypatch, capsys, precision, end):
  monkeypatch.chdir(tmp_path)
  programs.save('net.mlpackage', programs.layers(), precision)
  assert cli.main(['compress', 'net.mlpackage', 'net.opq', '--bits-per-weight', '4']) == 0
  assert cli.main(['export', 'net.opq', 'small.mlpackage', '--into', 'net.mlpackage']) == 0
  assert 'rounded' not in capsys.readouterr().err
  before, found = programs.weights('net.mlpackage'), programs.weights('small.mlpackage')
  uses = graph_uses('net.mlpackage')
  with opq_jax.OpqFile('net.opq') as file:
    compressed = {name for name in file if file.grids(name)}
    assert compressed == {f'{name}{end}' for name in LAYERS} == set(uses)
    for name in compressed:
      assert found[name].dtype == file.dtype(name) == precision.lower()
      assert found[name].tobytes() == file[name].tobytes() != before[name].tobytes(), name
  kinds = programs.kinds('small.mlpackage')
  # 240 weights of float16 are no larger than a table
  assert {name for name in compressed if kinds[name] == 'const'} <= {f'first{end}'}
  axes = {name.removesuffix(end): use.channel_axis for name, use in uses.items()}
  assert axes == dict.fromkeys(axes, 0) | {'transposed': 1, 'heads': 1, 'table': 1}
  assert found.keys() == before.keys()
  for name in found.keys() - compressed:
    assert np.array_equal(found[name], before[name]), name
  assert size('small.mlpackage') < size('net.mlpackage')


@pytest.mark.parametrize('path', GOLDEN, ids=lambda path: path.stem)
def test_all_kinds_of_leaves_are_exact(tmp_path, path):
  """Slices, scales, escapes, ties and rotated inputs, of float16, float32 and bfloat16."""
  with opq_jax.OpqFile(path) as file:
    held = {
      name: file[name].astype(np.float16 if file.dtype(name) == np.float16 else np.float32)
      for name in file
      if file.dtype(name) in (np.float16, np.float32, ml_dtypes.bfloat16) and file[name].size > 9
    }
    # unlike in the last bits: equal constants would become one
    arrays = {name: array + number for number, (name, array) in enumerate(held.items())}
    programs.save(tmp_path / 'net.mlpackage', programs.holding(arrays))
    written = write_core_ml(tmp_path / 'small.mlpackage', file, tmp_path / 'net.mlpackage')
    compressed = {name for name in held if file.grids(name)}
  assert {leaf.name for leaf in written.leaves} == compressed
  assert not written.rounded and not written.left
  found = programs.weights(tmp_path / 'small.mlpackage')
  for name, array in held.items():
    # coremltools writes other names, and one of equal constants
    clean = re.sub(r'\W', '_', name)
    there = [found[clean]] if clean in found else found.values()
    assert any(opq_files.same_bits(one, array) for one in there), name


FORMS = [
  (2, 0, 'palette of 1 bits', 1),
  (4, 0, 'palette of 2 bits', 2),
  (8, 0, 'palette of 3 bits', 3),
  (16, 0, 'palette of 4 bits', 4),
  (17, 0, 'sparse, palette of 4 bits', 1 + 16 / 17 * 4),
  (33, 0, 'palette of 6 bits', 6),
  (100, 0, 'palette of 8 bits', 8),
  (16, 0.8, 'sparse, palette of 4 bits', 1 + 0.2 * 4),
  (9, 0.8, 'sparse, palette of 3 bits', 1 + 0.2 * 3),
  (400, 0.9, 'sparse, floats', 1 + 0.1 * 32),
  (400, 0, 'floats', 32),
]
"""Values that occur, share of zeros, and the form of the fewest bytes with its bits per weight."""


def test_forms_take_few_bytes(tmp_path):
  rng = np.random.default_rng(0)
  grid = np.float32([0, *(sign * (1 + k) / 4 for k in range(200) for sign in (-1, 1))])
  params, records = {}, {}
  for number, (values, zeros, _, _) in enumerate(FORMS):
    array = rng.choice(grid[:values], (300, 301)) * (rng.random((300, 301)) >= zeros)
    params[f'w{number}'] = array = array.astype(np.float32) + np.float32(0)
    record = opq_files.leaf_state(array, 0.125, 0.25, 50)
    if values > 256:  # weights that are stored as they are
      record = opq_files.with_escapes(record, array != 0)
    records[f'w{number}'] = record
  programs.save(
    tmp_path / 'net.mlpackage',
    programs.holding(
      {name: array + 1 + number for number, (name, array) in enumerate(params.items())}
    ),
  )
  with opq_jax.OpqFile(serialize(params, CompressionState(records))) as file:
    written = write_core_ml(tmp_path / 'small.mlpackage', file, tmp_path / 'net.mlpackage')
    for name, array in params.items():
      assert file[name].tobytes() == array.tobytes()
  leaves = {leaf.name: leaf for leaf in written.leaves}
  for number, (_, _, form, bits) in enumerate(FORMS):
    leaf = leaves[f'w{number}']
    assert leaf.form == form and bool(leaf.reason) == (form == 'floats')
    expected = 300 * 301 * bits / 8
    assert 0.98 * expected < leaf.bytes < 1.02 * expected + 3000, form
  assert written.size == size(tmp_path / 'small.mlpackage')
  assert written.size < sum(leaf.bytes for leaf in written.leaves) + 9000
  found = programs.weights(tmp_path / 'small.mlpackage')
  assert all(found[name].tobytes() == array.tobytes() for name, array in params.items())


def test_names_and_dtypes_of_the_package(tmp_path, monkeypatch, capsys):
  """Leaves of PyTorch's names in float32, in a package of float16 by coremltools' names."""
  monkeypatch.chdir(tmp_path)
  kernel, bias = programs.laplace(64, 48), np.ones(64, np.float32)
  params = {'fc.0.weight': kernel, 'fc.0.bias': 3 * bias, 'gone.weight': kernel}
  # a grid that float16 does not hold
  record = opq_files.leaf_state(kernel, 0.5, 0.3)
  state = {'fc.0.weight': record, 'fc.0.bias': None, 'gone.weight': record}
  opq_jax.save('net.opq', params, CompressionState(state))

  @programs.mb.program(
    input_specs=[programs.mb.TensorSpec(shape=(1, 48))], opset_version=programs.ct.target.iOS18
  )
  def program(x):
    const = lambda name, array: programs.mb.const(val=array, name=name)
    y = programs.mb.linear(x=x, weight=const('fc_0_weight', kernel), bias=const('fc_0_bias', bias))
    return programs.mb.linear(x=y, weight=const('added', kernel[:, :32].T.copy()))

  programs.save('net.mlpackage', program, 'FLOAT16')
  assert cli.main(['export', 'net.opq', 'small.mlpackage', '--into', 'net.mlpackage']) == 0
  told = ' '.join(capsys.readouterr().err.split())
  assert '1 leaves that are not compressed differ from those of net.mlpackage' in told
  assert '1 leaves of net.opq are no tensors of net.mlpackage: gone.weight' in told
  assert (
    '1 leaves of net.opq are rounded to the dtype that they have in net.mlpackage: fc.0' in told
  )
  assert '1 weights of net.mlpackage are not in net.opq, and stay, 4,096 bytes: added' in told
  found = programs.weights('small.mlpackage')
  with opq_jax.OpqFile('net.opq') as file:
    values = file['fc.0.weight'].astype(np.float16)
  assert found['fc_0_weight_to_fp16'].tobytes() == values.tobytes()
  assert (found['fc_0_bias_to_fp16'] == np.float16(3)).all()


def test_packages_that_do_not_fit(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  kernel, out = programs.laplace(16, 64), pathlib.Path('small.mlpackage')
  opq_jax.save('net.opq', {'kernel': kernel}, opq_files.state_of({'kernel': kernel}))
  arguments = ['export', 'net.opq', 'small.mlpackage', '--into', 'net.mlpackage']
  for arrays, target, message in (
    ({'another': kernel}, 'iOS18', 'found no constant of the name of a compressed leaf, expected'),
    ({'kernel': kernel.T.copy()}, 'iOS18', 'kernel: found (64, 16), expected (16, 64)'),
    ({'kernel': kernel}, 'iOS17', 'found a package for iOS 17, expected one for iOS 18 or later'),
  ):
    shutil.rmtree('net.mlpackage', ignore_errors=True)
    programs.save('net.mlpackage', programs.holding(arrays, target), target=target)
    assert cli.main(arguments) == 2
    assert message in ' '.join(capsys.readouterr().err.split())
  # floats go into packages of any version
  assert cli.main(['decompress', 'net.opq', 'back.mlpackage', '--into', 'net.mlpackage']) == 0
  with opq_jax.OpqFile('net.opq') as file:
    assert programs.weights('back.mlpackage')['kernel'].tobytes() == file['kernel'].tobytes()
  assert programs.kinds('back.mlpackage')['kernel'] == 'const'
  (weights,) = pathlib.Path('net.mlpackage').rglob('weight.bin')
  (program,) = pathlib.Path('net.mlpackage').rglob('model.mlmodel')
  for damaged, data, message in (
    (weights, weights.read_bytes()[:90], 'weight.bin: found no blob at byte 64, expected one'),
    (
      program,
      b'no model',
      'net.mlpackage: expected a Core ML package of an ML program',
    ),
  ):
    damaged.write_bytes(data)
    assert cli.main(['compress', 'net.mlpackage', 'new.opq']) == 2
    assert message in ' '.join(capsys.readouterr().err.split())
  assert cli.main(['export', 'net.opq', 'small.onnx', '--into', 'net.mlpackage']) == 2
  assert not out.exists()
  out.mkdir()
  (out / 'Manifest.json').write_bytes(b'old')
  assert cli.main(arguments) == 2
  assert (out / 'Manifest.json').read_bytes() == b'old'


def test_weights_compressed_by_others_are_named(tmp_path):
  """Weights that coremltools has compressed stay as they are, and are said by name."""
  arrays = {'kernel': programs.laplace(64, 64), 'other': programs.laplace(64, 65)}
  only = lambda name: {name: arrays[name]}
  coded = lambda name: serialize(only(name), opq_files.state_of(only(name)))
  programs.save(tmp_path / 'net.mlpackage', programs.holding(arrays))
  with opq_jax.OpqFile(coded('other')) as file:
    first = write_core_ml(tmp_path / 'one.mlpackage', file, tmp_path / 'net.mlpackage')
  with pytest.warns(
    UserWarning, match='other: found weights that are compressed already: left out'
  ):
    assert read_weights(tmp_path / 'one.mlpackage').keys() == {'kernel'}
  with opq_jax.OpqFile(coded('kernel')) as file:
    second = write_core_ml(tmp_path / 'both.mlpackage', file, tmp_path / 'one.mlpackage')
  assert second.size < first.size
  before, found = (programs.weights(tmp_path / f'{name}.mlpackage') for name in ('one', 'both'))
  assert found['other'].tobytes() == before['other'].tobytes()
  assert found['kernel'].tobytes() != before['kernel'].tobytes()


def package(tmp_path):
  """A package of one matrix, and a file of it."""
  kernel = programs.laplace(64, 32)
  programs.save(tmp_path / 'net.mlpackage', programs.holding({'kernel': kernel}))
  network = opq_jax.compress({'kernel': kernel}, compression_rate=8.0)
  opq_jax.save(tmp_path / 'net.opq', network.params, network.state)
  return tmp_path / 'net.mlpackage'


@pytest.mark.parametrize(
  'name',
  ['@model_path/{}', '@model_path/../../../secret', '{}', '@model_path/', '@model_path/a\0b'],
)
def test_weights_stay_in_package(tmp_path, name, capsys):
  from opq_jax.weights import core_ml

  path = package(tmp_path)
  # the very weights, so that a reader who follows the name succeeds
  secret = shutil.copy(next(path.rglob('weight.bin')), tmp_path / 'secret')
  opened = core_ml.load(path)
  for constant in core_ml.constants(opened).values():
    constant.value.fileName = name.format(secret)
  opened.program_path.write_bytes(opened.model.SerializeToString())
  with pytest.raises(ValueError, match=r'found weights in .*, expected a file of the package'):
    read_weights(path)
  words = [
    'export',
    str(tmp_path / 'net.opq'),
    str(tmp_path / 'out.mlpackage'),
    '--into',
    str(path),
  ]
  assert cli.main(words) == 2
  assert 'expected a file of the package' in capsys.readouterr().err
  assert not (tmp_path / 'out.mlpackage').exists()


@pytest.mark.parametrize('kind', ['file', 'folder', 'loop', 'fifo'])
def test_export_copies_no_links(tmp_path, kind):
  path = package(tmp_path)
  (tmp_path / 'secret').write_bytes(b'secret')
  place = path / 'Data' / 'other'
  if kind == 'fifo':
    os.mkfifo(place)
  else:
    place.symlink_to({'file': tmp_path / 'secret', 'folder': tmp_path, 'loop': path}[kind])
  expected = f'{re.escape(str(place))}: found (a link|no file), expected a file or a folder'
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file, pytest.raises(ValueError, match=expected):
    write_core_ml(tmp_path / 'out.mlpackage', file, path)
  assert sorted(child.name for child in tmp_path.iterdir()) == [
    'net.mlpackage',
    'net.opq',
    'secret',
  ]


def test_packages_of_links_are_read(tmp_path):
  # as in the cache of Hugging Face
  path = package(tmp_path)
  expected = read_weights(path)['kernel']
  for child in [one for one in path.rglob('*') if one.is_file()]:
    child.symlink_to(shutil.move(child, tmp_path / f'blob-{child.name}'))
  np.testing.assert_array_equal(read_weights(path)['kernel'], expected)
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    write_core_ml(tmp_path / 'out.mlpackage', file, path)
    decoded = file['kernel']
  assert not any(child.is_symlink() for child in (tmp_path / 'out.mlpackage').rglob('*'))
  found = programs.weights(tmp_path / 'out.mlpackage')['kernel']
  np.testing.assert_array_equal(found, decoded)
