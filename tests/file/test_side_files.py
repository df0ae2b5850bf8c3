"""Files that an `.opq` file carries beside the leaves."""

import json

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax.file import serialize
from opq_jax.file.side_files import packed_files, unpacked_files
from opq_jax.report import file_report
from tests.helpers.opq_files import assert_same, parts, rebuilt, small, version_of

FILES = {
  'tokenizer.json': b'{"a": 1, "b": 2}' * 100,
  '1_Pooling/config.json': bytes(range(256)),
  'config.json': b'',
}


def test_save_carries_side_files(tmp_path):
  params, state = small()
  opq_jax.save(tmp_path / 'net.opq', params, state, side_files=FILES)
  with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
    assert file.side_files == {name: len(FILES[name]) for name in sorted(FILES)}
    assert file.read_side_files() == FILES
  data, plain = (tmp_path / 'net.opq').read_bytes(), serialize(params, state)
  assert_same(opq_jax.load(data)[0], opq_jax.load(plain)[0])
  assert version_of(data) == '3'
  assert serialize(params, state, side_files={}) == plain
  # the file stays one of safetensors
  assert 'files' in safetensors.numpy.load(data)


def test_report_counts_side_files():
  params, state = small()
  with_files, without = (file_report(serialize(params, state, side_files=f)) for f in (FILES, None))
  assert 256 < with_files.side_files < 400 and without.side_files == 0
  assert with_files.file - with_files.side_files - with_files.headers == without.file - (
    without.headers
  )
  assert 'side files' in str(with_files) and 'side files' not in str(without)


def test_shared_text_is_stored_once():
  text = np.random.default_rng(0).bytes(3 << 20)
  entry, _ = packed_files({'merges.txt': text, 'tokenizer.json': b'{' + text + b'}'})
  assert entry.packed < 1.05 * len(text)


@pytest.mark.parametrize(
  'name',
  [
    *('../config.json', 'a/../../b', '/etc/passwd', 'C:/b', 'a\\b', '', 'a//b', 'a/', '.', './a'),
    *('a\0b', 'a\nb', 'x' * 256, '/'.join('x' * 600)),
  ],
)
def test_names_of_other_places_are_refused(name):
  with pytest.raises(ValueError, match=r'found a side file .*, expected a relative path'):
    serialize(*small(), side_files={name: b'text'})
  data = serialize(*small(), side_files={'config.json': b'text'})

  def renamed(text):
    content = json.loads(text)
    content['files'][2] = {name: 4}
    return json.dumps(content)

  with pytest.raises(ValueError, match=r'found a side file .*, expected a relative path'):
    opq_jax.OpqFile(rebuilt(data, renamed))


@pytest.mark.parametrize(
  ('files', 'line'),
  [
    ({'a': 1, 'a/b': 2}, "found a side file 'a' that is a folder too"),
    ({'A/b': 1, 'a': 2}, "found a side file 'a' that is a folder too"),
    ({'Config.json': 1, 'config.json': 2}, 'differ in case alone'),
    ({'b': 1, 'a': 2}, 'expected them sorted by name'),
    ({'a': (1 << 28) + 1}, 'found side files of 268435457 bytes, expected at most 268435456'),
    ({'a': -1}, 'found side files .*, expected bytes, CRC-32, sizes by name'),
    ({'a': True}, 'found side files .*, expected bytes, CRC-32, sizes by name'),
    ({'a': '4'}, 'found side files .*, expected bytes, CRC-32, sizes by name'),
    ({}, 'found side files .*, expected bytes, CRC-32, sizes by name'),
  ],
)
def test_open_refuses_hostile_side_files(files, line):
  data = serialize(*small(), side_files={'config.json': b'text'})

  def replaced(text):
    content = json.loads(text)
    content['files'][2] = files
    return json.dumps(content)

  with pytest.raises(ValueError, match=line):
    opq_jax.OpqFile(rebuilt(data, replaced))


def test_open_refuses_other_counts():
  data = serialize(*small(), side_files=FILES)

  def without(text):
    content = json.loads(text)
    del content['files']
    return json.dumps(content)

  def longer(text):
    content = json.loads(text)
    content['files'][0] += 1
    return json.dumps(content)

  for edit in (without, longer):
    with pytest.raises(ValueError, match='bytes of side files, expected'):
      opq_jax.OpqFile(rebuilt(data, edit))


def test_read_side_files_names_damage():
  data = serialize(*small(), side_files=FILES)
  header, offsets = parts(data)
  place = len(header) + offsets['files'][0]
  damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
  with opq_jax.OpqFile(damaged) as file, pytest.raises(ValueError, match='side files: found CRC'):
    file.read_side_files()
  entry, packed = packed_files(FILES)
  with pytest.raises(ValueError, match='found LZMA data that do not end within 100 bytes'):
    unpacked_files(entry._replace(sizes={'a': 100}), packed)
  with pytest.raises(ValueError, match='side files: found 1856 bytes, expected 9999'):
    unpacked_files(entry._replace(sizes={'a': 9999}), packed)
