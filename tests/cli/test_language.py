"""`opq evaluate` and `opq generate`, by their output."""

import json

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import cli, models
from opq_jax.importers import language_files
from tests.helpers.language_models import write_folder

VOCABULARY = {letter: number for number, letter in enumerate('abcdefghijklmnopqrstuvwxyz .,;:!?')}
TEXT = 'the quick brown fox jumps over the lazy dog. pack my box, with five dozen jugs! '


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model of letters."""
  path = write_folder(tmp_path_factory.mktemp('models') / 'gpt2', 'gpt2', bos_token_id=0)
  split = {'type': 'Split', 'pattern': {'Regex': '.'}, 'behavior': 'Isolated', 'invert': False}
  model = {'type': 'WordLevel', 'vocab': VOCABULARY, 'unk_token': '?'}
  decoder = {'type': 'Fuse'}
  tokenizer = {'version': '1.0', 'added_tokens': [], 'model': model, 'pre_tokenizer': split}
  tokenizer |= {'decoder': decoder, 'normalizer': None, 'post_processor': None}
  (path / 'tokenizer.json').write_text(
    json.dumps(tokenizer | {'truncation': None, 'padding': None})
  )
  (path / 'text.txt').write_text(TEXT)
  tokens = [VOCABULARY[letter] for letter in TEXT]
  (path / 'tokens.json').write_text(json.dumps(tokens))
  return path


@pytest.fixture(scope='module')
def changed(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp('changed') / 'gpt2.opq'
  rng, found = np.random.default_rng(0), language_files.load(folder)
  tree = jax.tree.map(
    lambda x: x + rng.normal(scale=0.03, size=x.shape).astype(np.float32), found.variables
  )
  # how leaves are stored is no matter here
  opq_jax.save(path, tree, opq_jax.CompressionState(jax.tree.map(lambda _: None, tree)))
  return path


def run(*argv):
  return cli.main([str(argument) for argument in argv])


def test_evaluate_prints_what_the_library_computes(folder, changed, capsys):
  options = '--window', 24, '--stride', 8, '--against', folder, '--folder', folder
  assert run('evaluate', changed, '--tokens', folder / 'tokens.json', *options, '--json') == 0
  found = json.loads(capsys.readouterr().out)
  one, other = language_files.load(changed, folder=folder), language_files.load(folder)
  tokens = json.loads((folder / 'tokens.json').read_text())
  expected = models.evaluate(
    one.model,
    one.variables,
    [tokens],
    window=24,
    stride=8,
    against=(other.model, other.variables),
  )
  assert found['tokens'] == len(tokens) - 1 and found['windows'] == expected.windows
  assert found['divergence'] == expected.divergence._asdict()
  assert found['divergence']['value'] > 0 and found['perplexity']['value'] > 1
  assert run('evaluate', changed, '--tokens', folder / 'tokens.json', *options) == 0
  shown = capsys.readouterr().out
  assert f'perplexity  {expected.perplexity.value:.4g} (' in shown and 'nats a token' in shown


def test_evaluate_reads_texts(folder, capsys):
  pytest.importorskip('tokenizers', reason='needs tokenizers: pip install opq_jax[language]')
  results = []
  for option in ('--text', 'text.txt'), ('--tokens', 'tokens.json'):
    assert run('evaluate', folder, option[0], folder / option[1], '--window', 24, '--json') == 0
    results.append(json.loads(capsys.readouterr().out))
  assert results[0]['perplexity'] == results[1]['perplexity']


def test_generate_continues_a_prompt(folder, capsys):
  pytest.importorskip('tokenizers', reason='needs tokenizers: pip install opq_jax[language]')
  found = language_files.load(folder)
  prompt = np.array([[VOCABULARY[letter] for letter in 'the ']])
  key, letters = jax.random.key(3), list(VOCABULARY)
  written = models.generate(found.model, found.variables, prompt, 9, key, temperature=0.7)
  expected = [int(token[0]) for token in written]
  options = '--tokens', 9, '--seed', 3, '--temperature', 0.7
  assert run('generate', folder, '--prompt', 'the ', *options) == 0
  # numbers without a letter are not shown
  shown = ''.join(letters[token] for token in expected if token < len(letters))
  assert capsys.readouterr().out == f'the {shown}\n'


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (('evaluate', 'FOLDER', '--tokens', 'missing.json'), 'missing.json: No such file'),
    (('evaluate', 'FOLDER', '--tokens', 'FOLDER/config.json'), 'expected a list of tokens'),
    (('evaluate', 'FILE', '--tokens', 'FOLDER/tokens.json'), 'found no config.json'),
    (
      ('evaluate', 'FOLDER', '--tokens', 'FOLDER/tokens.json', '--max-tokens', '1'),
      '--max-tokens: found 1, expected 2 or more',
    ),
    (('generate', 'FOLDER/config.json'), 'config.json: found no config.json'),
    (
      ('generate', 'FOLDER', '--temperature', 'nan', '--tokens', '8'),
      'temperature: found nan, expected 0 or more',
    ),
    (
      ('generate', 'FOLDER', '--temperature', '1', '--seed', str(1 << 63)),
      '--seed: found 9223372036854775808, expected',
    ),
    (
      ('generate', 'FOLDER', '--seed', '0'),
      '--seed: found 0, expected --temperature above 0 too',
    ),
    (
      ('generate', 'FOLDER', '--temperature', '0', '--top-p', '0.9'),
      '--top-p: found 0.9, expected --temperature above 0 too',
    ),
  ],
)
def test_what_is_wrong_is_said_in_one_line(folder, changed, argv, message, capsys):
  argv = [each.replace('FOLDER', str(folder)).replace('FILE', str(changed)) for each in argv]
  assert run(*argv) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_default_window_is_no_longer_than_the_model_reads(folder, capsys):
  argv = 'evaluate', folder, '--tokens', folder / 'tokens.json', '--json'
  assert run(*argv) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['window'] == found['stride'] == 64  # the positions of the model
  assert run(*argv, '--window', 65) == 2
  assert 'window: found 65, expected at most 64 tokens' in capsys.readouterr().err
