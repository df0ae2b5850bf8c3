"""Damaged and crafted files: the original, or a ValueError, soon, within little memory.

The fuzz itself is `experiments/benchmarks/robustness/hostile_files.py`; this is a fast part of it,
and what random mutations would not find.
"""

import collections
import io
import json
import pathlib
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib

import flax.serialization
import msgpack
import numpy as np
import pytest

import opq_jax
from experiments.benchmarks.robustness import hostile_files
from opq_jax.coding import payload as entropy_coding
from opq_jax.compression import CompressionState
from opq_jax.compression.records import affine_codebook
from opq_jax.core import plain_trees
from opq_jax.file import container, packing, reader, writer
from opq_jax.weights import read_weights, write_safetensors
from tests.helpers import hostile_parts
from tests.helpers.opq_files import (
  leaf_state,
  parts,
  rebuilt,
  same_bits,
  small,
  state_of,
  version_of,
)

MUTATIONS = {
  'opq': 400,
  'opq, resealed': 400,
  'opq, escapes': 400,
  'opq, escapes, resealed': 400,
  'opq, slices': 200,
  'opq, slices, resealed': 300,
  'escapes': 2000,
  'codes': 2000,
  'codes, contexts': 2000,
  'codes, trellis': 2000,
  'safetensors': 300,
  'npz': 200,
  'msgpack': 300,
  'h5': 200,
  'keras': 100,
}


def outcomes(kind, count):
  return collections.Counter(outcome for _, outcome, _ in hostile_files.tried(kind, 0, count))


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind', [kind for kind in MUTATIONS if 'codes' not in kind and kind != 'escapes']
)
def test_mutations_refused_or_harmless(kind):
  if kind in ('h5', 'keras'):
    pytest.importorskip('h5py')
  found = outcomes(kind, MUTATIONS[kind])
  assert found['wrong'] == 0 and found['refused'] > MUTATIONS[kind] / 2, found
  assert found.total() == MUTATIONS[kind]


@pytest.mark.slow
def test_decode_survives_hostile_words():
  # in a process of its own, which a native crash would end
  code = (
    'import sys; sys.path[:0] = sys.argv[1:]\n'
    'from tests.file import test_hostile_files as t\n'
    'for kind in ("codes", "codes, contexts", "codes, trellis", "escapes"):\n'
    '  found = t.outcomes(kind, t.MUTATIONS[kind])\n'
    '  assert found["wrong"] == 0 and found["refused"] > 1000, found\n'
    '  assert kind == "escapes" or found["other"] == 0 and found["refused"] > 1900, found'
  )
  root = pathlib.Path(__file__).parents[2]
  command = [sys.executable, '-c', code, str(root)]
  found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
  assert found.returncode == 0, (found.returncode, found.stderr)


def refused(call, match, seconds=2.0, memory=20 << 20):
  tracemalloc.start()
  began = time.process_time()
  with pytest.raises(ValueError, match=match):
    call()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < seconds and peak < memory, peak


# ---- .opq files whose checksums are right ----


@pytest.mark.parametrize('grid', hostile_parts.GRIDS)
def test_open_refuses_grids(grid):
  data = serialize_small()
  assert hostile_parts.with_grids(data, [(0.5, 0.75, 0.5)] * 2) == data
  with pytest.raises(ValueError, match=r'the file: b/1: found a grid of threshold'):
    reader.OpqFile(hostile_parts.with_grids(data, [(0.5, 0.75, 0.5), grid]))
  # and what would make such a file is not written
  params, state = small()
  threshold, first, step = map(np.float32, grid)
  record = state.tree['a'].replace(
    threshold=threshold,
    step=step,
    codebook=np.asarray(affine_codebook(first, step, np.int32(4))),
  )
  with pytest.raises(ValueError, match=r'^a: found a'):
    writer.serialize(params, CompressionState({**state.tree, 'a': record}))


