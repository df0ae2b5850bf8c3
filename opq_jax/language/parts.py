"""The parts of a network that reads tokens, each called with its own parameters alone.

A decoder and an encoder of sentences are the same to what runs block after block: a start, which
gives hidden states, blocks, each of which reads those of the block before it, and a head.  A part
is equal, and so one compiled program, for all networks of one configuration.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from opq_jax import models
from opq_jax.core.trees import PyTree
from opq_jax.models import bert

Network = models.Decoder | models.SentenceEncoder
"""A network whose blocks are run one by one."""


@dataclasses.dataclass(frozen=True)
class Block:
  """One layer: block(params, hidden states, context) -> hidden states."""

  model: Network

  def __call__(
    self, params: PyTree, x: Float[Array, 'sequences length features'], context: Any
  ) -> Float[Array, 'sequences length features']:
    """Returns the hidden states that the next layer reads."""
    model = self.model
    if isinstance(model, models.SentenceEncoder):
      block = bert.EncoderBlock(model.hidden, model.heads, model.epsilon, model.dtype)
      return jnp.asarray(block.apply({'params': params}, x))
    kind, attributes = model.block()
    return kind(**attributes).apply({'params': params}, x, None, context)[0]


@dataclasses.dataclass(frozen=True)
class Head:
  """What follows the last layer: head(params, hidden states) -> logits, or embeddings."""

  model: Network

  def __call__(self, params: PyTree, x: Float[Array, 'sequences length features']) -> Array:
    """Returns the logits of the token after each token; of an encoder, an embedding a sentence."""
    if isinstance(self.model, models.SentenceEncoder):
      return bert.embeddings(x, jnp.ones(x.shape[:2], bool))
    logits: Any = self.model.apply(
      {'params': params}, x, method=lambda module, x: module.logits(module.norm(x))
    )
    return logits

  def score(
    self, params: PyTree, x: Float[Array, 'length features'], key: PRNGKeyArray
  ) -> Float32[Array, '']:
    """Returns a random function of one sequence's answer, for what errors cost the answer.

    The mean square of its gradient is twice the cost of a squared error: in Kullback-Leibler
    divergence for log p(y), y drawn from the answers of a decoder, and in half the squared distance
    of embeddings for their product with a normal vector.
    """
    answer = self(params, x[None])[0]
    if isinstance(self.model, models.SentenceEncoder):
      return answer @ jax.random.normal(key, answer.shape)
    log_probs = jax.nn.log_softmax(answer)
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
    return jnp.sum(jnp.take_along_axis(log_probs, drawn[:, None], -1))


@dataclasses.dataclass(frozen=True)
class Start:
  """What precedes the first layer: start(params, tokens) -> hidden states and context."""

  model: Network

  def __call__(
    self, params: PyTree, tokens: Int[Array, 'sequences length']
  ) -> tuple[Float[Array, 'sequences length features'], Any]:
    """Returns what the first layer reads, and what every layer needs to know of the places.

    An encoder's layers need to know nothing: sequences have no padding.
    """
    if isinstance(self.model, models.SentenceEncoder):
      outer = self.model.clone(layers=0)
      return jnp.asarray(outer.apply({'params': params}, tokens, method='hidden_states')), None

    def start(module: Any, tokens: Array) -> tuple[Array, Any]:
      return module.placed(module.embed(tokens), jnp.arange(tokens.shape[1]))

    x, context = self.model.apply({'params': params}, tokens, method=start)
    return x, (jnp.int32(0), context)


applied = jax.jit(lambda function, *arguments: function(*arguments), static_argnums=0)
"""function(*arguments), compiled: once for all functions that are equal."""
