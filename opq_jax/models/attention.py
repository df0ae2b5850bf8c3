"""Building blocks of the networks that read tokens: causal attention, its memory, and rotations."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def check_tokens(tokens: Array, positions: int) -> None:
  """Raises a ValueError unless tokens are integers [sequences, length] of at most so many places.

  >>> check_tokens(jnp.zeros((2, 9), int), 8)
  Traceback (most recent call last):
  ValueError: tokens: found sequences of 9 tokens, expected at most 8
  """
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f'tokens: found {tokens.dtype} of shape {tokens.shape}, expected integers [sequences, length]'
    )
  if tokens.shape[1] > positions:
    raise ValueError(
      f'tokens: found sequences of {tokens.shape[1]} tokens, expected at most {positions}'
    )


def check_vocabulary(sequences: Iterable[Iterable[int]], vocabulary: int) -> None:
  """Raises a ValueError unless all tokens of sequences are of a vocabulary.

  >>> check_vocabulary([[3, 50]], 50)
  Traceback (most recent call last):
  ValueError: found token 50, expected 0 to 49
  """
  for sequence in sequences:
    wrong = next((token for token in sequence if not 0 <= token < vocabulary), None)
    if wrong is not None:
      raise ValueError(f'found token {wrong}, expected 0 to {vocabulary - 1}')


class Memory(NamedTuple):
  """Keys and values of the tokens that were read, for generation one token after the other.

  Attributes:
    key, value: [sequences, capacity, heads, features]; those of a whole network have an axis of
      layers in front.
  """

  key: Array
  value: Array

  def extended(self, key: Array, value: Array, start: Int[Array, '']) -> 'Memory':
    """Returns the memory with the keys and values of tokens at the places from `start` on."""
    place = (0, start, 0, 0)
    return Memory(
      lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), place),
      lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), place),
    )


def attend(
  query: Float[Array, 'sequences length heads features'],
  key: Float[Array, 'sequences places key_heads features'],
  value: Float[Array, 'sequences places key_heads features'],
  start: Int[Array, ''],
  window: int | None = None,
) -> Float[Array, 'sequences length outputs']:
  """Computes causal attention, softmax(q k' / sqrt(features)) v, with the heads side by side.

  Query i is at place start + i and sees the keys at places start + i - window + 1 to start + i.
  With fewer heads of keys than of queries, consecutive query heads share one (grouped queries).

  Args:
    query: of tokens at the places from `start` on.
    key, value: of tokens at the places from 0 on.
    start: the place of the first query.
    window: how many places a query sees, its own counted; None for all before it.
  """
  at = start + jnp.arange(query.shape[1])[:, None]
  places = jnp.arange(key.shape[1])[None]
  is_seen = places <= at
  if window is not None:
    is_seen &= places > at - window
  attended = jax.nn.dot_product_attention(query, key, value, mask=is_seen[None, None])
  return attended.reshape(*query.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Rotary positions: feature pair i of a head is turned by place times theta ** (-2 i / features).

  Su et al., "RoFormer", 2021, arXiv 2104.09864.  `kind` stretches the angles for contexts longer
  than those of training:

    default   not at all
    linear    all frequencies over `factor` (Chen et al., 2023, arXiv 2306.15595)
    llama3    frequencies of more than `high` turns in the original context stay, those of fewer
              than `low` turns are divided by `factor`, and those between are a mean of both,
              weighted linearly in their turns (Llama 3.1)

  Attributes:
    theta: base of the frequencies.
    kind: as above.
    factor: stretch of the context.
    low, high: in turns, of 'llama3'.
    original: length of the original context in tokens, of 'llama3'.
  """

  theta: float = 10000.0
  kind: Literal['default', 'linear', 'llama3'] = 'default'
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def frequencies(self, features: int) -> Float[np.ndarray, ' pairs']:
    """Returns the angle in radians by which one place turns each pair of a head's features.

    >>> Rotation(theta=100.0).frequencies(4).tolist()
    [1.0, 0.10000000149011612]
    """
    frequency = self.theta ** (-np.arange(0, features, 2) / features)
    if self.kind == 'llama3':
      turns = self.original * frequency / (2 * math.pi)
      # a step where both are the same
      span = max(self.high - self.low, math.ulp(self.high))
      kept = np.clip((turns - self.low) / span, 0, 1)
      frequency = kept * frequency + (1 - kept) * frequency / self.factor
    elif self.kind == 'linear':
      frequency = frequency / self.factor
    return frequency.astype(np.float32)

  def angles(self, places: Int[Array, ' length'], features: int) -> 'Angles':
    """Returns cosines and sines for tokens at these places, [length, 1, pairs]."""
    frequencies = jnp.asarray(self.frequencies(features))[None, None]
    angle = places[:, None, None].astype(jnp.float32) * frequencies
    return Angles(jnp.cos(angle), jnp.sin(angle))


class Angles(NamedTuple):
  """Cosines and sines of a rotation, [length, 1, pairs]."""

  cos: Array
  sin: Array

  def turn(
    self, x: Float[Array, 'sequences length heads features']
  ) -> Float[Array, 'sequences length heads features']:
    """Turns queries or keys; a pair is a feature of the first half and one of the second."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = self.cos[None], self.sin[None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
