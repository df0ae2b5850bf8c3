"""Language models of folders and files."""

import json

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax.importers import language_files, language_models
from opq_jax.weights import carried_files, open_folder
from tests.helpers.language_models import CONFIGS, network, write_folder


def uncompressed(tree):
  return opq_jax.CompressionState(jax.tree.map(lambda _: None, tree))


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / 'qwen2', 'qwen2', bos_token_id=1, eos_token_id=[2, 3])


def test_load_reads_a_folder(folder):
  found = language_files.load(folder)
  model, tensors = network('qwen2')
  expected = language_models.from_tensors(model, tensors).variables
  jax.tree.map(np.testing.assert_array_equal, found.variables, expected)
  assert found.model == model and found.ignored == ()
  assert json.loads(found.side_file('config.json')) == found.config
  assert found.side_file('tokenizer.json') is None
  (folder / 'generation_config.json').write_text('{"eos_token_id": 9}')
  assert found.special_tokens('bos_token_id') == (1,)
  assert found.special_tokens('eos_token_id') == (9,)
  assert found.special_tokens('pad_token_id') == ()
  for text, line in (
    ('{', 'generation_config.json: expected JSON'),
    ('[]', 'generation_config.json: found list, expected a JSON object'),
    ('{"eos_token_id": ["x"]}', r'eos_token_id: found .*x.*, expected a token or a list of tokens'),
  ):
    (folder / 'generation_config.json').write_text(text)
    with pytest.raises(ValueError, match=line):
      found.special_tokens('eos_token_id')
  (folder / 'generation_config.json').unlink()


@pytest.mark.parametrize('names', ['transformers', 'flax'])
def test_load_reads_opq_files(folder, names, tmp_path):
  """Of the tensors of the folder, and of the variables."""
  model, tensors = network('qwen2')
  expected = language_models.from_tensors(model, tensors).variables
  tree = tensors if names == 'transformers' else expected
  opq_jax.save(tmp_path / 'net.opq', tree, uncompressed(tree))
  found = language_files.load(tmp_path / 'net.opq', folder=folder)
  jax.tree.map(np.testing.assert_array_equal, found.variables, expected)
  with pytest.raises(ValueError, match=r'net.opq: found no config.json, expected one \(--folder F'):
    language_files.load(tmp_path / 'net.opq')


def test_load_needs_no_folder_with_a_file_of_one(folder, tmp_path):
  """`opq compress` puts config and tokenizer into the file, which is then all that there is."""
  (folder / 'tokenizer.json').write_text('{}')
  tensors = dict(open_folder(folder))
  side_files = carried_files(open_folder(folder)).files
  opq_jax.save(tmp_path / 'net.opq', tensors, uncompressed(tensors), side_files=side_files)
  found, expected = language_files.load(tmp_path / 'net.opq'), language_files.load(folder)
  jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
  assert found.config == expected.config and found.side_file('tokenizer.json') == b'{}'
  assert found.special_tokens('eos_token_id') == (2, 3)


def test_load_names_files_and_differences(folder, tmp_path):
  config = folder / 'config.json'
  with pytest.raises(ValueError, match=r'qwen2: the tensors are not those of a Llama of transf'):
    config.write_text(json.dumps(CONFIGS['qwen2'] | {'num_hidden_layers': 3}))
    language_files.load(folder)
  with pytest.raises(ValueError, match=r'config.json of .*qwen2: model_type: found .mamba., expec'):
    config.write_text(json.dumps(CONFIGS['qwen2'] | {'model_type': 'mamba'}))
    language_files.load(folder)
  with pytest.raises(ValueError, match=r'config.json of .*: found list, expected a JSON object'):
    config.write_text('[]')
    language_files.load(folder)
  with pytest.raises(ValueError, match=r"config.json of .*: found model_type 'bert', expected"):
    config.write_text(json.dumps(CONFIGS['bert']))
    language_files.load(folder)
  params = {'params': {'norm': {'scale': np.ones(32, np.float32)}}}
  opq_jax.save(tmp_path / 'net.opq', params, uncompressed(params))
  config.write_text(json.dumps(CONFIGS['qwen2']))
  with pytest.raises(ValueError, match=r'net.opq: the variables are not those of a Llama'):
    language_files.load(tmp_path / 'net.opq', folder=folder)
