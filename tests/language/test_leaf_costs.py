"""Costs block by block, against the gradients of the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax import language
from opq_jax.core import trees
from opq_jax.importers import language_models
from opq_jax.language.compression import balanced
from opq_jax.language.leaf_costs import block_costs
from opq_jax.network import divergence_costs
from tests.helpers.language_models import network


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama_biases', 'qwen3', 'gpt2'])
def test_block_costs_are_those_of_the_whole_network(name):
  model, tensors = network(name)
  tokens, key = np.random.default_rng(0).integers(0, 40, (3, 16)), jax.random.key(1)
  stored = language.stored_network(model, tensors)
  found = block_costs(stored, tokens, key)
  variables = language_models.from_tensors(model, tensors).variables
  whole = divergence_costs(model.apply, variables, jnp.asarray(tokens), key=key)
  kernels = 0
  for path, costs in trees.named_leaves(whole).items():
    place = stored.places[path]
    if jnp.ndim(costs) != place.is_stacked:
      continue  # a vector of every layer is one leaf to the whole network
    for number, tensor in enumerate(place.names):
      expected = float(costs[number] if place.is_stacked else costs)
      # what a tied table costs as head and as table is added, without the product of both
      near = 0.05 if model.is_tied and path.endswith('embedding') else 1e-4
      assert np.mean(found[tensor]) == pytest.approx(expected, rel=near), tensor
      kernels += 1
  assert kernels > 8


def test_costs_are_a_tree_of_the_file():
  model, tensors = network('llama')
  # as a file that has the tied head twice, and a tensor of something else
  tensors = {**tensors, 'lm_head.weight': tensors['model.embed_tokens.weight']}
  stored = language.stored_network(model, tensors)
  tensors = {**tensors, 'draft.weight': np.zeros((4, 4), np.float32), 'draft.bias': np.zeros(4)}
  with pytest.warns(UserWarning, match='^draft.weight: found tensors that the network does not'):
    found = language.costs(stored, language.at_random(40, 128, 16), tensors)
  assert found.keys() == tensors.keys()
  assert found['lm_head.weight'] == found['model.embed_tokens.weight']


def test_block_costs_of_outputs_are_those_of_leaves_apart():
  model, tensors = network('gpt2')
  tokens, key = np.random.default_rng(0).integers(0, 40, (3, 16)), jax.random.key(1)
  name, path = 'transformer.h.1.attn.c_attn.weight', 'params/layers/attention/kernel'
  found = block_costs(language.stored_network(model, tensors), tokens, key)[name]
  assert found.shape == (1, 96)
  variables = language_models.from_tensors(model, tensors).variables
  leaves = trees.named_leaves(variables)
  parts = jnp.split(leaves.pop(path)[1], 3, axis=-1)

  def apply(tree, tokens):
    rest, (query, key, value) = tree
    first = trees.named_leaves(variables)[path][0]
    kernel = jnp.stack([first, jnp.concatenate([query, key, value], axis=-1)])
    values = [*rest.values()]
    values.insert([*trees.named_leaves(variables)].index(path), kernel)
    return model.apply(jax.tree.unflatten(jax.tree.structure(variables), values), tokens)

  whole = divergence_costs(apply, (leaves, parts), jnp.asarray(tokens), key=key)
  for part, expected in zip(np.split(found[0], 3), whole[1], strict=True):
    assert part.mean() == pytest.approx(float(expected), rel=1e-3)


def test_balanced_costs_are_those_of_each_output():
  rng = np.random.default_rng(0)
  weights, omega = rng.normal(size=(5, 3)) * [1, 2, 0], np.array([[1.0, 2.0, 3.0]])
  found = balanced(omega, weights.astype(np.float32))
  energy = np.square(weights).mean(axis=0)
  expected = np.sqrt((omega[0, :2] + 0.2) / energy[:2])
  np.testing.assert_allclose(found[0, :2], expected, rtol=1e-5)
  # an output without weights has a cost, and a finite one
  assert found.shape == (1, 3) and np.isfinite(found).all() and found[0, 2] > found[0, 1]
  turned = balanced(omega.T, weights.T.astype(np.float32))
  np.testing.assert_allclose(turned.T, found, rtol=1e-6)
  assert balanced(2.0, weights) == pytest.approx(np.sqrt(2.2 / np.square(weights).mean()))
