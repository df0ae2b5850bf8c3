"""The judge of language models and its rivals, on networks of some hundred weights."""

import functools
import json

import jax
import numpy as np
import pytest

import opq_jax
from experiments.benchmarks.language_models import (
  add_file,
  block_forms,
  coded,
  gguf_files,
  gptq,
  grids,
  measure,
  networks,
  ours,
  rows,
  tables,
  watersic,
)
from opq_jax import encoders, importers, language, models
from opq_jax.importers import language_models
from opq_jax.language import block_codes
from opq_jax.language.block_codes import BlockEncoder, Streams
from opq_jax.language.parts import Block

SHAPE = {
  'depth': 2,
  'features': 16,
  'hidden': 32,
  'heads': 2,
  'key_heads': 2,
  'head_features': 8,
  'positions': 32,
  'epsilon': 1e-5,
}


LLAMA = {
  'vocab_size': 53,
  'num_hidden_layers': 2,
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': True,
}
GPT2 = {
  'vocab_size': 33,
  'n_layer': 2,
  'n_embd': 16,
  'n_inner': 32,
  'n_head': 2,
  'n_positions': 32,
  'layer_norm_epsilon': 1e-5,
}


@pytest.fixture(scope='module', params=networks.NAMES)
def network(request):
  kind, vocabulary = {'smollm2': (models.Llama, 53), 'iglm': (models.GPT2, 33)}[request.param]
  model = kind(vocabulary=vocabulary, **SHAPE)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocabulary, (27, 12), np.int32)
  params = model.init(jax.random.key(0), tokens[:1])
  params = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), params)
  return networks.Network(request.param, model, params, tokens[:11], tokens[11:])


def test_judge_agrees_with_evaluate(network, monkeypatch):
  monkeypatch.setattr(measure, 'BATCH', 48)  # 3 batches, of which the last is not full
  monkeypatch.setattr(measure, 'CHUNK', 7)
  other = jax.tree.map(lambda leaf: 1.1 * leaf, network.params)
  found = measure.Judge(network).scores(other)
  expected = models.evaluate(
    network.model,
    other,
    network.measured.tolist(),
    window=12,
    against=(network.model, network.params),
  )
  np.testing.assert_allclose(found.divergence, expected.divergence, rtol=1e-4)
  np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
  assert found.agreement == pytest.approx(expected.agreement)
  assert found.divergence.value > 0.01 and found.agreement < 1
  assert found.row()['perplexity'] == pytest.approx(expected.perplexity.value, rel=1e-4)


def test_judge_finds_float_weights_alike(network):
  scores = measure.Judge(network).scores(network.params)
  assert abs(scores.divergence.value) < 1e-6 and scores.agreement == 1


def test_split_text_shares_no_16_tokens():
  rng = np.random.default_rng(0)
  text = rng.integers(0, 1000, 25_000).tolist()
  text[20_000:20_020] = text[300:320]  # a paragraph again
  measured, calibration = networks.split_text(text, 256)
  assert measured.size == 16_384
  assert len(calibration) == (25_000 - 16_384) // 256 - 1
  rows_of = lambda tokens: set(
    map(tuple, np.lib.stride_tricks.sliding_window_view(tokens, 16).tolist())
  )
  assert not rows_of(measured.reshape(-1)) & set().union(*map(rows_of, calibration))


def test_split_sequences_keeps_neighbours_together():
  rng = np.random.default_rng(0)
  genes = rng.integers(0, 20, (120, 96))
  alleles = np.repeat(genes, 3, axis=0)
  alleles[np.arange(360), rng.integers(0, 96, 360)] = 20
  measured, calibration = networks.split_sequences([*alleles.tolist(), [1] * 95], 96)
  assert measured.size - len(measured) >= networks.LEAST_TOKENS
  assert len(calibration) > 100 and measured.shape[1] == 96
  closest = min(np.count_nonzero(measured != row, axis=1).min() for row in calibration)
  assert closest > networks.SUBSTITUTIONS


