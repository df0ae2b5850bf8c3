"""Language models in GGUF files: run, calibrated and given back as Hugging Face folders."""

import json

import numpy as np
import pytest

import opq_jax
from opq_jax import cli, models
from opq_jax.importers import language_files
from opq_jax.weights import gguf_tokenizers, open_folder, open_weights
from opq_jax.weights.gguf import open_gguf
from tests.helpers import gguf_models
from tests.helpers.language_models import TOKENS, network, write_folder

gguf = pytest.importorskip('gguf')
NAMES = ['llama', 'llama_biases', 'llama_3', 'llama_linear', 'qwen2', 'qwen3']


@pytest.mark.parametrize('name', NAMES)
def test_gguf_holds_the_network_of_its_folder(name, tmp_path):
  config = gguf_models.write_named(tmp_path / 'net.gguf', name)
  found = open_gguf(tmp_path / 'net.gguf')
  assert models.from_config(found.config) == models.from_config(config)
  tensors = network(name)[1]
  assert set(found.leaves) == set(tensors)
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(found.leaves[key].read(), tensor)
    first = tensor[:1] if tensor.ndim > 1 else tensor
    np.testing.assert_array_equal(found.leaves[key].first(), first)


def test_permuted_rows_are_those_of_interleaved_rotations():
  # what llama.cpp turns: features 2 i and 2 i + 1; in transformers i and i + features / 2
  rng, heads, features = np.random.default_rng(0), 2, 8
  queries, x = rng.normal(size=(heads * features, 5)), rng.normal(size=5)
  angles = 3 * 0.5 ** np.arange(features // 2)
  turns = np.exp(1j * angles)
  halves = (queries @ x).reshape(heads, 2, -1)
  pairs = (gguf_models.permuted(queries, heads) @ x).reshape(heads, -1, 2)
  ours = (halves[:, 0] + 1j * halves[:, 1]) * turns
  theirs = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
  np.testing.assert_allclose(ours, theirs)


def test_logits_of_a_gguf_are_those_of_its_folder(tmp_path):
  gguf_models.write_named(tmp_path / 'net.gguf', 'llama')
  folder = write_folder(tmp_path / 'llama', 'llama')
  logits = [
    np.asarray(found.model.apply(found.variables, TOKENS)[0])
    for found in map(language_files.load, (tmp_path / 'net.gguf', folder))
  ]
  np.testing.assert_array_equal(*logits)


def of_bytes(pre):
  """Adds a byte-level vocabulary of 40 tokens."""
  letters = [chr(ord('a') + i) for i in range(26)]
  tokens = ['<s>', '</s>', *letters, 'Ġ', 'ab', 'Ġab', 'cd', '1', '2', '.', '!']
  tokens += [f'<{i}>' for i in range(40 - len(tokens))]

  def add(writer):
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 38)
    writer.add_token_merges(['a b', 'Ġ ab', 'c d'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

  return add


@pytest.mark.parametrize('options', [(), ('--calibration', 'self'), ('--calibration', 'text.txt')])
def test_compress_gguf_equals_compress_of_its_folder(options, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  gguf_models.write_named('net.gguf', 'llama', fields=of_bytes('smollm'))
  (tmp_path / 'text.txt').write_text('ab cd ab. ' * 300)
  folder = write_folder(tmp_path / 'llama', 'llama', bos_token_id=0)
  tokenizer = open_gguf(tmp_path / 'net.gguf').side_file('tokenizer.json')
  (folder / 'tokenizer.json').write_bytes(tokenizer)
  more = (*options, '--calibration-tokens', '512') if options else ()
  for source, output in (('net.gguf', 'a.opq'), ('llama', 'b.opq')):
    assert cli.main(['compress', source, output, '--bits-per-weight', '3', *more]) == 0
  with opq_jax.OpqFile('a.opq') as one, opq_jax.OpqFile('b.opq') as other:
    assert one.metadata['objective'] == 'divergence'
    same = lambda file: {key: text for key, text in file.metadata.items() if key != 'weights'}
    assert same(one) == same(other)
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  assert cli.main(['verify', 'a.opq', '--against', 'net.gguf']) == 0
  assert cli.main(['decompress', 'a.opq', 'back']) == 0
  back = open_folder('back')
  assert back.config['architectures'] == ['LlamaForCausalLM'] and len(back) == len(
    network('llama')[1]
  )
  assert (tmp_path / 'back' / 'tokenizer.json').read_bytes() == tokenizer
  capsys.readouterr()
  assert (
    cli.main(['evaluate', 'a.opq', '--text', 'text.txt', '--window', '32', '--against', 'net.gguf'])
    == 0
  )
  assert 'KL' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda writer: writer.add_sliding_window(4), 'llama.attention.sliding_window: found 4'),
    (lambda writer: writer.add_expert_count(8), 'llama.expert_count: found 8'),
    (
      lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
      "rope.scaling.type: found 'yarn', expected none or linear",
    ),
    (
      lambda writer: writer.add_tensor('rope_freqs.weight', np.ones(3, np.float32)),
      'rope_freqs.weight: found other factors',
    ),
    (
      lambda writer: writer.add_tensor('blk.0.ssm_a', np.ones(3, np.float32)),
      'found the tensors blk.0.ssm_a, expected those of llama alone',
    ),
  ],
)
def test_other_networks_of_a_gguf_are_noted(change, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  gguf_models.write_named('net.gguf', 'llama', fields=change)
  assert cli.main(['compress', 'net.gguf', 'net.opq']) == 0
  notes = ' '.join(capsys.readouterr().err.split())
  assert message in notes and 'bits are allocated from the weights alone' in notes
  # under their own names, in their own order
  with opq_jax.OpqFile('net.opq') as file:
    assert 'blk.0.attn_q.weight' in file and not file.side_files
  assert cli.main(['compress', 'net.gguf', 'net.opq', '--calibration', 'random']) == 2
  assert message in ' '.join(capsys.readouterr().err.split())


def test_gguf_of_a_tokenizer_that_is_not_known(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  gguf_models.write_named('net.gguf', 'llama', fields=of_bytes('tekken'))
  assert cli.main(['compress', 'net.gguf', 'net.opq']) == 0
  line = "tokenizer.ggml.pre: found 'tekken', expected one of gpt-2"
  assert 'tokenizer.json (' in ' '.join(capsys.readouterr().err.split())
  # tokens need none
  (tmp_path / 'tokens.json').write_text(json.dumps([*range(1, 33)]))
  argv = ['evaluate', 'net.opq', '--against', 'net.gguf', '--tokens', 'tokens.json']
  assert cli.main(argv) == 0
  (tmp_path / 'text.txt').write_text('ab cd')
  assert cli.main(['compress', 'net.gguf', 'net.opq', '--calibration', 'text.txt']) == 2
  assert line in ' '.join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings('ignore:.*quantized already')
def test_quantized_gguf_is_in_the_order_of_transformers(tmp_path):
  gguf_models.write_named(tmp_path / 'net.gguf', 'llama', kind='Q8_0')
  leaves = open_weights(tmp_path / 'net.gguf')
  for name, tensor in network('llama')[1].items():
    np.testing.assert_allclose(leaves[name].read(), tensor, atol=0.01)


def tokenizer_of(fields):
  tokenizers = pytest.importorskip('tokenizers')
  text = gguf_tokenizers.tokenizer_files(fields.get)['tokenizer.json']
  return tokenizers.Tokenizer.from_str(text.decode())


def test_tokenizer_of_sentencepiece_takes_the_best_scores():
  words = ['<unk>', '<s>', '</s>', '<0x0A>', '▁', 'a', 'b', 'c', 'ab', 'bc', '▁a', '▁ab', 'abc']
  fields = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': words,
    'tokenizer.ggml.token_type': [2, 3, 3, 6] + [1] * 9,
    'tokenizer.ggml.scores': [0, 0, 0, 0, -9, -8, -8, -8, -2, -1, -3, -4, -5],
    'tokenizer.ggml.unknown_token_id': 0,
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.add_bos_token': True,
  }
  tokenizer = tokenizer_of(fields)
  # 'bc' is merged before 'ab', and a line feed is its byte
  assert tokenizer.encode('abc\nab').tokens == ['<s>', '▁a', 'bc', '<0x0A>', 'ab']
  assert tokenizer.decode(tokenizer.encode('abc\nab').ids) == 'abc\nab'


def test_tokenizers_of_bytes_cut_numbers_as_their_families():
  words = [chr(ord('0') + i) for i in range(10)] + ['12', '123', '1234', '<s>', 'Ġ']
  fields = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.tokens': words,
    'tokenizer.ggml.merges': ['1 2', '12 3', '123 4'],
    'tokenizer.ggml.token_type': [1] * 13 + [3, 1],
  }
  found = {
    pre: tokenizer_of(fields | {'tokenizer.ggml.pre': pre}).encode('1234<s>').tokens
    for pre in ('gpt-2', 'smollm', 'llama-bpe', 'qwen2')
  }
  assert found == {
    'gpt-2': ['1234', '<s>'],
    'smollm': ['1', '2', '3', '4', '<s>'],
    'llama-bpe': ['123', '4', '<s>'],
    'qwen2': ['1', '2', '3', '4', '<s>'],
  }


def test_tokenizer_of_a_gguf_is_its_own(tmp_path):
  fields = {'tokenizer.huggingface.json': '{"model": 1}'}
  assert json.loads(gguf_tokenizers.tokenizer_files(fields.get)['tokenizer.json']) == {'model': 1}
  with pytest.raises(
    ValueError, match=r"tokenizer.ggml.model: found 'bert', expected gpt2 or llama"
  ):
    gguf_tokenizers.tokenizer_files(
      {'tokenizer.ggml.model': 'bert', 'tokenizer.ggml.tokens': ['a']}.get
    )
  with pytest.raises(ValueError, match=r'tokenizer.ggml.tokens: found no tokenizer'):
    gguf_tokenizers.tokenizer_files({}.get)
