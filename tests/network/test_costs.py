"""Costs of leaves from gradients, against the divergence that errors of their weights make."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax.network import divergence_costs


def divergence(logits, other):
  """Returns KL(softmax(logits) || softmax(other)), nats a row."""
  log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (logits, other))
  return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(8)(nn.tanh(nn.Dense(16)(x))), None


class Stack(nn.Module):
  """Three scanned layers of tokens that see those before them, and a head."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 8)(tokens)
    x = x + jnp.cumsum(x, 1) / 4
    stack = nn.scan(Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
    x, _ = stack()(x, None)
    return nn.Dense(11)(x)


def test_costs_predict_divergence_of_every_leaf_and_slice():
  model, tokens = Stack(), jax.random.randint(jax.random.key(1), (256, 12), 0, 11)
  params = model.init(jax.random.key(0), tokens)
  costs = divergence_costs(model.apply, params, tokens, key=jax.random.key(2))
  apply = jax.jit(model.apply)
  logits, rng = apply(params, tokens), np.random.default_rng(0)
  leaves, structure = jax.tree.flatten(params)
  for place, (leaf, cost) in enumerate(zip(leaves, jax.tree.leaves(costs), strict=True)):
    for index in np.ndindex(cost.shape):
      found, predicted = [], []
      for _ in range(64):
        error = np.zeros(leaf.shape, np.float32)
        error[index] = rng.normal(size=leaf[index].shape) * 0.02
        moved = structure.unflatten([*leaves[:place], leaf + error, *leaves[place + 1 :]])
        found.append(divergence(logits, apply(moved, tokens)))
        predicted.append(float(cost[index]) * np.sum(np.square(error)))
      # 256 draws of y, and errors of 8 weights or more: 10 to 15 % of noise
      np.testing.assert_allclose(np.mean(found), np.mean(predicted), rtol=0.3)


def test_costs_name_inputs_of_different_numbers_of_examples():
  fn = lambda params, x, y: x @ params['w'] + y
  with pytest.raises(ValueError, match=r'leading axes \[\(2,\), \(3,\)\], expected one number'):
    divergence_costs(
      fn, {'w': jnp.ones((4, 5))}, jnp.ones((2, 4)), jnp.ones((3, 5)), key=jax.random.key(0)
    )


def test_costs_name_an_answer_that_is_no_logits():
  fn = lambda params, x: jnp.sum(x @ params['w'])
  with pytest.raises(ValueError, match=r'shape \(\) for one example, expected logits'):
    divergence_costs(fn, {'w': jnp.ones((4, 5))}, jnp.ones((2, 4)), key=jax.random.key(0))
