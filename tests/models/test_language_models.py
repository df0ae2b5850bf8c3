"""Language models against transformers, whose answers `tests/golden/language_models.py` stored."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opq_jax
from opq_jax import models
from opq_jax.core import trees
from opq_jax.importers import language_models
from tests.helpers.language_models import CONFIGS, TOKENS, network

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'language_models.npz')
CAUSAL = [name for name in CONFIGS if name != 'bert']


def imported(name):
  model, tensors = network(name)
  return model, language_models.from_tensors(model, tensors).variables


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_are_transformers(name):
  tokens = TOKENS.copy()
  if name == 'bert':
    tokens[1, 8:] = 0
  model, variables = imported(name)
  found = jax.jit(model.apply)(variables, tokens)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, GOLDEN[name], atol=1e-4, rtol=0)


def test_golden_outputs_differ():
  """Windows, rotations and biases are felt in twelve tokens."""
  for name in ('llama_3', 'llama_linear', 'mistral', 'qwen2', 'qwen3'):
    assert np.abs(GOLDEN[name] - GOLDEN['llama']).max() > 0.1, name
  assert np.abs(GOLDEN['qwen2_window'] - GOLDEN['qwen2']).max() > 0.1


@pytest.mark.parametrize('name', ['mistral', 'gpt2'])
def test_step_continues_from_cache(name):
  """Five tokens at once, then one after the other, as all at once."""
  model, variables = imported(name)
  step = jax.jit(lambda *inputs: model.apply(*inputs, method='step'))
  cache = model.empty_cache(sequences=2, capacity=16)
  logits, cache = step(variables, TOKENS[:, :5], cache)
  found = [logits]
  for place in range(5, TOKENS.shape[1]):
    logits, cache = step(variables, TOKENS[:, place : place + 1], cache)
    found.append(logits)
  assert int(cache.length) == TOKENS.shape[1]
  np.testing.assert_allclose(np.concatenate(found, 1), GOLDEN[name], atol=1e-4, rtol=0)


def test_bfloat16_computes_in_bfloat16():
  _, variables = imported('llama')
  narrow = models.from_config(CONFIGS['llama'], dtype=jnp.bfloat16)
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
  # Flax multiplies a float32 norm with a bfloat16 scale
  with jax.numpy_dtype_promotion('standard'):
    found = jax.jit(narrow.apply)(variables, TOKENS)
  assert found.dtype == jnp.float32
  error = np.abs(found - GOLDEN['llama'])
  assert 1e-3 < error.mean() < 0.1


def test_tokens_are_checked():
  model, variables = imported('llama')
  with pytest.raises(ValueError, match=r'tokens: found float32 of shape \(3,\), expected integers'):
    model.apply(variables, jnp.zeros(3))
  with pytest.raises(ValueError, match=r'found sequences of 65 tokens, expected at most 64'):
    jax.eval_shape(model.apply, variables, jnp.zeros((1, 65), jnp.int32))
  with pytest.raises(ValueError, match='capacity: found 65, expected 1 to 64 tokens'):
    model.empty_cache(1, 65)


@pytest.mark.parametrize('name', ['llama_biases', 'qwen3', 'gpt2'])
def test_usage_finds_every_kernel(name):
  model, variables = imported(name)
  found = jax.tree.leaves(opq_jax.usage(model.apply, variables, TOKENS))
  used = {leaf.name.removeprefix('params/'): leaf for leaf in found}
  for path, leaf in used.items():
    layer, _, kind = path.rpartition('/')
    if kind == 'kernel':
      assert (leaf.kind, leaf.slices) == ('dot', int(layer.startswith('layers/'))), path
      assert leaf.product.inputs == (leaf.slices,) and leaf.product.is_exact
    elif kind == 'embedding':
      assert leaf.uses[0].kind == 'look-up' and leaf.is_compressible
    else:
      assert leaf.kind == 'elementwise', path
  if name != 'gpt2':
    reads = lambda *names: {used[f'layers/{name}/kernel'].product.reads for name in names}
    assert len(reads('query', 'key', 'value')) == len(reads('gate', 'up')) == 1


def test_stack_is_allocated_as_layers_apart(tmp_path):
  """The scanned tree and the tensors of its file: the same grids, and payloads of equal size."""
  model, tensors = network('qwen3')
  variables = language_models.from_tensors(model, tensors).variables
  used = opq_jax.usage(model.apply, variables, TOKENS)
  places = language_models.places(model)
  stack = opq_jax.allocate(variables, bits_per_weight=3.0, usage=used)
  apart = opq_jax.allocate(tensors, bits_per_weight=3.0, channel_axis=0)
  records = lambda tree, found: dict(
    zip(
      trees.named_leaves(tree),
      trees.records(tree, found.tree, opq_jax.allocation.LeafAllocation),
      strict=True,
    )
  )
  stacked, each = records(variables, stack), records(tensors, apart)
  for path, place in places.items():
    if stacked[path] is None:
      assert all(each[key] is None for key in place.names), path
      continue
    for field in ('threshold', 'step', 'bits', 'error'):
      expected = np.array([getattr(each[key], field) for key in place.names])
      found = np.asarray(getattr(stacked[path], field))
      np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=1e-4, err_msg=path)
  payloads = []
  for tree, allocation in ((variables, stack), (tensors, apart)):
    opq_jax.save(tmp_path / 'net.opq', tree, opq_jax.init_state(tree, allocation))
    with opq_jax.OpqFile(tmp_path / 'net.opq') as file:
      sizes = file.sizes()
    payloads.append(
      [
        sum(sizes.get(name, 0) for name in ((path,) if tree is variables else place.names))
        for path, place in places.items()
        if stacked[path] is not None
      ]
    )
  # the order of sums, and of the codes in a payload, is that of the layout
  np.testing.assert_allclose(*payloads, rtol=2e-3)
