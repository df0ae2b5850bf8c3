"""Llama and the families of its kind: Mistral, Qwen2, Qwen3, SmolLM2.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, arXiv 2302.13971: RMS
norms before attention and perceptron, rotary positions, a gated perceptron, no biases.  Grouped
queries are Ainslie et al., 2023, arXiv 2305.13245.  Qwen2 adds biases to the projections of
queries, keys and values; Qwen3 normalises every query and key.
"""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from opq_jax.models.attention import Rotation
from opq_jax.models.decoder import Decoder, attended, heads_of


class Llama(Decoder):
  """A decoder with RMS norms, rotary positions, grouped queries and a gated perceptron.

  Attributes beside those of `Decoder`:
    rotation: of queries and keys.
    has_bias: whether queries, keys and values have biases.
    has_output_bias: whether the layer after attention has one.
    has_hidden_bias: whether the layers of the perceptron have biases.
    has_head_norms: whether every query and every key is normalised.

  >>> import jax, jax.numpy as jnp
  >>> model = Llama(vocabulary=99, depth=2, features=32, hidden=64, heads=4, key_heads=2,
  ...               head_features=8, positions=16, epsilon=1e-5)
  >>> tokens = jnp.array([[5, 7, 11]])
  >>> variables = model.init(jax.random.key(0), tokens)
  >>> variables['params']['layers']['gate']['kernel'].shape
  (2, 32, 64)
  >>> model.apply(variables, tokens).shape
  (1, 3, 99)
  """

  rotation: Rotation = Rotation()
  has_bias: bool = False
  has_output_bias: bool = False
  has_hidden_bias: bool = False
  has_head_norms: bool = False

  def block(self) -> tuple[type[nn.Module], dict[str, Any]]:
    names = (
      *('hidden', 'heads', 'key_heads', 'head_features', 'epsilon', 'window', 'dtype'),
      *('has_bias', 'has_output_bias', 'has_hidden_bias', 'has_head_norms'),
    )
    return Block, {name: getattr(self, name) for name in names}

  def last_norm(self) -> nn.Module:
    return nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype)

  def placed(self, x: Array, places: Array) -> tuple[Array, Any]:
    return x, self.rotation.angles(places, self.head_features)


class Block(nn.Module):
  """x + attention(norm(x)), then x + perceptron(norm(x)); attributes are those of `Llama`."""

  hidden: int
  heads: int
  key_heads: int
  head_features: int
  epsilon: float
  window: int | None
  dtype: Any
  has_bias: bool
  has_output_bias: bool
  has_hidden_bias: bool
  has_head_norms: bool

  @nn.compact
  def __call__(self, x: Array, memory: Any, context: Any) -> tuple[Array, Any]:
    start, angles = context
    norm = functools.partial(nn.RMSNorm, epsilon=self.epsilon, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    features = x.shape[-1]

    h = norm(name='attention_norm')(x)
    query, key, value = (
      heads_of(dense(heads * self.head_features, use_bias=self.has_bias, name=name)(h), heads)
      for name, heads in (('query', self.heads), ('key', self.key_heads), ('value', self.key_heads))
    )
    if self.has_head_norms:
      query, key = norm(name='query_norm')(query), norm(name='key_norm')(key)
    query, key = angles.turn(query), angles.turn(key)
    h, memory = attended(query, key, value, memory, start, self.window)
    x += dense(features, use_bias=self.has_output_bias, name='out')(h)

    h = norm(name='hidden_norm')(x)
    gate, up = (
      dense(self.hidden, use_bias=self.has_hidden_bias, name=name)(h) for name in ('gate', 'up')
    )
    x += dense(features, use_bias=self.has_hidden_bias, name='down')(nn.silu(gate) * up)
    return x, memory
