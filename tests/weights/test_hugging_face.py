"""Model folders of Hugging Face, opened and read."""

import json

import numpy as np
import pytest
import safetensors.numpy

from opq_jax.weights import is_streamable, open_folder, open_weights, read_weights
from tests.helpers.model_folders import CONFIG, llama_tensors, write_folder, write_torch_folder
from tests.helpers.weight_trees import assert_same

INDEX = 'model.safetensors.index.json'


def in_order(tensors):
  """Sorted by name, as a tree of JAX is."""
  return {name: np.asarray(tensors[name]) for name in sorted(tensors)}


@pytest.mark.parametrize('shards', [1, 3])
def test_open_folder_reads_safetensors(tmp_path, shards):
  tensors = llama_tensors()
  path = write_folder(tmp_path / 'llama', tensors, shards)
  folder = open_folder(path)
  assert folder.config == CONFIG
  assert_same(in_order(folder), in_order(tensors))
  assert_same(read_weights(path), in_order(tensors))
  assert is_streamable(path)
  assert open_weights(path) == folder.leaves
  assert len(folder.shards) == shards
  assert folder.index == (INDEX if shards > 1 else None)


@pytest.mark.parametrize(('shards', 'is_zip'), [(1, True), (2, True), (1, False)])
def test_open_folder_reads_pytorch(tmp_path, shards, is_zip):
  pytest.importorskip('torch')
  tensors = {**llama_tensors(), 'steps': np.array(7)}
  path = write_torch_folder(
    tmp_path / 'llama', tensors, shards, _use_new_zipfile_serialization=is_zip
  )
  folder = open_folder(path)
  assert_same(in_order(folder), in_order(tensors))
  for name, leaf in folder.leaves.items():
    np.testing.assert_array_equal(leaf.first(), tensors[name][:1] if leaf.shape else tensors[name])
  assert_same(read_weights(path), in_order(tensors))


def test_open_folder_prefers_safetensors(tmp_path):
  path = write_folder(tmp_path / 'llama', {'w': np.ones(3)})
  (path / 'pytorch_model.bin').write_bytes(b'other weights')
  (path / 'training_args.bin').write_bytes(b'no weights')
  assert list(open_folder(path)) == ['w']
  (path / 'model.safetensors').rename(path / 'adapter_model.safetensors')
  (path / 'pytorch_model.bin').unlink()
  assert list(open_folder(path).shards) == ['adapter_model.safetensors']


def damage_index(path, **changes):
  index = json.loads((path / INDEX).read_text())
  index['weight_map'].update(changes)
  (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
  ('changes', 'line'),
  [
    ({'w.0': '../model.safetensors'}, r"w\.0: found file '../model.safetensors', expected a name"),
    ({'w.0': '/etc/x.safetensors'}, r"w\.0: found file '/etc/x.safetensors', expected a name"),
    ({'w.0': 'C:\\x.safetensors'}, r'w\.0: found file .*, expected a name in the folder'),
    ({'w.0': 'config.json'}, r"w\.0: found file 'config.json', expected a name"),
    ({'w.0': 7}, r"w\.0: found file '7', expected a name"),
    ({'w.0': 'gone.safetensors'}, r"w\.0: found file 'gone.safetensors', which is not in the fol"),
    ({'other': 'model-00001-of-00002.safetensors'}, r'found other placed in model-00001-of-00002'),
  ],
)
def test_open_folder_names_wrong_places(tmp_path, changes, line):
  path = write_folder(tmp_path / 'net', {f'w.{i}': np.ones(3) for i in range(4)}, 2)
  damage_index(path, **changes)
  with pytest.raises(ValueError, match=rf'{INDEX}: {line}'):
    open_folder(path)


def test_open_folder_names_tensors_without_a_place(tmp_path):
  path = write_folder(tmp_path / 'net', {f'w.{i}': np.ones(3) for i in range(4)}, 2)
  index = json.loads((path / INDEX).read_text())
  del index['weight_map']['w.2']
  (path / INDEX).write_text(json.dumps(index))
  with pytest.warns(UserWarning, match=rf'{INDEX}: found no place of w\.2 of the shards'):
    assert sorted(open_folder(path)) == ['w.0', 'w.1', 'w.2', 'w.3']


@pytest.mark.parametrize(
  ('text', 'line'),
  [
    ('{"weight_map": {"a": "x", "a": "y"}}', 'expected JSON, found this: a: found two of'),
    ('[' * 100_000, 'expected JSON, found this'),
    ('{', 'expected JSON, found this'),
    ('[]', 'found list, expected a JSON object'),
    ('{}', "found 'None', expected files by tensor in weight_map"),
    ('{"weight_map": {}}', "found '{}', expected files by tensor in weight_map"),
    (None, 'found 67108865 bytes, expected JSON of at most 67108864'),
  ],
)
def test_open_folder_names_damaged_index(tmp_path, text, line):
  path = write_folder(tmp_path / 'net', {f'w.{i}': np.ones(3) for i in range(4)}, 2)
  with open(path / INDEX, 'r+') as file:
    file.truncate((1 << 26) + 1 if text is None else 0)
    file.write(text or '')
  with pytest.raises(ValueError, match=rf'{INDEX}: {line}'):
    open_folder(path)


def test_open_folder_names_tensors_twice(tmp_path):
  path = write_folder(tmp_path / 'net', {f'w.{i}': np.ones(3) for i in range(4)}, 2)
  second = path / 'model-00002-of-00002.safetensors'
  safetensors.numpy.save_file({f'w.{i}': np.ones(3) for i in (0, 1, 3)}, second)
  with pytest.raises(ValueError, match=r'00002-of-00002.safetensors: w\.0: found it in .*00001-of'):
    open_folder(path)


def test_open_folder_names_missing_files(tmp_path):
  (tmp_path / 'net').mkdir()
  (tmp_path / 'net' / 'config.json').write_text('{}')
  for read in (open_folder, open_weights, read_weights):
    with pytest.raises(ValueError, match='net: found no weights, expected one of'):
      read(tmp_path / 'net')
  for name in 'ab':
    safetensors.numpy.save_file({'w': np.ones(3)}, tmp_path / 'net' / f'{name}.safetensors')
  with pytest.raises(ValueError, match=r"net: found \['a.safetensors', 'b.safetensors'\], expec"):
    open_folder(tmp_path / 'net')
  (tmp_path / 'net' / 'a.safetensors').unlink()
  (tmp_path / 'net' / 'config.json').unlink()
  folder = open_folder(tmp_path / 'net')
  with pytest.raises(ValueError, match=r'net: found no config.json, expected one'):
    _ = folder.config