def test_sizes_count_leaves_that_are_not_coded(network):
  kernels = networks.kernels(network.params)
  made = coded.each_matrix(kernels, lambda matrix: (matrix / 2, 3.0 * matrix.size))
  weights = sum(leaf.size for leaf in networks.leaves(network.params).values())
  inner = sum(leaf.size for leaf in kernels.values())
  sizes = made._replace(other_bits=1000).sizes(network.params)
  assert sizes['bits of kernels'] == 3
  expected = (3 * inner + 16 * (weights - inner) + 1000) / weights
  assert sizes['bits'] == pytest.approx(expected, abs=1e-4)
  found = networks.leaves(made.params(network.params))
  for path, leaf in networks.leaves(network.params).items():
    # halved, and not transposed; or float16
    np.testing.assert_allclose(found[path], leaf / 2 if path in kernels else leaf, rtol=1e-3)


def brute_force(weights, moments, order, setting):
  """Optimal brain surgery: inverts the moments of the inputs that are left at every step."""
  moments = moments + gptq.DAMPING * np.diag(moments).mean() * np.eye(len(moments))
  left, decoded = weights.copy(), np.zeros_like(weights)
  for number, column in enumerate(order):
    if number % setting.group == 0:
      members = order[number : number + setting.group]
      grid = grids.fitted(left[:, members].astype(np.float32), setting.bits, setting.clip_search)
    rest = order[number:]
    inverse = np.linalg.inv(moments[np.ix_(rest, rest)])
    decoded[:, column] = grid.rounded(left[:, [column]])[:, 0]
    error = left[:, column] - decoded[:, column]
    left[:, rest] -= np.outer(error, inverse[0] / inverse[0, 0])
  return decoded


@pytest.mark.parametrize(('act_order', 'clip_search'), [(False, False), (True, True)])
def test_gptq_is_optimal_brain_surgery(act_order, clip_search):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(200, 10)) @ rng.normal(size=(10, 10))
  moments, weights = inputs.T @ inputs / 200, rng.normal(size=(6, 10))
  setting = gptq.Setting(3, 4, act_order, clip_search)
  order = np.argsort(-np.diag(moments)) if act_order else np.arange(10)
  found, bits = gptq.quantized(weights.astype(np.float32), moments, setting)
  expected = brute_force(weights.astype(np.float32).astype(np.float64), moments, order, setting)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # 3 groups, the last of 2 inputs; 2 bits say the group of an input
  assert bits == 60 * 3 + 18 * (16 + 3) + 20 * act_order
  rounded, _ = grids.rtn(weights.astype(np.float32), 3, 4)
  cost = lambda values: np.trace((values - weights) @ moments @ (values - weights).T)
  assert cost(found) < 0.8 * cost(rounded)


def test_gptq_ignores_inputs_that_are_zero():
  rng = np.random.default_rng(0)
  moments = np.diag([1.0, 0.0, 2.0, 0.5])
  found, _ = gptq.quantized(rng.normal(size=(3, 4)), moments, gptq.Setting(4, 4))
  assert np.isfinite(found).all() and not found[:, 1].any()


def test_gptq_walks_the_quantized_network(network):
  seen = []
  codec = functools.partial(gptq.quantized, setting=gptq.Setting(2, 8))
  made = gptq.coded_network(network, codec, lambda *done: seen.append(done))
  assert seen == [(1, 2), (2, 2)]
  kernels = networks.kernels(network.params)
  assert set(made.leaves) == set(kernels)
  # the last kernel reads what all others have made of the tokens of calibration
  path = 'params/layers/down/kernel'
  params = networks.replaced(network.params, made.leaves)
  moments = ours.moments_of(network._replace(params=params))
  matrix = np.asarray(networks.leaves(moments)[path].matrix[1, 0])
  expected, _ = codec(kernels[path][1].T, matrix)
  np.testing.assert_allclose(made.leaves[path][1], expected.T, atol=1e-5)


