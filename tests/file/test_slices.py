"""Leaves of slices in a file: one leaf of the tree, a grid and a payload of every slice."""

import time
import tracemalloc
from typing import NamedTuple

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax.compression import CompressionState, slice_of
from opq_jax.file import OpqFile, load, serialize
from opq_jax.report import file_report, size_report, verify
from tests.helpers import plain_reader, stacks
from tests.helpers.opq_files import (
  assert_contract,
  index_text,
  rebuilt,
  replaced,
  same_bits,
  version_of,
)

pytestmark = pytest.mark.filterwarnings('ignore:the Laplace density')


def network(dtype=np.float32, shape=(4,)):
  params = stacks.stacked(dtype, shape=shape)
  allocation = opq_jax.allocate(params, compression_rate=8.0, slices=stacks.axes_of_stack(shape))
  return params, opq_jax.init_state(params, allocation)


@pytest.mark.parametrize('dtype', stacks.DTYPES)
@pytest.mark.parametrize('shape', [(4,), (2, 2)])
def test_save_and_load_slices(tmp_path, dtype, shape):
  params, state = network(dtype, shape)
  data = serialize(params, state, {'made': 'here'})
  assert version_of(data) == '2' and f' slices={len(shape)}"' in index_text(data)
  loaded, loaded_state = load(data)
  assert loaded_state.tree['layer'].slices == len(shape)
  assert_contract(params, state, loaded, loaded_state)
  assert serialize(loaded, loaded_state, {'made': 'here'}) == data
  _, like_state = load(data, like=params)
  jax.tree.map(np.testing.assert_array_equal, like_state, loaded_state)
  (tmp_path / 'a.opq').write_bytes(data)
  arrays, _ = plain_reader.read(tmp_path / 'a.opq')
  assert all(same_bits(arrays[name], loaded[name]) for name in loaded)


def test_slices_have_the_payloads_of_leaves():
  params, state = network()
  names = [f'layer{i}' for i in range(4)]
  apart = {
    'a': params['a'],
    **dict(zip(names, params['layer'], strict=True)),
    'norm': params['norm'],
  }
  records = {name: slice_of(state.tree['layer'], (i,)) for i, name in enumerate(names)}
  expected = serialize(apart, CompressionState({'a': state.tree['a'], **records, 'norm': None}))
  data = serialize(params, state)
  with OpqFile(data) as file, OpqFile(expected) as other:
    assert file.slices('layer') == 1 and file.slices('a') == 0
    assert file.grids('layer') == tuple(other.grid(name) for name in names)
    assert file.payload_sizes('layer') == tuple(other.payload_sizes(name)[0] for name in names)
    for i, name in enumerate(names):
      assert same_bits(file.codes('layer')[i], other.codes(name))
      assert same_bits(file['layer'][i], other[name])
    sizes, others = file.sizes(), other.sizes()
    assert sizes['layer'] == sum(others[name] for name in names)
    assert file.grids('norm') == () and file.grid('norm') is None
    assert file.grid('a') == file.grids('a')[0]
    with pytest.raises(ValueError, match=r'^layer: found slices, expected a leaf of one grid'):
      file.grid('layer')


def test_reports_of_slices():
  params, state = network(shape=(2, 2))
  report = size_report(params, state)
  row = report.compressed[1]
  assert (row.path, row.slices, row.shape) == ('layer', 4, (2, 2, 48, 40))
  data = serialize(params, state)
  assert report.file == len(data)
  assert file_report(data).compressed[1].file == row.file
  assert row.levels == int(state.tree['layer'].levels.max())
  assert row.survivors == int(state.tree['layer'].mask.sum())
  last = lambda path, leaf: leaf.ndim - 1
  assert size_report(params, state, channel_axis=last) == report
  with pytest.raises(ValueError, match=r'^layer: found channel_axis 1, expected an axis of shape'):
    size_report(params, state, channel_axis=1)
  found = verify(data, params)
  assert found.holds and found.report == report
  assert [leaf.path for leaf in found.compressed] == [
    'a',
    *(f'slice {i},{j} of layer' for i in (0, 1) for j in (0, 1)),
  ]
  wrong = {**params, 'layer': params['layer'].copy()}
  wrong['layer'][1, 0] *= -1
  assert all('slice 1,0 of layer' in problem for problem in verify(data, wrong).problems)
  assert not verify(data, wrong).holds


def test_save_names_slices():
  params, state = network()
  params['layer'][2, 3, 4] = np.nan
  with pytest.raises(ValueError, match=r'^slice 2 of layer: found 1 weights that are NaN'):
    serialize(params, state)


class Line(NamedTuple):
  """A leaf in the index, word by word: shape, levels, bytes of the payloads, and the rest."""

  text: str
  shape: str
  levels: str
  stored: str
  fields: list[str]

  def having(self, **words):
    """Returns the edit of the index that replaces these words."""
    _, shape, levels, stored, fields = self._replace(**words)
    return replaced(self.text, ' '.join([shape, levels, stored, *fields]))

  def having_stored(self, change):
    return self.having(stored=','.join(change(self.stored.split(','))))

  def having_escapes(self, change):
    escapes = self.fields[0].removeprefix('escapes=').split(',')
    return self.having(fields=[f'escapes={",".join(change(escapes))}', 'slices=1'])


@pytest.fixture(scope='module')
def data():
  return serialize(*network())