def test_open_refuses_rounded_sums():
  params, state = small()
  first = np.float32(0.7)
  record = state.tree['a'].replace(
    codebook=np.asarray(affine_codebook(first, np.float32(0.5), np.int32(4)))
  )
  data = writer.serialize(params, CompressionState({**state.tree, 'a': record}))
  assert version_of(data) == '2' and same_bits(
    opq_jax.load(data)[1].tree['a'].codebook, record.codebook
  )
  with pytest.raises(ValueError, match=r'a: found a grid .* in version 1'):
    reader.OpqFile(data.replace(b'"version":"2"', b'"version":"1"'))


@pytest.mark.parametrize('grid', [(0.5, 0.25, 0.5), (0.5, 1.25, 0.5), (0.5, 0.75, 0.25)])
def test_load_refuses_values_off_cell(grid):
  data = hostile_parts.with_grids(serialize_small(), [(0.5, 0.75, 0.5), grid])
  with pytest.raises(ValueError, match=r'^b/1: found \d+ values that lie in another cell'):
    opq_jax.load(data)


def serialize_small():
  return writer.serialize(*small())


def test_open_refuses_huge_names():
  params = {'x': np.zeros(0, bool)}
  data = writer.serialize(params, state_of(params))
  tree = {'k' * 1_500_000: {str(i): 'bool[0]' for i in range(10_000)}}
  bomb = rebuilt(data, lambda text: json.dumps({**json.loads(text), 'tree': tree}))
  assert len(bomb) < 10_000
  refused(lambda: reader.OpqFile(bomb), 'path names of 15000', memory=60 << 20)


@pytest.mark.parametrize('kind', ['list', 'dict'])
def test_deep_trees_are_refused(kind):
  params = np.zeros(3, np.float32)
  for _ in range(plain_trees.MAX_DEPTH):
    params = [params] if kind == 'list' else {'a': params}
  data = writer.serialize(params, state_of(params))
  assert len(reader.OpqFile(data)) == 1
  with pytest.raises(ValueError, match='deeper than 100'):
    writer.serialize([params], state_of([params]))
  begin, end = ('["list",', ']') if kind == 'list' else ('{"a":', '}')
  deeper = rebuilt(data, lambda text: text.replace('"tree":', f'"tree":{begin}')[:-1] + f'{end}}}')
  with pytest.raises(ValueError, match='deeper than 100'):
    reader.OpqFile(deeper)


def test_open_refuses_many_zeros():
  payload = entropy_coding.encode_codes(np.zeros(1 << 22, np.int8))
  refused(lambda: entropy_coding.decode_codes(payload, (1 << 40,)), 'expected 1099511627776')
  # 3 MB of words do hold 2**40 codes that cost next to nothing each
  params = {'w': np.zeros((8, 8), np.float32)}
  data = writer.serialize(params, state_of(params))
  words = payload + b'\1' * 3_500_000
  header, offsets = parts(data)
  body = data[len(header) :]
  index = body[slice(*offsets['index'])]
  text = packing.unpack(index, 1 << 20).decode()
  old = offsets['codes'][1] - offsets['codes'][0]
  text = text.replace(f'[8,8] 4 {old}', f'[1099511627776] 4 {len(words)}')
  assert '[1099511627776]' in text
  index = packing.pack(text.encode())
  table = body[: offsets['grids'][1]]
  header = container.header(
    (1, len(index), len(words), 0), zlib.crc32(index, zlib.crc32(table)), '1'
  )
  bomb = header + table + index + words
  refused(lambda: opq_jax.load(bomb), 'found leaves of 4398046511104 bytes in 3', memory=30 << 20)


def test_open_admits_most_bytes():
  params = {'w': np.zeros((64, 64), np.float32)}
  data = writer.serialize(params, state_of(params))
  loaded, _ = opq_jax.load(data, most_bytes=4 * 64 * 64)
  assert same_bits(loaded['w'], params['w'])
  with pytest.raises(
    ValueError, match=r'found leaves of 16384 bytes in .*, expected at most 16383'
  ):
    opq_jax.load(data, most_bytes=4 * 64 * 64 - 1)


