"""Encoders of sentences block after block: their parts, costs, codes and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import cli, language
from opq_jax.core import trees
from opq_jax.encoders import Feedback
from opq_jax.importers import language_models
from opq_jax.language.block_codes import BlockEncoder
from opq_jax.language.leaf_costs import block_costs
from opq_jax.language.parts import Block, Head, Start
from opq_jax.weights.work_folder import Work
from tests.helpers.language_models import TOKENS, network, write_folder


def embedded(tensors, tokens):
  model, _ = network('bert')
  return model.apply(language_models.from_tensors(model, tensors).variables, tokens)


def test_parts_of_an_encoder_are_the_whole():
  model, tensors = network('bert')
  stored = language.stored_network(model, tensors)
  x, context = Start(stored.model)(stored.outer(), jnp.asarray(TOKENS))
  for number in range(stored.depth):
    x = Block(stored.model)(stored.layer(number), x, context)
  found = Head(stored.model)(stored.outer(), x)
  np.testing.assert_allclose(found, embedded(tensors, jnp.asarray(TOKENS)), atol=1e-6)
  # every tensor is a leaf of one part
  sites = [stored.site(path, None).name for path in trees.named_leaves(stored.outer())]
  for number in range(stored.depth):
    sites += [stored.site(path, number).name for path in trees.named_leaves(stored.layer(number))]
  assert sorted(sites) == sorted(tensors)


def test_costs_of_an_encoder_are_those_of_its_embeddings():
  model, tensors = network('bert')
  stored = language.stored_network(model, tensors)
  tokens = np.random.default_rng(0).integers(1, 40, (256, 8))
  costs = block_costs(stored, tokens, jax.random.key(0))
  # an error drawn anew for every output costs half the squared distance of embeddings a token
  for name in ('encoder.layer.1.output.dense.weight', 'encoder.layer.0.attention.self.key.weight'):
    name = f'bert.{name}'
    noise = 1e-2 * np.random.default_rng(1).normal(size=tensors[name].shape).astype(np.float32)
    changed = tensors | {name: tensors[name] + noise}
    distance = jnp.square(embedded(changed, tokens) - embedded(tensors, tokens)).sum()
    predicted = np.sum(costs[name] * np.square(noise)) * tokens.size
    assert 0.5 < float(distance / 2 / predicted) < 2, name


def test_codes_of_an_encoder_fit_its_inputs(tmp_path):
  model, tensors = network('bert')
  # inputs of layers go together
  tokens = language.at_random(40, 2048, 16).tokens % np.where(np.arange(128) % 2, 40, 7)[:, None]
  chosen = {
    key: 3.0 for key, tensor in tensors.items() if tensor.ndim > 1 and 'position' not in key
  }
  stored = language.stored_network(model, tensors)
  blocks = BlockEncoder(stored, np.maximum(tokens, 1), chosen, Feedback({}))
  with Work(tmp_path / 'net.opq') as run:
    work = run.open({})
    blocks.run(work)
  read, values = blocks.coded(work), dict(tensors)
  for name in chosen:
    values[name] = read(name).values()
    assert values[name].shape == tensors[name].shape
  rounded = opq_jax.compress(
    {name: tensors[name] for name in chosen},
    bits_per_weight=3.0,
    compressible=lambda path, leaf: True,
  )
  judged = jnp.asarray(np.maximum(language.at_random(40, 512, 16).tokens, 1))
  expected = embedded(tensors, judged)
  error = lambda found: float(jnp.square(embedded(found, judged) - expected).sum())
  assert error(values) < 0.8 * error(tensors | dict(rounded.params))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  tokenizers = pytest.importorskip('tokenizers')
  monkeypatch.chdir(tmp_path)
  path = write_folder(tmp_path / 'bert', 'bert')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *(f'w{i}' for i in range(36))]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(8)  # as those of sentence encoders have it
  tokenizer.save(str(path / 'tokenizer.json'))
  drawn = np.random.default_rng(0).integers(0, 36, 3000)
  (tmp_path / 'text.txt').write_text(' '.join(f'w{i}' for i in drawn))
  return path


def run(*argv):
  return cli.main([str(word) for word in argv])


def test_command_calibrates_an_encoder(folder, monkeypatch):
  seen = []
  compress = language.compression.compress_calibrated
  monkeypatch.setattr(
    'opq_jax.language.compress_calibrated',
    lambda *arguments, calibration, **options: (
      seen.append(calibration.tokens),
      compress(*arguments, calibration=calibration, **options),
    )[1],
    raising=False,
  )
  options = '--bits-per-weight', 3, '--calibration', 'text.txt', '--calibration-tokens', 1024
  assert run('compress', folder, 'net.opq', *options) == 0
  (tokens,) = seen
  # whole windows of the text, each between the tokens that frame a sentence
  assert tokens.shape == (16, 64)
  assert set(tokens[:, 0]) == {2} and set(tokens[:, -1]) == {3} and tokens[:, 1:-1].min() > 3
  with opq_jax.OpqFile('net.opq') as file:
    assert file.metadata['encoder'] == 'layer_by_layer'
    assert file.metadata['objective'] == 'divergence'
  assert run('verify', 'net.opq', '--against', folder) == 0
  assert run('decompress', 'net.opq', 'back') == 0
  # nothing but what was asked changes for those who do not ask
  assert run('compress', folder, 'plain.opq', '--bits-per-weight', 3) == 0
  with opq_jax.OpqFile('plain.opq') as file:
    assert file.metadata['objective'] == 'balanced_error'


def test_command_takes_tokens_as_they_are(folder):
  texts = np.random.default_rng(0).integers(1, 40, (20, 64)).tolist()
  (folder.parent / 'texts.json').write_text(json.dumps(texts))
  options = '--calibration', 'texts.json', '--calibration-tokens', 640
  assert run('compress', folder, 'net.opq', *options) == 0
  with opq_jax.OpqFile('net.opq') as file:
    assert file.metadata['calibration_tokens'] == '640'


def test_encoders_write_no_text(folder, capsys):
  assert run('compress', folder, 'net.opq', '--calibration', 'self') == 2
  assert 'found self with an encoder of sentences' in ' '.join(capsys.readouterr().err.split())
