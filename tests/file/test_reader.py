import json
import os
import sys
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from opq_jax.coding import escapes
from opq_jax.coding.payload import encode_codes
from opq_jax.compression import CompressionState, apply_compression, encode
from opq_jax.core import trees
from opq_jax.file import container, leaf_entries, packing
from opq_jax.file import index as file_index
from opq_jax.file.reader import OpqFile, load
from opq_jax.file.writer import save, serialize
from tests.helpers import hostile_parts
from tests.helpers.opq_files import (
  edited,
  escaping,
  laplace,
  leaf_state,
  network,
  parts,
  rebuilt,
  replaced,
  same_bits,
  small,
  state_of,
  version_of,
  with_escapes,
)

FIELDS = {
  'of a newer version': (
    ' escapes=5,',
    ' palette=7 escapes=5,',
    'field palette, which a newer opq_',
  ),
  'of an uncompressed leaf': ('"float32[3]"', '"float32[3] base=w"', 'field base, which a newer'),
  'escapes of no codes': ('"float32[3]"', '"float32[3] escapes=1,9"', 'fields of compressed'),
  'twice': (' escapes=5,', ' escapes=5,9 escapes=5,', 'expected every name once'),
  'without a count': (' escapes=5,', ' escapes=', r'expected escapes=COUNT,BYTES'),
  'of none': (' escapes=5,', ' escapes=0,', r'expected escapes=COUNT,BYTES'),
  'of too many': (' escapes=5,', ' escapes=601,', r'expected escapes=COUNT,BYTES'),
  'of too many bytes': (' escapes=5,', ' escapes=5,9', r'expected escapes=COUNT,BYTES'),
  'of no bytes': ('escapes=5,', 'escapes=5,0 escapes=5,', r'expected every name once'),
  'of other counts': (' escapes=5,', ' escapes=4,', r'^w: found'),
  'of other bytes': (' escapes=5,', ' escapes=5,0', r'expected|^w: found'),
}


@pytest.mark.parametrize('name', FIELDS)
def test_open_refuses_fields(name):
  old, new, message = FIELDS[name]
  if name == 'of other bytes':
    new = old + '1'
  data = rebuilt(serialize(*escaping()), replaced(old, new))
  with pytest.raises(ValueError, match=message):
    load(data)


def test_parsed_leaf_splits_at_spaces():
  text = 'float32[3,3] 4 20 axes=1,0{}escapes=1,9'
  assert leaf_entries.parsed_leaf(text.format(' ')).axes == (1, 0)
  with pytest.raises(ValueError, match='expected numbers of 1 to 18 digits'):
    leaf_entries.parsed_leaf(text.format('\n'))


def test_open_refuses_old_escapes():
  data = serialize(*escaping())
  with pytest.raises(ValueError, match='w: found escapes, expected none in version 1'):
    OpqFile(data.replace(b'"version":"2"', b'"version":"1"'))


@pytest.mark.parametrize(
  'places, values, message',
  [
    ([0, 1], [1, np.inf], r'^w: found 1 escaped weights that are NaN or infinite'),
    ([0, 1], [np.nan, 1], r'^w: found 1 escaped weights that are NaN or infinite'),
    ([0, 3], [1, 1], r'^w: found 1 escaped weights that have codes as well'),
  ],
)
def test_load_refuses_escapes(monkeypatch, places, values, message):
  weights = np.array([[9, 9, 0, 1, 0, 0]], np.float32)
  record = with_escapes(leaf_state(weights), weights == 9)
  section = escapes.encode(np.array(places), np.array(values, np.float32))
  monkeypatch.setattr(escapes, 'encode', lambda *_: section)
  data = serialize({'w': weights}, CompressionState({'w': record}))
  with pytest.raises(ValueError, match=message):
    load(data)


@pytest.mark.parametrize('mask', [0x01, 0xFF])
def test_load_finds_flips_in_escapes(mask):
  data = serialize(*escaping(shape=(5, 5)))
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      load(bytes(damaged))