def test_watersic_shares_errors_evenly():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(300, 12)) * np.geomspace(0.1, 10, 12) @ rng.normal(size=(12, 12))
  moments, weights = inputs.T @ inputs / 300, rng.normal(size=(400, 12)).astype(np.float32)
  found, bits = watersic.quantized(weights, moments, 4.0)
  assert bits == pytest.approx(4 * weights.size, rel=0.01)
  # in coordinates in which the error of the output is a sum of squares, all have one error
  factor = gptq.factored(moments, np.arange(12))
  errors = np.square((found - weights) @ np.linalg.inv(factor)).mean(axis=0)
  assert errors.max() < 1.5 * errors.min()


def test_clip_search_takes_the_least_error():
  weights = np.random.default_rng(0).laplace(size=(5, 32)).astype(np.float32)
  found = grids.fitted(weights, 2, clip_search=True)
  error = lambda values: (np.abs(values - weights) ** 2.4).sum(axis=1)
  errors = []
  for number in range(80):
    share = 1 - number / 100
    low, high = (share * part(weights, axis=1, keepdims=True) for part in (np.min, np.max))
    scale = ((high - low) / 3).astype(np.float16).astype(np.float32)
    zero = np.round(-low / scale)
    errors.append(error(scale * (np.clip(np.round(weights / scale + zero), 0, 3) - zero)))
  np.testing.assert_allclose(error(found.rounded(weights)), np.min(errors, axis=0), rtol=1e-5)


@pytest.mark.parametrize(('axis', 'zero_bits'), [(0, 16), (1, 16), (0, 8)])
def test_hqq_follows_its_formulas(axis, zero_bits):
  weights = np.random.default_rng(0).laplace(size=(16, 32)).astype(np.float32)
  found, bits = grids.hqq(weights, 3, 64, axis, zero_bits)
  groups = weights.astype(np.float64).reshape((64, -1) if axis == 0 else (-1, 64))
  low, high = (part(groups, axis=axis, keepdims=True) for part in (np.min, np.max))
  scale = 7 / (high - low)
  zeros, errors, beta = [-low * scale], [], 10.0
  for _ in range(20):
    codes = np.clip(np.round(groups * scale + zeros[-1]), 0, 7)
    rest = groups - (codes - zeros[-1]) / scale
    errors.append(np.abs(rest).mean())
    size = np.maximum(np.abs(rest), 1e-30)
    shrunk = np.sign(rest) * np.maximum(0, size - size**-0.3 / beta)
    zeros.append((codes - (groups - shrunk) * scale).mean(axis=axis, keepdims=True))
    beta *= 1.01
    if len(errors) > 1 and errors[-1] >= errors[-2]:
      break
  zero = zeros[int(np.argmin(errors))]
  codes = np.clip(np.round(groups * scale + zero), 0, 7)
  expected = ((codes - zero) / scale).reshape(weights.shape)
  tolerance = 2e-3 if zero_bits == 16 else 3e-2
  assert np.mean(np.abs(found - expected)) < tolerance * np.abs(weights).max()
  assert bits == 512 * 3 + 8 * (16 + zero_bits) + 32 * (zero_bits == 8)
  start = np.clip(np.round(groups * scale + zeros[0]), 0, 7)
  before = np.abs((start - zeros[0]) / scale - groups).mean()
  assert np.abs(found - weights).mean() < before


@pytest.mark.parametrize('reshaped', [False, True])
def test_gguf_has_every_weight_in_place(network, reshaped, tmp_path, monkeypatch):
  gguf = pytest.importorskip('gguf')
  monkeypatch.setattr(gguf_files, 'BLOCK', 64)
  monkeypatch.setattr(gguf_files, '_SOURCE_BLOCK', 4)
  if network.model.vocabulary % 4:
    table = network.params['params']['embed']['embedding'][:32]
    network = network._replace(
      model=network.model.clone(vocabulary=32),
      params=networks.replaced(network.params, {'params/embed/embedding': table}),
    )
  gguf_files.write_gguf(network, tmp_path / 'network.gguf', reshaped=reshaped)
  places, leaves = gguf_files.places(network), networks.leaves(network.params)
  count = 0
  for tensor in gguf.GGUFReader(tmp_path / 'network.gguf').tensors:
    place = places[tensor.name]
    if reshaped and len(place.shape) == 2:
      assert tensor.data.shape[1] % 64 == 0
    leaf = leaves[place.path] if place.layer is None else leaves[place.path][place.layer]
    found = np.array(tensor.data).reshape(place.shape)
    if found.ndim == 2:
      found = gguf_files.in_order(network.name, found)
    np.testing.assert_array_equal(found.T if place.path.endswith('/kernel') else found, leaf)
    count += found.size
  assert count == sum(leaf.size for leaf in leaves.values())


