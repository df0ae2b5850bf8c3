"""What all language models share: embedding, a scanned stack of blocks, a norm and a head."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opq_jax.models import attention
from opq_jax.models.attention import Memory


class Cache(NamedTuple):
  """What a language model remembers of the tokens that it has read.

  Attributes:
    memory: keys and values of all layers, [layers, sequences, capacity, heads, features].
    length: how many tokens were read.
  """

  memory: Memory
  length: Int[Array, '']


class Decoder(nn.Module):
  """A causal language model; `Llama` and `GPT2` are its families.

  The layers are one stack, run by a scan: a leaf of `params/layers` has an axis of layers in front,
  and every slice is a kernel of its own.  Kernels are [inputs, outputs].

      logits = model.apply(variables, tokens)                              # all at once
      cache = model.empty_cache(sequences=1, capacity=256)                 # or bit by bit
      logits, cache = model.apply(variables, tokens, cache, method='step')

  Attributes:
    vocabulary: number of tokens.
    depth: number of layers.
    features: size of a hidden state.
    hidden: outputs of the perceptron's first layer.
    heads: heads of queries.
    key_heads: heads of keys and values, which divide `heads`.
    head_features: size of a query, a key or a value.
    positions: length of the longest sequence.
    epsilon: addition of a norm to the mean square or the variance.
    is_tied: whether the head is the embedding, transposed.
    window: how many tokens a query sees at most, itself counted; None for all before it.
    dtype: dtype of the computation; logits are float32.
  """

  vocabulary: int
  depth: int
  features: int
  hidden: int
  heads: int
  key_heads: int
  head_features: int
  positions: int
  epsilon: float
  is_tied: bool = True
  window: int | None = None
  dtype: Any = jnp.float32

  def block(self) -> tuple[type[nn.Module], dict[str, Any]]:
    """Returns the class of a layer and its attributes: called with (x, memory, context)."""
    raise NotImplementedError

  def last_norm(self) -> nn.Module:
    """Returns the norm before the head."""
    raise NotImplementedError

  def placed(self, x: Array, places: Array) -> tuple[Array, Any]:
    """Returns the first hidden states, and what every layer needs to know of the places."""
    raise NotImplementedError

  def setup(self) -> None:
    kind, attributes = self.block()
    stack = nn.scan(
      kind,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
    )
    self.embed = nn.Embed(self.vocabulary, self.features, dtype=self.dtype)
    self.layers = stack(**attributes)
    self.norm = self.last_norm()
    if not self.is_tied:
      self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)

  def __call__(
    self, tokens: Int[Array, 'sequences length']
  ) -> Float[Array, 'sequences length vocabulary']:
    """Returns the logits of the token after each token.

    Raises:
      ValueError: tokens are no integers [sequences, length], or more than `positions`.
    """
    return self.logits(self.hidden_states(tokens))

  def hidden_states(
    self, tokens: Int[Array, 'sequences length']
  ) -> Float[Array, 'sequences length features']:
    """Returns what the head reads."""
    return self._run(tokens, jnp.int32(0), None)[0]

  def logits(
    self, hidden: Float[Array, 'sequences length features']
  ) -> Float[Array, 'sequences length vocabulary']:
    """Returns the logits of hidden states."""
    logits = self.embed.attend(hidden) if self.is_tied else self.head(hidden)
    return logits.astype(jnp.float32)

  def step(
    self, tokens: Int[Array, 'sequences length'], cache: Cache
  ) -> tuple[Float[Array, 'sequences length vocabulary'], Cache]:
    """Returns the logits of tokens that follow those in the cache, and the cache with them.

    The cache must have room for them: its length is known when the program runs only, and places
    past its capacity would overwrite the last ones.
    """
    hidden, memory = self._run(tokens, cache.length, cache.memory)
    return self.logits(hidden), Cache(memory, cache.length + tokens.shape[1])

  @nn.nowrap
  def empty_cache(self, sequences: int, capacity: int) -> Cache:
    """Returns a cache that has read nothing and holds up to `capacity` tokens a sequence.

    Raises:
      ValueError: the capacity is above `positions`.
    """
    if not 0 < capacity <= self.positions:
      raise ValueError(f'capacity: found {capacity}, expected 1 to {self.positions} tokens')
    shape = (self.depth, sequences, capacity, self.key_heads, self.head_features)
    # two arrays: a step that is given its cache to keep must not be given one array twice
    return Cache(Memory(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)), jnp.int32(0))

  def _run(self, tokens: Array, start: Array, memory: Memory | None) -> tuple[Array, Any]:
    attention.check_tokens(tokens, self.positions)
    places = start + jnp.arange(tokens.shape[1])
    x, context = self.placed(self.embed(tokens), places)
    x, memory = self.layers(x, memory, (start, context))
    return self.norm(x), memory


def attended(
  query: Array,
  key: Array,
  value: Array,
  memory: Memory | None,
  start: Array,
  window: int | None,
) -> tuple[Array, Memory | None]:
  """Returns the attention of a layer to its tokens and those in its memory, and the new memory."""
  if memory is not None:
    memory = memory.extended(key, value, start)
    key, value = (x.astype(query.dtype) for x in memory)
  return attention.attend(query, key, value, start, window), memory


def heads_of(x: Array, heads: int) -> Array:
  """Returns outputs of a projection by head: [sequences, length, heads, features].

  >>> heads_of(jnp.zeros((2, 3, 8)), 4).shape
  (2, 3, 4, 2)
  """
  return x.reshape(*x.shape[:2], heads, -1)
