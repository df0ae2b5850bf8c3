"""Leaves of slices in a file: one leaf of the tree, a grid and a payload of every slice."""

import time
import tracemalloc

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


LEAF = '"layer":"float32[4,48,40] '


def hostile():
  """Edits of the index of `network()` that a reader must refuse."""
  text = index_text(serialize(*network()))
  leaf = text[text.index(LEAF) :].split('"')[3]
  shape, levels, stored, *fields = leaf.split(' ')
  escapes = fields[0].removeprefix('escapes=')
  assert fields == [f'escapes={escapes}', 'slices=1'] and escapes.count(',') == 7

  def of(shape=shape, levels=levels, stored=stored, fields=fields):
    return replaced(leaf, ' '.join([shape, levels, stored, *fields]))

  first, *rest = stored.split(',')
  none = ['escapes=' + ','.join('00000000'), 'slices=1']
  return {
    'no field': of(fields=fields[:1]),
    'no axis': of(fields=[fields[0], 'slices=0']),
    'all axes': of(fields=[fields[0], 'slices=3']),
    'other axes': of(fields=[fields[0], 'slices=2']),
    'huge axes': of(fields=[fields[0], f'slices={"9" * 30}']),
    'no number': of(fields=[fields[0], 'slices=one']),
    'leading zero': of(fields=[fields[0], 'slices=01']),
    'twice': of(fields=[*fields, 'slices=1']),
    'other order': of(fields=fields[::-1]),
    'fewer levels': of(levels=levels.rsplit(',', 1)[0]),
    'more levels': of(levels=f'{levels},1'),
    'empty level': of(levels=f'{levels},'),
    'high level': of(levels=f'128,{levels.split(",", 1)[1]}'),
    'low level': of(levels=f'0,{levels.split(",", 1)[1]}'),
    'fewer sizes': of(stored=','.join(rest)),
    'more bytes': of(stored=','.join([f'{int(first) + 1}', *rest])),
    'shifted bytes': of(stored=','.join([f'{int(first) + 1}', f'{int(rest[0]) - 1}', *rest[1:]])),
    'fewer escapes': of(fields=[fields[0].rsplit(',', 1)[0], 'slices=1']),
    'no escapes': of(fields=none),
    'escapes elsewhere': of(fields=[f'escapes={",".join(escapes.split(",")[::-1])}', 'slices=1']),
    'more slices': of(shape='float32[5,48,40]'),
    'fewer slices': of(shape='float32[3,48,40]'),
    'no slices': of(shape='float32[0,48,40]'),
    'huge slices': of(shape=f'float32[{1 << 40},48,40]'),
    'larger slices': of(shape='float32[4,48,41]'),
    'huge of zeros': of(shape='float32[4,999999999,40]'),
    'many rows': of(levels=','.join(['1'] * 400_000), stored=','.join(['1'] * 400_000)),
    'uncompressed': replaced(leaf, f'{shape} slices=1'),
  }


@pytest.mark.parametrize('name', hostile())
def test_load_refuses_lying_slices(name):
  data = rebuilt(serialize(*network()), hostile()[name])
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
