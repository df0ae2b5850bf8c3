"""`opq compress` of a language model: costs of its leaves, and codes for calibration tokens."""

import contextlib
import json

import numpy as np
import pytest
import safetensors.numpy

import opq_jax
from opq_jax import cli
from opq_jax.cli import leaf_by_leaf
from opq_jax.cli.outputs import check_output
from opq_jax.weights import open_folder
from tests.helpers.language_models import write_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = write_folder(tmp_path / 'llama', 'llama', bos_token_id=1)
  rng = np.random.default_rng(0)
  # texts of few tokens, one after the other in a few ways
  texts = [rng.permutation(8).repeat(4).tolist() * 4 for _ in range(16)]
  (tmp_path / 'texts.json').write_text(json.dumps(texts))
  return path


def run(*argv):
  return cli.main([str(word) for word in argv])


def metadata(path):
  with opq_jax.OpqFile(path) as file:
    return file.metadata


def divergence(path, capsys):
  capsys.readouterr()
  assert (
    run('evaluate', path, '--tokens', 'texts.json', '--against', 'llama', '--window', 32, '--json')
    == 0
  )
  return json.loads(capsys.readouterr().out)['divergence']['value']


@pytest.mark.slow
def test_calibrated_file_is_better_and_complete(folder, capsys):
  assert run('compress', folder, 'plain.opq', '--bits-per-weight', 3) == 0
  assert metadata('plain.opq')['objective'] == 'divergence'
  assert metadata('plain.opq')['calibration'] == 'random'
  options = '--calibration', 'texts.json', '--calibration-tokens', 2048
  assert run('compress', folder, 'net.opq', '--bits-per-weight', 3, *options) == 0
  found = metadata('net.opq')
  assert found['encoder'] == 'layer_by_layer' and found['first'] == 'feedback'
  assert found['calibration'] == 'text' and found['calibration_tokens'] == '2048'
  # nothing of the work is left
  assert sorted(path.name for path in folder.parent.iterdir() if 'net' in path.name) == ['net.opq']
  assert divergence('net.opq', capsys) < 0.7 * divergence('plain.opq', capsys)

  for name in ('plain.opq', 'net.opq'):
    assert run('verify', name, '--against', folder) == 0
  assert run('decompress', 'net.opq', 'back') == 0
  back, original = open_folder('back'), open_folder(folder)
  assert list(back) == list(original)
  with opq_jax.OpqFile('net.opq') as file:
    for name in file:
      np.testing.assert_array_equal(back[name], file[name])


@pytest.mark.slow
@pytest.mark.parametrize('source', ['self', 'random'])
def test_calibration_without_data(folder, source):
  options = '--calibration', source, '--calibration-tokens', 512, '--trellis'
  assert run('compress', folder, 'net.opq', '--bits-per-weight', 3, *options) == 0
  found = metadata('net.opq')
  assert (found['calibration'], found['first']) == (source, 'trellis')


