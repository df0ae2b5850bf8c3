"""BERT as an encoder of sentences.

Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", NAACL 2019, arXiv 1810.04805; the pooling is that of Reimers and Gurevych,
"Sentence-BERT", EMNLP 2019, arXiv 1908.10084.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opq_jax.models import attention


class SentenceEncoder(nn.Module):
  """BERT, whose last hidden states are averaged over the tokens and normalised.

  The network of sentence-transformers' all-MiniLM-L6-v2 and others of its kind.  Without the
  pooling it ends in `hidden_states`.  BERT's own pooler, a dense layer that reads the first token,
  is no part of it.

  Attributes:
    layers: number of blocks of attention and a perceptron.
    features: size of a hidden state.
    hidden: outputs of the perceptron's first layer.
    heads: heads of attention, which divide `features`.
    vocabulary: number of tokens.
    positions: length of the longest sentence.
    types: number of segment types; every token here is of type 0.
    epsilon: LayerNorm's addition to the variance.
    dtype: dtype of the computation; parameters and embeddings of sentences are float32.

  >>> import jax
  >>> model = SentenceEncoder(layers=2, features=32, hidden=64, heads=4, vocabulary=100)
  >>> tokens = jnp.array([[5, 7, 0], [5, 9, 3]])  # 0 is padding
  >>> variables = model.init(jax.random.key(0), tokens)
  >>> model.apply(variables, tokens).shape
  (2, 32)
  """

  layers: int = 6
  features: int = 384
  hidden: int = 1536
  heads: int = 12
  vocabulary: int = 30522
  positions: int = 512
  types: int = 2
  epsilon: float = 1e-12
  dtype: Any = jnp.float32

  def __call__(self, tokens: Int[Array, 'sentences length']) -> Float[Array, 'sentences features']:
    """Returns embeddings of length 1 of sentences that are padded with tokens 0."""
    return embeddings(self.hidden_states(tokens), tokens > 0)

  @nn.compact
  def hidden_states(
    self, tokens: Int[Array, 'sentences length']
  ) -> Float[Array, 'sentences length features']:
    """Returns the hidden states after the last block; those of padding mean nothing.

    Raises:
      ValueError: the tokens are not [sentences, length], or more than `positions` in a sentence.
    """
    attention.check_tokens(tokens, self.positions)
    is_there = tokens > 0
    norm = functools.partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    embed = functools.partial(nn.Embed, features=self.features, dtype=self.dtype)
    x = embed(self.vocabulary, name='word')(tokens)
    x += embed(self.positions, name='position')(jnp.arange(tokens.shape[1]))[None]
    x += embed(self.types, name='type')(jnp.zeros_like(tokens))
    x = norm(name='norm')(x)
    for i in range(self.layers):
      x = _layer(self, x, is_there, f'{i}_')
    return x


class EncoderBlock(nn.Module):
  """One layer of a `SentenceEncoder`, by the names of its leaves without the layer's number.

  Attributes:
    hidden, heads, epsilon, dtype: as of `SentenceEncoder`.
  """

  hidden: int
  heads: int
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'sentences length features']
  ) -> Float[Array, 'sentences length features']:
    """Returns the hidden states after the layer, of sentences without padding."""
    return _layer(self, x, jnp.ones(x.shape[:2], bool), '')


def embeddings(
  x: Float[Array, 'sentences length features'], is_there: Bool[Array, 'sentences length']
) -> Float[Array, 'sentences features']:
  """Returns the means over tokens of the last hidden states, of length 1.

  Args:
    x: the hidden states.
    is_there: False of padding.
  """
  count = is_there.sum(1)[:, None].astype(jnp.float32)
  mean = jnp.where(is_there[..., None], x, 0).astype(jnp.float32).sum(1) / count
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer(
  module: SentenceEncoder | EncoderBlock,
  x: Float[Array, 'sentences length features'],
  is_there: Bool[Array, 'sentences length'],
  prefix: str,
) -> Float[Array, 'sentences length features']:
  """Computes a layer, whose parameters become those of a module, by names with a prefix."""
  features, kind = x.shape[-1], module.dtype
  dense = lambda width, name: nn.Dense(width, dtype=kind, name=f'{prefix}{name}')
  norm = lambda name: nn.LayerNorm(epsilon=module.epsilon, dtype=kind, name=f'{prefix}{name}')
  query, key, value = (
    dense(features, name)(x).reshape(*x.shape[:2], module.heads, -1)
    for name in ('query', 'key', 'value')
  )
  attended = nn.dot_product_attention(query, key, value, mask=is_there[:, None, None])
  x = norm('norm')(x + dense(features, 'out')(attended.reshape(x.shape)))
  inner = nn.gelu(dense(module.hidden, 'up')(x), approximate=False)
  return norm('last_norm')(x + dense(features, 'down')(inner))