@pytest.fixture(scope='module')
def line(data):
  text = index_text(data)
  text = text[text.index('"layer":"float32[4,48,40] ') :].split('"')[3]
  shape, levels, stored, *fields = text.split(' ')
  escapes, slices = fields
  assert escapes.startswith('escapes=') and escapes.count(',') == 7 and slices == 'slices=1'
  return Line(text, shape, levels, stored, fields)


# edits of the index that a reader must refuse
HOSTILE = {
  'no field': lambda line: line.having(fields=line.fields[:1]),
  'no axis': lambda line: line.having(fields=[line.fields[0], 'slices=0']),
  'all axes': lambda line: line.having(fields=[line.fields[0], 'slices=3']),
  'other axes': lambda line: line.having(fields=[line.fields[0], 'slices=2']),
  'huge axes': lambda line: line.having(fields=[line.fields[0], f'slices={"9" * 30}']),
  'no number': lambda line: line.having(fields=[line.fields[0], 'slices=one']),
  'leading zero': lambda line: line.having(fields=[line.fields[0], 'slices=01']),
  'twice': lambda line: line.having(fields=[*line.fields, 'slices=1']),
  'other order': lambda line: line.having(fields=line.fields[::-1]),
  'fewer levels': lambda line: line.having(levels=line.levels.rsplit(',', 1)[0]),
  'more levels': lambda line: line.having(levels=f'{line.levels},1'),
  'empty level': lambda line: line.having(levels=f'{line.levels},'),
  'high level': lambda line: line.having(levels=f'128,{line.levels.split(",", 1)[1]}'),
  'low level': lambda line: line.having(levels=f'0,{line.levels.split(",", 1)[1]}'),
  'fewer sizes': lambda line: line.having_stored(lambda sizes: sizes[1:]),
  'more bytes': lambda line: line.having_stored(
    lambda sizes: [f'{int(sizes[0]) + 1}', *sizes[1:]],
  ),
  'shifted bytes': lambda line: line.having_stored(
    lambda sizes: [f'{int(sizes[0]) + 1}', f'{int(sizes[1]) - 1}', *sizes[2:]],
  ),
  'fewer escapes': lambda line: line.having_escapes(lambda escapes: escapes[:-1]),
  'no escapes': lambda line: line.having_escapes(lambda escapes: ['0'] * len(escapes)),
  'escapes elsewhere': lambda line: line.having_escapes(lambda escapes: escapes[::-1]),
  'more slices': lambda line: line.having(shape='float32[5,48,40]'),
  'fewer slices': lambda line: line.having(shape='float32[3,48,40]'),
  'no slices': lambda line: line.having(shape='float32[0,48,40]'),
  'huge slices': lambda line: line.having(shape=f'float32[{1 << 40},48,40]'),
  'larger slices': lambda line: line.having(shape='float32[4,48,41]'),
  'huge of zeros': lambda line: line.having(shape='float32[4,999999999,40]'),
  'many rows': lambda line: line.having(
    levels=','.join(['1'] * 400_000), stored=','.join(['1'] * 400_000)
  ),
  'uncompressed': lambda line: replaced(line.text, f'{line.shape} slices=1'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_load_refuses_lying_slices(name, data, line):
  data = rebuilt(data, HOSTILE[name](line))
  tracemalloc.start()
  began = time.process_time()
  with pytest.raises(ValueError):
    load(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < 2 and peak < 20 << 20


def test_load_refuses_slices_in_version_1():
  params, state = network()
  data = serialize(params, state)
  old = data.replace(b'"version":"2"', b'"version":"1"')
  with pytest.raises(ValueError, match='layer: found slices, expected none in version 1'):
    load(old)


def test_damage_names_the_slice():
  params, state = network()
  data = bytearray(serialize(params, state))
  with OpqFile(bytes(data)) as file:
    begin = file._front.codes_begin + file._front.leaves['layer'].begin
    sizes = file.payload_sizes('layer')
  data[begin + sizes[0] + sizes[1] // 2] ^= 16
  with OpqFile(bytes(data)) as file, pytest.raises(ValueError, match=r'^slice 1 of layer: found'):
    file['layer']


def test_tied_leaves_of_slices():
  layers = np.stack(stacks.layers())
  square = np.random.default_rng(0).laplace(size=(64, 64)).astype(np.float32)
  params = {'a': layers, 'b': layers.copy(), 'c': square, 'd': square.T.copy()}
  # the rows of c and d are slices: d is no transpose of c then
  options = {'slices': lambda path, leaf: 1, 'compressible': lambda path, leaf: True}
  allocation = opq_jax.allocate(params, compression_rate=8.0, **options)
  assert [allocation.tree[name].tied_to for name in 'abcd'] == ['', 'a', '', '']
  state = opq_jax.init_state(params, allocation)
  data = serialize(params, state)
  assert '"b":"float32[4,48,40] same=0"' in index_text(data)
  loaded, loaded_state = load(data)
  assert_contract(params, state, loaded, loaded_state)
  with OpqFile(data) as file:
    assert file.grids('a') == file.grids('b') and file.sizes()['b'] == 0
    assert same_bits(file['b'], loaded['b']) and file.slices('b') == 1
  assert verify(data, params).holds
  with pytest.raises(ValueError, match=r'expected it of a compressed leaf of two axes'):
    load(rebuilt(data, replaced('"d":"', '"cc":"float32[64,64] transposed=2","d":"')))