def test_importance_is_of_every_input(network, monkeypatch):
  monkeypatch.setattr(gguf_files, '_SOURCE_BLOCK', 4)
  found = gguf_files.importance(network, ours.moments_of(network))
  for name, place in gguf_files.places(network).items():
    if networks.is_kernel(place.path):
      assert found[name].shape == place.shape[1:] and (found[name] > 0).all()
  # the first layer reads normalised embeddings: energy 1 times the square of the norm's scale
  first = 'blk.0.attn_q.weight' if network.name == 'smollm2' else 'blk.0.attn_qkv.weight'
  assert found[first].mean() == pytest.approx(4, rel=0.02)


def test_ours_stores_kernels_or_all(network):
  sizes = {}
  for whole in True, False:
    made, _ = ours.coded_network(network, 4.0, 'plain', whole=whole)
    sizes[whole] = made.sizes(network.params)
    paths = networks.leaves(network.params) if whole else networks.kernels(network.params)
    assert set(made.leaves) == set(paths)
    for path, leaf in networks.kernels(network.params).items():
      error = np.sum((made.leaves[path] - leaf) ** 2) / np.sum(leaf**2)
      assert 1e-4 < error < 0.02
  assert sizes[True]['bits'] < sizes[False]['bits']


@pytest.mark.parametrize('names', ['ours', 'transformers'])
def test_file_counts_its_bytes(network, names, tmp_path):
  params = network.params
  if names == 'transformers':
    params = importers.language_models.to_tensors(network.model, params)
    axis = 0 if network.name == 'smollm2' else -1
    compressed = opq_jax.compress(params, bits_per_weight=4, channel_axis=axis)
  else:
    compressed = opq_jax.compress(params, bits_per_weight=4, slices=lambda path, leaf: 0)
  kind = {'smollm2': 'llama', 'iglm': 'gpt2'}[network.name]
  config = {'smollm2': LLAMA, 'iglm': GPT2}[network.name] | {'model_type': kind}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  path = tmp_path / 'network.opq'
  files = {'config.json': (tmp_path / 'config.json').read_bytes()}
  opq_jax.save(path, compressed.params, compressed.state, side_files=files)
  made = add_file.of_file(network, path)
  total = sum(made.bits.values()) + made.other_bits
  with opq_jax.OpqFile(path) as file:
    assert total == 8 * (path.stat().st_size - file.side_bytes())
  assert made.sizes(params if names == 'ours' else network.params)['bits of kernels'] < 8
  for name, leaf in networks.kernels(network.params).items():
    assert np.sum((made.leaves[name] - leaf) ** 2) < 0.02 * np.sum(leaf**2)