def test_load_like_lists_differences():
  params, state = small()
  like = {'a': np.zeros((12, 6)), 'b': [np.zeros(7)], 'c': np.zeros(()), 'd': np.zeros(2)}
  with pytest.raises(ValueError) as error:
    load(serialize(params, state), like=like)
  for line in (
    'a: found (12, 6), expected (12, 5)',
    'b/1: found nothing, expected (4, 4)',
    'd: found (2,), expected nothing',
  ):
    assert line in str(error.value)
  assert 'b/0' not in str(error.value) and 'c:' not in str(error.value)


def test_file_is_a_mapping():
  params, state = small()
  with OpqFile(serialize(params, state, {'network': 'small', 'é': ''})) as file:
    assert list(file) == list(trees.named_leaves(params)) == ['a', 'b/0', 'b/1', 'c']
    assert len(file) == 4 and 'b/1' in file and 'b' not in file
    assert same_bits(file['b/0'], params['b'][0])
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    assert same_bits(file.codes('a'), encode(params, state)['a'])
    assert same_bits(file.leaf_state('a').mask, state.tree['a'].mask)
    assert file.leaf_state('c') is None
    assert file.metadata == {'network': 'small', 'é': ''}
    with pytest.raises(KeyError, match='nothing'):
      file['nothing']
    with pytest.raises(ValueError, match='c: found a leaf that is not compressed'):
      file.codes('c')
  with pytest.raises(ValueError, match='closed'):
    file['a']


def test_sizes_sum_to_file():
  params = network()
  data = serialize(params, state_of(params))
  with OpqFile(data) as file:
    sizes = file.sizes()
  assert list(sizes) == list(trees.named_leaves(params))
  codes = encode(params['params']['conv'], state_of(params['params']['conv']))['kernel']
  assert sizes['params/conv/kernel'] == len(encode_codes(np.asarray(codes))) + 12
  header, index = parts(data)
  assert sum(sizes.values()) == len(data) - len(header) - index['index'][1] + index['index'][0]
  # of one byte, and of none
  data = serialize({'a': np.int8(1)}, CompressionState({'a': None}))
  with OpqFile(data) as file:
    assert file.sizes() == {'a': int(np.diff(parts(data)[1]['uncompressed'])[0])}
  with OpqFile(serialize({'a': np.ones(0)}, CompressionState({'a': None}))) as file:
    assert file.sizes() == {'a': 0}


def test_damage_to_one_leaf():
  params, state = small()
  data = bytearray(serialize(params, state))
  header, offsets = parts(data)
  data[len(header) + offsets['codes'][1] - 2] ^= 1  # of b/1, the last compressed leaf
  with OpqFile(bytes(data)) as file:
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    assert same_bits(file['b/0'], params['b'][0])
    with pytest.raises(ValueError, match=r'^b/1: '):
      file['b/1']
  with pytest.raises(ValueError, match=r'^b/1: '):
    load(bytes(data))

  data = bytearray(serialize(params, state))
  data[-3] ^= 1
  with OpqFile(bytes(data)) as file:
    assert same_bits(file['a'], apply_compression(params, state)['a'])
    with pytest.raises(ValueError, match=r'^b/0: found CRC-32 .*, expected'):
      file['b/0']


@pytest.mark.parametrize('mask', [0x01, 0x20, 0xFF])
def test_load_finds_flips(mask):
  data = serialize(*small(), {'user': 'text'})
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      load(bytes(damaged))


def test_open_finds_cuts_and_tails(tmp_path):
  data = serialize(*small())
  for length in range(len(data)):
    with pytest.raises(ValueError):
      OpqFile(data[:length])
  for tail in (b'\0', b' ', data):
    with pytest.raises(ValueError, match=r'found .* bytes, expected'):
      OpqFile(data + tail)
  (tmp_path / 'cut.opq').write_bytes(data[:-1])
  with pytest.raises(ValueError, match=r'cut.opq: found \d+ bytes, expected \d+'):
    load(tmp_path / 'cut.opq')


def test_load_names_cut_file(tmp_path):
  path = tmp_path / 'net.opq'
  params = {'a': laplace(12, 5), 'b': laplace(20_000)}  # more than what is read ahead
  save(path, params, state_of(params))
  with OpqFile(path) as file:
    os.truncate(path, path.stat().st_size - 1)
    assert file['a'].shape == (12, 5)
    with pytest.raises(ValueError, match=r'net.opq: found \d+ bytes at \d+, expected'):
      file['b']


