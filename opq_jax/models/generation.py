"""Text that a language model writes, token after token."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opq_jax.core.trees import PyTree
from opq_jax.models.attention import check_tokens, check_vocabulary
from opq_jax.models.decoder import Cache, Decoder


def generate(
  model: Decoder,
  variables: PyTree,
  prompt: Int[Array, 'sequences length'],
  count: int,
  key: Array,
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Iterator[Int[np.ndarray, ' sequences']]:
  """Yields the tokens that follow prompts, one of every sequence at a time.

  Args:
    model, variables: the language model.
    prompt: the first tokens of each sequence, at least one.
    count: how many tokens to write.
    key: a PRNG key; the same key writes the same text.
    temperature, top_p: as for `sample`.

  Raises:
    ValueError: the prompt is empty or longer, with what follows, than the model's positions, or has
      a token that is not of the vocabulary; `temperature` or `top_p` is out of range.

  >>> from opq_jax import models
  >>> model = models.GPT2(vocabulary=50, depth=1, features=8, hidden=16, heads=2, key_heads=2,
  ...                     head_features=4, positions=8, epsilon=1e-5)
  >>> prompt = jnp.array([[3, 1, 4]])
  >>> variables = model.init(jax.random.key(0), prompt)
  >>> written = list(generate(model, variables, prompt, 5, jax.random.key(0)))
  >>> len(written), written[0].shape
  (5, (1,))
  """
  check_tokens(prompt, model.positions)
  length = prompt.shape[1]
  if not length:
    raise ValueError('prompt: found no token, expected one or more')
  check_vocabulary(np.asarray(prompt).tolist(), model.vocabulary)
  if count < 1 or length + count > model.positions:
    raise ValueError(
      f'count: found {count} tokens after a prompt of {length}, expected 1 to '
      f'{model.positions - length}: the model has {model.positions} positions'
    )
  if not 0 <= temperature < math.inf:
    raise ValueError(f'temperature: found {temperature}, expected 0 or more')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p: found {top_p}, expected a share above 0, at most 1')
  return _written(model, variables, prompt, count, key, temperature, top_p)


def _written(
  model: Decoder,
  variables: PyTree,
  prompt: Array,
  count: int,
  key: Array,
  temperature: float,
  top_p: float,
) -> Iterator[Int[np.ndarray, ' sequences']]:
  tokens = jnp.asarray(prompt, jnp.int32)
  cache = model.empty_cache(tokens.shape[0], tokens.shape[1] + count)
  for number in range(count):
    found, cache = _step(
      model, variables, tokens, cache, jax.random.fold_in(key, number), temperature, top_p
    )
    tokens = found[:, None]
    yield np.asarray(found)


def sample(
  logits: Float[Array, '... vocabulary'],
  key: Array,
  temperature: float | Float[Array, ''] = 1.0,
  top_p: float | Float[Array, ''] = 1.0,
) -> Int[Array, '...']:
  """Draws tokens from softmax(logits / temperature), restricted to its likeliest tokens.

  Args:
    logits: of the next token.
    key: a PRNG key.
    temperature: above 1 for more variety, below 1 for less; 0 takes the likeliest token.
    top_p: keeps the likeliest tokens up to the first with which their probabilities sum to this
      share (nucleus sampling, Holtzman et al., 2019, arXiv 1904.09751).

  >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  >>> drawn = sample(jnp.tile(logits, (1000, 1)), jax.random.key(0), top_p=0.7)
  >>> sorted(set(drawn.tolist()))
  [0, 1]
  >>> int(sample(logits, jax.random.key(0), temperature=0.0))
  0
  """
  logits = logits.astype(jnp.float32)
  scaled = logits / jnp.maximum(jnp.float32(temperature), 1e-6)
  order = jnp.argsort(-scaled, axis=-1)
  ranked = jnp.take_along_axis(jax.nn.softmax(scaled, axis=-1), order, axis=-1)
  # a token is kept if the likelier ones do not have the share without it
  is_kept = jnp.cumsum(ranked, axis=-1) - ranked < jnp.float32(top_p)
  kept = jnp.where(is_kept, jnp.log(ranked), -jnp.inf)
  rank = jax.random.categorical(key, kept, axis=-1)
  rank = jnp.where(jnp.float32(temperature) == 0, jnp.zeros_like(rank), rank)
  return jnp.take_along_axis(order, rank[..., None], axis=-1)[..., 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
  model: Decoder,
  variables: PyTree,
  tokens: Array,
  cache: Cache,
  key: Array,
  temperature: float,
  top_p: float,
) -> tuple[Array, Cache]:
  results: Any = model.apply(variables, tokens, cache, method='step')
  logits, cache = results
  return sample(logits[:, -1], key, temperature, top_p), cache
