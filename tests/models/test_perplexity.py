"""Perplexity, divergence and generation, against sums over all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opq_jax import models
from opq_jax.importers import language_models
from opq_jax.models import perplexity
from tests.helpers.language_models import network

RNG = np.random.default_rng(3)
TEXTS = [RNG.integers(0, 40, 45).tolist(), [7], RNG.integers(0, 40, 20).tolist()]


@functools.cache
def llama(noise=0.0):
  model, tensors = network('llama')
  variables = language_models.from_tensors(model, tensors).variables
  key = jax.random.key(0)
  return model, jax.tree.map(lambda x: x + noise * jax.random.normal(key, x.shape), variables)


@functools.cache
def program(model):
  return jax.jit(model.apply)


def log_probs(model, variables, tokens):
  """Of one sequence; all are padded to one length, which a causal model does not see."""
  padded = np.zeros((1, 16), np.int32)
  padded[0, : len(tokens)] = tokens
  logits = np.asarray(program(model)(variables, padded)[0, : len(tokens)], float)
  return scipy.special.log_softmax(logits, axis=-1)


def expected_scores(window, stride):
  """Sums of loss, divergence and agreement over every counted token, one by one."""
  sums = np.zeros(4)
  for text in TEXTS:
    done = 1
    for begin in range(0, len(text), stride):
      part = text[begin : begin + window]
      p, q = log_probs(*llama(0.05), part), log_probs(*llama(), part)
      for place in range(max(done - begin, 1), len(part)):
        one, other = q[place - 1], p[place - 1]
        kl = np.sum(np.exp(other) * (other - one))
        sums += -one[part[place]], kl, one.argmax() == other.argmax(), 1
      done = max(done, begin + len(part))
  return sums


@pytest.mark.parametrize(('window', 'stride'), [(16, 16), (16, 6)])
def test_evaluate_is_the_mean_over_tokens(window, stride, monkeypatch):
  monkeypatch.setattr(perplexity, '_BATCH', 48)  # three windows a step
  monkeypatch.setattr(perplexity, '_CHUNK', 10)
  steps = []
  found = models.evaluate(
    *llama(),
    TEXTS,
    window=window,
    stride=stride,
    against=llama(0.05),
    progress=lambda done, total: steps.append((done, total)),
  )
  loss, divergence, agreed, count = expected_scores(window, stride)
  assert found.tokens == count and steps[-1] == (found.windows, found.windows)
  np.testing.assert_allclose(found.loss.value, loss / count, rtol=1e-5)
  np.testing.assert_allclose(found.divergence.value, divergence / count, rtol=1e-3)
  assert found.agreement == agreed / count < 1
  np.testing.assert_allclose(found.perplexity, np.exp(found.loss))
  assert found.loss.low < found.loss.value < found.loss.high


def test_evaluate_alone_has_no_divergence():
  found = models.evaluate(*llama(), TEXTS[:1], window=64)
  assert (found.divergence, found.agreement, found.windows) == (None, None, 1)


@pytest.mark.parametrize(
  ('texts', 'window', 'message'),
  [
    ([[1, 40]], 8, 'found token 40, expected 0 to 39'),
    ([[1, 2]], 65, 'window: found 65, expected at most 64 tokens'),
    ([[1], []], 8, 'found no text of 2 tokens or more'),
  ],
)
def test_evaluate_checks_texts(texts, window, message):
  with pytest.raises(ValueError, match=message):
    models.evaluate(*llama(), texts, window=window)


def test_evaluate_checks_vocabularies():
  model, variables = llama()
  with pytest.raises(ValueError, match='found vocabularies of 40 and 41 tokens'):
    models.evaluate(model, variables, TEXTS, window=8, against=(model.clone(vocabulary=41), None))


def test_generate_is_greedy_without_temperature():
  model, variables = llama()
  prompt = np.array([[3, 1, 4], [2, 7, 1]])
  written = list(
    models.generate(model, variables, jnp.array(prompt), 4, jax.random.key(0), temperature=0.0)
  )
  for row, tokens in zip(np.stack(written, 1), prompt.tolist(), strict=True):
    for _ in range(4):
      tokens.append(int(np.argmax(log_probs(model, variables, tokens)[-1])))
    assert row.tolist() == tokens[3:]


def test_generate_depends_on_the_key_alone():
  model, variables = llama()
  write = lambda seed: np.stack(
    list(models.generate(model, variables, jnp.array([[3, 1, 4]] * 2), 4, jax.random.key(seed)))
  )
  first = write(0)
  np.testing.assert_array_equal(write(0), first)
  assert (write(1) != first).any() and (first[:, :1] != first).any()


def test_sample_draws_by_probability():
  probabilities = np.array([0.1, 0.4, 0.2, 0.3])
  logits = jnp.tile(jnp.log(jnp.array(probabilities, jnp.float32)), (20000, 1))
  for temperature, top_p, expected in (
    (1.0, 1.0, probabilities),
    (1.0, 0.5, [0, 4 / 7, 0, 3 / 7]),
    (0.5, 1.0, probabilities**2 / np.sum(probabilities**2)),
    (0.0, 1.0, [0, 1, 0, 0]),
  ):
    drawn = models.sample(logits, jax.random.key(0), temperature, top_p)
    found = np.bincount(drawn, minlength=4) / 20000
    np.testing.assert_allclose(found, expected, atol=0.015)


@pytest.mark.parametrize(
  ('count', 'options', 'message'),
  [
    (62, {}, 'count: found 62 tokens after a prompt of 3, expected 1 to 61'),
    (1, {'temperature': -1.0}, 'temperature: found -1.0, expected 0 or more'),
    (1, {'top_p': 0.0}, 'top_p: found 0.0, expected a share above 0'),
  ],
)
def test_generate_checks_arguments(count, options, message):
  model, variables = llama()
  with pytest.raises(ValueError, match=message):
    models.generate(model, variables, jnp.array([[1, 2, 3]]), count, jax.random.key(0), **options)