def test_forms_see_what_the_blocks_read(network):
  """Moments and residuals, taken from the inputs of modules, are those of the library."""
  tensors = language_models.to_tensors(network.model, network.params)
  stored = language.stored_network(network.model, tensors)
  rng, tokens = np.random.default_rng(1), network.calibration
  shape = *tokens.shape, network.model.features
  first = rng.normal(size=shape).astype(np.float32)
  streams = Streams(first, first + 0.1 * rng.normal(size=shape).astype(np.float32))
  context = (stored.context(tokens.shape[1]),)
  part = block_codes._Part(Block(stored.model), stored.layer(0), 0, context)
  compressed = jax.tree.map(lambda leaf: 1.1 * leaf, part.params)
  options = {'bits': {}, 'encoder': encoders.Feedback({})}
  # all tokens weigh the same
  weights = np.ones((stored.depth, *tokens.shape), np.float32)
  form = block_forms.FORMS['weights of tokens 1']
  of_form = block_forms.FormEncoder(stored, tokens, form=form, token_weights=weights, **options)
  added = set()
  for stage in block_codes.stages(part.function, part.params, first[:1], *context):
    found = of_form._sums(part, stage, compressed, streams)
    expected = BlockEncoder(stored, tokens, **options)._sums(part, stage, compressed, streams)
    jax.tree.map(
      lambda *both: np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-4), found, expected
    )
    added |= {stage.leaves[0]} if found.residual is not None else set()
  assert added == {'out/kernel', 'down/kernel'}


def test_rows_go_on_where_they_were(tmp_path):
  path = tmp_path / 'folder' / 'rows.json'
  key = {'codec': 'a', 'setting': 'b', 'data': 'none', 'embedding': 'float16'}
  first, again = rows.Rows(path, {'windows': 3}), rows.Rows(path, {'windows': 3})
  first.append(key | {'KL': 1.0})
  again.append(key | {'codec': 'c'})
  assert [row['codec'] for row in json.loads(path.read_text())['rows']] == ['a', 'c']
  assert again.has(**key) and not again.has(**(key | {'data': 'text'}))
  with pytest.raises(ValueError, match=r'found .*3.*, expected .*4'):
    rows.Rows(path, {'windows': 4})


def row(codec, bits, divergence, data='none', embedding='float16'):
  return {
    'codec': codec,
    'setting': f'{bits} bits',
    'data': data,
    'embedding': embedding,
    'bits of kernels': bits,
    'bits': bits + 1,
    'KL': divergence,
  }


def test_front_leaves_out_what_a_codec_may_not_see():
  every = [
    row('opq_jax', 2, 0.001),
    row('RTN', 3, 0.5),
    row('HQQ', 3.5, 0.6),  # dominated
    row('HQQ', 3.9, 0.12),  # above the line from 3 to 4 bits
    row('HQQ', 4, 0.1),
    row('GPTQ', 3, 0.2, data='text'),
    row('GPTQ', 3, 0.1, data='text', embedding='HQQ, 4 bits'),
  ]
  found = tables.front(every, 'bits of kernels', text=False)
  assert [point[:2] for point in found] == [(3, 0.5), (4, 0.1)]
  found = tables.front(every, 'bits of kernels', text=True)
  assert [point[:2] for point in found] == [(3, 0.2), (4, 0.1)]
  found = tables.front(every, 'bits', text=True)
  assert [point[:2] for point in found] == [(4, 0.1)]


def test_table_divides_by_the_rival_of_equal_bits(tmp_path, monkeypatch):
  intervals = {f'{name}{end}': 1.0 for name in ('KL', 'perplexity') for end in (' low', ' high')}
  intervals |= {'perplexity': 2.0, 'agreement': 0.5, 'seconds': 1}
  every = [row('opq_jax', 3, 0.1), row('RTN', 2, 1.0), row('RTN', 4, 0.04), row('opq_jax', 1, 9.0)]
  every.append(row('GPTQ', 3, 0.1, data='text'))
  path = tmp_path / 'iglm.json'
  path.write_text(json.dumps({'rows': [line | intervals for line in every]}))
  monkeypatch.setattr(tables, 'read', lambda network: json.loads(path.read_text()))
  small, large = tables.beside_rivals('iglm')  # the whole file: none of ours, with a float16 table
  assert (small['ratio of KL without data'], large['ratio of KL without data']) == ('', '0.50')
  assert (large['best rival with text, KL'], large['ratio of KL with text']) == ('0.1', '1.00')
  assert small['best rival with text, KL'] == 'none as small'
  codecs = [line['codec'] for line in tables.all_rows('iglm')]
  assert codecs == ['opq_jax', 'opq_jax', 'GPTQ', 'RTN', 'RTN']