@pytest.mark.parametrize('name', ['../../etc/passwd', '/etc/passwd', 'a\0b', '..', '', '\ud800'])
def test_names_like_paths_are_names(tmp_path, name):
  params = {name: np.ones((4, 5), np.float32)}
  opq_jax.save(tmp_path / 'net.opq', params, CompressionState({name: leaf_state(params[name])}))
  loaded, _ = opq_jax.load(tmp_path / 'net.opq')
  assert list(loaded) == [name] and [path.name for path in tmp_path.iterdir()] == ['net.opq']


def test_metadata_of_other_network(tmp_path, capsys):
  from opq_jax import cli

  params, state = small()
  for model, classes in (('resnet20', '5'), ('nonsense', '5'), ('resnet20', '9' * 30)):
    metadata = {'model': model, 'source': 'akamaster', 'num_classes': classes}
    opq_jax.save(tmp_path / 'net.opq', params, state, metadata)
    assert (
      cli.main(['decompress', str(tmp_path / 'net.opq'), str(tmp_path / 'out.safetensors')]) == 2
    )
    assert capsys.readouterr().err.startswith('opq: ')
  assert [path.name for path in tmp_path.iterdir()] == ['net.opq']


# ---- what is imported ----


def safetensors_of(header, body):
  return struct.pack('<Q', len(header)) + header + body


def npy(shape, body=b''):
  file = io.BytesIO()
  header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue() + body


def zip_of(members, method=zipfile.ZIP_STORED):
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', method) as archive:
    warnings.filterwarnings('ignore', 'Duplicate name')
    for name, data in members:
      archive.writestr(name, data)
  return file.getvalue()


def packed(shape, dtype, data):
  return msgpack.packb({'a': msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))})


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = flax.serialization.to_bytes({'a': np.ones(3, np.float32)})

CRAFTED = {
  'a name twice.safetensors': (
    safetensors_of(b'{%s,%s}' % (ONE, ONE), bytes(4)),
    'a: found two of this name',
  ),
  'two names for the same bytes.safetensors': (
    safetensors_of(b'{%s,%s}' % (ONE, ONE.replace(b'"a"', b'"b"')), bytes(4)),
    'offset',
  ),
  'a huge shape.safetensors': (
    safetensors_of(b'{%s}' % ONE.replace(b'[1]', b'[1099511627776]'), bytes(4)),
    'invalid shape',
  ),
  'an overflowing shape.safetensors': (
    safetensors_of(b'{%s}' % ONE.replace(b'[1]', b'[4294967296,4294967296]'), bytes(4)),
    'found this: ',
  ),
  'a huge header.safetensors': (struct.pack('<Q', 1 << 62) + b'{}', 'header too large'),
  'a member twice.npz': (
    zip_of([('a.npy', npy((1,), bytes(4)))] * 2),
    'a.npy: found two members of this name',
  ),
  'a name twice.npz': (
    zip_of([('a.npy', npy((1,), bytes(4))), ('a', npy((1,), bytes(4)))]),
    'a: found two of this name',
  ),
  'a huge shape.npz': (
    zip_of([('a.npy', npy((1 << 40,), bytes(100)))]),
    'a.npy: found 100 bytes, expected 4398046511104 of shape',
  ),
  'a negative shape.npz': (zip_of([('a.npy', npy((-5,), bytes(20)))]), 'expected -20 of shape'),
  'bytes behind.npz': (zip_of([('a.npy', npy((1,), bytes(8)))]), 'found 8 bytes, expected 4'),
  'text.npz': (zip_of([('notes.txt', b'no array')]), 'notes.txt: '),
  'a bomb.npz': (
    zip_of([('a.npy', npy((1 << 22,), bytes(1 << 24)))], zipfile.ZIP_BZIP2),
    'claim to be 16777344',
  ),
  'a name twice.msgpack': (b'\x82' + 2 * GOOD[1:], 'a: found two of this name'),
  'a name of bytes.msgpack': (msgpack.packb({b'a': 1, 'b': 2}), "found b'a', expected a string"),
  'a number twice.msgpack': (b'\x82\x01\xc0\x01\xc0', '1: found two of this name'),
  'numbers and names.msgpack': (msgpack.packb({1: 1, 'b': 2}), 'expected all of one kind'),
  'a huge shape.msgpack': (packed((1 << 40,), 'float32', bytes(4)), 'cannot reshape'),
  'objects.msgpack': (packed((1,), 'O', bytes(8)), 'OBJECT'),
  'a huge list.msgpack': (b'\x81\xa1a\xdd\xff\xff\xff\xff', 'exceeds max_array_len'),
  'deep lists.msgpack': (b'\x81\xa1a' + b'\x91' * 100_000 + b'\xc0', 'found this: StackError'),
  'no chunks.msgpack': (
    msgpack.packb(
      {'a': {'__msgpack_chunked_array__': True, 'shape': {'0': 1 << 40}, 'chunks': {}}}
    ),
    'found this: ',
  ),
  'bytes behind.msgpack': (GOOD + b'\0', 'extra data'),
  'a member twice.keras': (
    zip_of([('model.weights.h5', b''), ('model.weights.h5', b'')]),
    'found two members of this name',
  ),
  'a bomb.keras': (
    zip_of([('model.weights.h5', bytes(1 << 22))], zipfile.ZIP_LZMA),
    'claim to be 4194304',
  ),
}