@pytest.mark.parametrize(
  'options',
  [(), ('--trellis',), ('--calibration', 'random', '--calibration-tokens', '1024')],
  ids=['plain', 'trellis', 'calibrated'],
)
def test_outputs_have_scales_where_they_differ(options, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = write_folder(tmp_path / 'gpt2', 'gpt2')
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  # values are small beside queries and keys, which share their kernel
  tensors |= {
    name: tensor * np.where(np.arange(96) < 64, 1, 0.05).astype(np.float32)
    for name, tensor in tensors.items()
    if 'c_attn.weight' in name
  }
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  assert run('compress', folder, 'net.opq', '--bits-per-weight', 3, *options) == 0
  assert run('verify', 'net.opq', '--against', folder) == 0
  assert run('decompress', 'net.opq', 'back') == 0
  with opq_jax.OpqFile('net.opq') as file:
    # of inputs that were rotated there is no state
    is_rotated = {name for name in file if file.rotated_axis(name) is not None}
    assert not is_rotated or '--calibration' in options
    with pytest.warns(UserWarning, match='rotated') if is_rotated else contextlib.nullcontext():
      params, state = file.load()
    for layer in range(2):
      name = f'transformer.h.{layer}.attn.c_attn.weight'
      scales = file.output_scales(name)
      assert scales.shape == (1, 96)
      assert scales[0, 64:].mean() < 0.5 * scales[0, :64].mean()
      # one grid would leave next to nothing of the values
      error = np.square(file[name] - tensors[name])[:, 64:].sum()
      assert error < 0.3 * np.square(tensors[name])[:, 64:].sum()
    back = open_folder('back')
    for name in file:
      np.testing.assert_array_equal(back[name], file[name])
  again = opq_jax.apply_compression(params, state)
  for name, leaf in params.items():
    np.testing.assert_array_equal(again[name], leaf)


def test_trellis_of_a_folder_verifies(folder):
  assert run('compress', folder, 'net.opq', '--bits-per-weight', 3, '--trellis') == 0
  assert metadata('net.opq')['objective'] == 'divergence'
  assert run('verify', 'net.opq', '--against', folder) == 0


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (('--calibration', 'texts.json', '--sparsity', '.5', '--bits', '3'), 'expected --rate'),
    (('--calibration', 'texts.json', '--file-rate', '8'), 'expected --rate or --bits-per-weight'),
    (('--calibration', 'short.json'), 'found texts of at most 3 tokens, expected 64 or more'),
    (('--calibration', 'text.txt'), 'found no tokenizer.json'),
    (('--calibration', 'none.json'), 'none.json: No such file'),
    (('--calibration', 'other.json'), 'other.json: found token 40, expected 0 to 39'),
    (('--calibration', 'wide.json'), f'wide.json: found token {1 << 40}, expected 0 to 39'),
    (('--calibration', 'deep.json'), 'deep.json: expected JSON'),
    (('--calibration', 'self', '--slices', '*=1'), 'found it together with --slices'),
    (('--calibration-tokens', '9'), '--calibration-tokens needs --calibration'),
    (('--objective', 'divergenc'), 'invalid choice'),
  ],
)
def test_refused_options(folder, argv, message, capsys):
  (folder.parent / 'short.json').write_text('[1, 2, 3]')
  (folder.parent / 'text.txt').write_text('abc')
  (folder.parent / 'other.json').write_text(json.dumps([1] * 99 + [40]))
  (folder.parent / 'wide.json').write_text(json.dumps([1 << 40] * 99))
  (folder.parent / 'deep.json').write_text('[' * 100000)
  try:
    assert run('compress', folder, 'net.opq', *argv) == 2
  except SystemExit as stop:  # argparse
    assert stop.code == 2
  assert message in ' '.join(capsys.readouterr().err.split())
  assert not (folder.parent / 'net.opq').exists()


def test_folder_of_an_unknown_network_is_noted(folder, capsys):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'model_type': 'mamba'}))
  assert run('compress', folder, 'net.opq') == 0
  notes = ' '.join(capsys.readouterr().err.split())
  assert "found 'mamba'" in notes and 'bits are allocated from the weights alone' in notes
  assert metadata('net.opq')['objective'] == 'balanced_error'
  assert run('compress', folder, 'net.opq', '--calibration', 'self') == 2


def test_weights_that_are_no_numbers_are_named(folder, capsys):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  tensors['model.layers.1.mlp.up_proj.weight'][2, 3] = np.nan
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  assert run('compress', folder, 'net.opq') == 2
  line = 'model.layers.1.mlp.up_proj.weight: found 1 weights that are NaN or infinite'
  assert line in ' '.join(capsys.readouterr().err.split())


@pytest.mark.parametrize('name', ['llama/model.safetensors', 'texts.json'])
def test_inputs_are_not_replaced(folder, name, capsys):
  before = (folder.parent / name).read_bytes()
  assert run('compress', folder, name, '--calibration', 'texts.json') == 2
  assert 'expected another' in ' '.join(capsys.readouterr().err.split())
  assert (folder.parent / name).read_bytes() == before
  (folder / 'net.opq').write_bytes(b'an earlier run')
  check_output(folder, folder / 'net.opq')


def test_leaves_of_slices_have_one_cost():
  tree, costs = {'a': np.zeros((2, 3)), 'b': np.zeros((2, 3))}, np.array([[1.0], [3.0]])
  found = leaf_by_leaf.costs_of_slices(
    {'a': costs, 'b': costs}, tree, lambda name, leaf: name == 'a'
  )
  assert found['a'] == 2.0 and found['b'] is costs