@pytest.mark.parametrize('shape', ['[-1]', '[1.0]', '[true]', '[]', '"1"', 'null'])
def test_open_refuses_sizes(shape):
  data = serialize(*small())
  text = parts(data)[0][8:].decode().replace('"shape":[2,3]', f'"shape":{shape}')
  damaged = len(text).to_bytes(8, 'little') + text.encode() + data[len(parts(data)[0]) :]
  with pytest.raises(ValueError, match=r'found a damaged header: '):
    OpqFile(damaged)


def test_open_refuses_other_files(tmp_path):
  for data in (b'', b'{}', bytes(100), b'\xff' * 100, safetensors.numpy.save({'a': np.ones(3)})):
    with pytest.raises(ValueError, match=r'found no .opq file'):
      OpqFile(data)
  with pytest.raises(FileNotFoundError):
    load(tmp_path / 'none.opq')


def test_open_refuses_versions():
  data = serialize(*small())
  assert data.count(b'"version":"1"') == 1
  with pytest.raises(ValueError, match="found version '4', expected one of"):
    load(data.replace(b'"version":"1"', b'"version":"4"'))


@pytest.mark.parametrize('edit', hostile_parts.INDEXES.values(), ids=hostile_parts.INDEXES)
def test_open_refuses_lying_index(edit):
  data = rebuilt(serialize(*small()), edit)
  tracemalloc.start()
  began = time.process_time()
  with pytest.raises(ValueError):
    load(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < 2 and peak < 20 << 20


def test_open_refuses_endless_index():
  data = rebuilt(serialize(*small()), lambda text: text + ' ' * file_index.MAX_INDEX)
  assert len(data) < 10_000
  tracemalloc.start()
  with pytest.raises(ValueError, match='do not end within'):
    OpqFile(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 * file_index.MAX_INDEX


def test_load_refuses_large_block():
  params = {'a': laplace(7)}
  data = serialize(params, state_of(params))
  bomb = packing.pack(bytes(1 << 24), packing.FLOAT_PERIOD)
  header, offsets = parts(data)
  data = data[: len(header) + offsets['codes'][1]] + bomb
  data = rebuilt_sizes(data, len(bomb))
  data = rebuilt(data, edited(blocks=[len(bomb), zlib.crc32(bomb)]))
  with pytest.raises(ValueError, match='do not end within 28 bytes'):
    load(data)


def rebuilt_sizes(data, blocks_size):
  header, offsets = parts(data)
  checksum = int(json.loads(header[8:])['__metadata__']['crc32'], 16)
  index, codes = (offsets[name][1] - offsets[name][0] for name in ('index', 'codes'))
  rows = (offsets['grids'][1] - offsets['grids'][0]) // 12
  sizes = rows, index, codes, blocks_size
  return container.header(sizes, checksum, version_of(data)) + data[len(header) :]


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_open_refuses_noise_index(noise):
  table = b''
  header = container.header((0, len(noise), 0, 0), zlib.crc32(noise, zlib.crc32(table)), '1')
  with pytest.raises(ValueError):
    OpqFile(header + noise)


@given(st.text(max_size=300))
@settings(deadline=None)
def test_open_refuses_noise_header(noise):
  text = noise.encode()
  with pytest.raises(ValueError):
    OpqFile(len(text).to_bytes(8, 'little') + text)


def test_many_threads_read_one_file(tmp_path):
  """Leaves of several blocks and payloads, asked for at once by threads that swap all the time."""
  rng = np.random.default_rng(0)
  params = {f'b{i}': rng.normal(size=1500).astype(np.float32).repeat(100) for i in range(5)}
  params |= {f'w{i}': laplace(40, 30) + i for i in range(5)}
  path = tmp_path / 'net.opq'
  save(path, params, state_of(params), contexts=False)
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    with OpqFile(path) as file, ThreadPoolExecutor(8) as pool:
      expected = dict(file)
      names = [list(file)[i] for i in rng.integers(len(file), size=200)]
      found = list(pool.map(file.__getitem__, names))
  finally:
    sys.setswitchinterval(interval)
  assert all(same_bits(leaf, expected[name]) for name, leaf in zip(names, found, strict=True))