@pytest.mark.parametrize('name', CRAFTED)
def test_read_refuses_crafted_files(tmp_path, name):
  if name.endswith('.keras'):
    pytest.importorskip('h5py')
  data, message = CRAFTED[name]
  path = tmp_path / name
  path.write_bytes(data)
  expected = f'{re.escape(str(path))}: .*{re.escape(message)}'
  refused(lambda: read_weights(path), expected)


def test_read_refuses_endless_tensors(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'a': torch.zeros(1).expand(1 << 40)}, tmp_path / 'net.pt')
  with pytest.raises(ValueError, match=r'net.pt: .*found 4 bytes, expected those of shape'):
    read_weights(tmp_path / 'net.pt')
  torch.save({'a': torch.zeros(1).expand(16)}, tmp_path / 'net.pt')
  assert read_weights(tmp_path / 'net.pt')['a'].shape == (16,)


def test_write_refuses_metadata_name(tmp_path):
  with pytest.raises(ValueError, match='__metadata__: found a name'):
    write_safetensors(tmp_path / 'x.safetensors', {'__metadata__': np.ones(2)})
  assert not list(tmp_path.iterdir())


# ---- nothing is executed ----

# the end of a file's name, '.pickle', executes nothing
EXECUTES = re.compile(
  r'(?<!\'\.)\b(pickle|cPickle|dill|joblib|marshal|shelve)\b(?!s)|allow_pickle\s*=\s*True|(?<![.\w])(eval|exec)\('
  r'|weights_only\s*=\s*False|yaml\.(unsafe_)?load\(|__reduce__|torch\.load\((?!.*weights_only=True)'
)


def test_no_module_unpickles():
  root = pathlib.Path(opq_jax.__file__).parent
  lines = [
    f'{path.relative_to(root)}:{number}: {line.strip()}'
    for path in sorted(root.rglob('*.py'))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if EXECUTES.search(line)
  ]
  assert lines == []


@pytest.mark.parametrize(
  'line',
  [
    'import pickle',
    'np.load(path, allow_pickle=True)',
    'torch.load(path)',
    'torch.load(path, weights_only=False)',
    'eval(text)',
    'yaml.load(text)',
  ],
)
def test_scan_finds_unpickling(line):
  assert EXECUTES.search(line)
  assert not EXECUTES.search("torch.load(path, map_location='cpu', weights_only=True)")
