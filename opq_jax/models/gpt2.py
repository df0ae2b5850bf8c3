"""GPT-2.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from opq_jax.models.decoder import Decoder, attended, heads_of


class GPT2(Decoder):
  """A decoder with layer norms, learned positions, biases and GELU.

  Queries, keys and values are the outputs of one layer, `attention`, side by side.

  >>> import jax
  >>> model = GPT2(vocabulary=99, depth=2, features=32, hidden=64, heads=4, key_heads=4,
  ...              head_features=8, positions=16, epsilon=1e-5)
  >>> tokens = jnp.array([[5, 7, 11]])
  >>> variables = model.init(jax.random.key(0), tokens)
  >>> variables['params']['layers']['attention']['kernel'].shape
  (2, 32, 96)
  >>> model.apply(variables, tokens).shape
  (1, 3, 99)
  """

  def setup(self) -> None:
    super().setup()
    self.position = nn.Embed(self.positions, self.features, dtype=self.dtype)

  def block(self) -> tuple[type[nn.Module], dict[str, Any]]:
    names = 'hidden', 'heads', 'epsilon', 'window', 'dtype'
    return Block, {name: getattr(self, name) for name in names}

  def last_norm(self) -> nn.Module:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)

  def placed(self, x: Array, places: Array) -> tuple[Array, Any]:
    return x + self.position(places)[None], None


class Block(nn.Module):
  """x + attention(norm(x)), then x + perceptron(norm(x)); attributes are those of `GPT2`."""

  hidden: int
  heads: int
  epsilon: float
  window: int | None
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, memory: Any, context: Any) -> tuple[Array, Any]:
    start, _ = context
    norm = functools.partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    features = x.shape[-1]

    joined = dense(3 * features, name='attention')(norm(name='attention_norm')(x))
    query, key, value = (heads_of(part, self.heads) for part in jnp.split(joined, 3, axis=-1))
    h, memory = attended(query, key, value, memory, start, self.window)
    x += dense(features, name='out')(h)

    h = nn.gelu(dense(self.hidden, name='up')(norm(name='hidden_norm')(x)), approximate=True)
    x += dense(features, name='down')(h)
    return x, memory
