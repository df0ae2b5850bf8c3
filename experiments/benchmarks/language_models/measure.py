"""A language model's answers beside those of its float weights: the one judge of all codecs.

    KL          KL(float || weights), nats a token, over the distributions of all tokens but the
                first of each window
    perplexity  of the same tokens
    agreement   share of them of which both find the same token the likeliest

Intervals of 95 % are over windows (`opq_jax.report.text_windows`).  The forward pass of the float
network is run once: its last hidden states are kept, and only its head is applied again.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarks.language_models import networks
from experiments.benchmarks.language_models.networks import Network
from opq_jax import models
from opq_jax.report import text_windows
from opq_jax.report.text_windows import Mean

BATCH = 2048  # tokens of a forward pass
CHUNK = 256  # tokens whose logits are in memory at once


class Scores(NamedTuple):
  """What `Judge.scores` measures; means with the ends of their intervals.

  Attributes:
    divergence: KL(float || weights), nats a token.
    loss: -log p(token), nats a token.
    agreement: share of tokens with the same likeliest token.
  """

  divergence: Mean
  loss: Mean
  agreement: float

  def row(self) -> dict[str, float]:
    """Returns the scores as columns of a row of results."""
    columns = dict(zip(('KL', 'KL low', 'KL high'), self.divergence, strict=True))
    names = 'perplexity', 'perplexity low', 'perplexity high'
    columns |= dict(zip(names, np.exp(self.loss).tolist(), strict=True))
    columns['agreement'] = self.agreement
    return {name: float(f'{value:.5g}') for name, value in columns.items()}


class Judge:
  """The answers of a float network on the tokens of measurement.

  Args:
    network: the network with its float weights.
  """

  def __init__(self, network: Network):
    self._model, self._params = network.model, network.params
    size = max(1, BATCH // network.measured.shape[1])
    count = -(-len(network.measured) // size) * size
    # the last batch is filled up, so that there is one program
    padded = np.resize(network.measured, (count, network.measured.shape[1]))
    self._batches = padded.reshape(-1, size, padded.shape[1])
    self._windows = len(network.measured)
    self._hidden = [np.asarray(_hidden(self._model, self._params, x)) for x in self._batches]
    table = networks.leaves(self._params)
    self._head = {path: leaf for path, leaf in table.items() if '/layers/' not in path}

  def scores(self, params: Mapping[str, Any]) -> Scores:
    """Returns what the network with these weights says of the tokens."""
    head = networks.replaced({}, self._head)
    params = jax.tree.map(jnp.asarray, params)
    parts = [
      jax.device_get(_token_scores(self._model, params, head, tokens, hidden))
      for tokens, hidden in zip(self._batches, self._hidden, strict=True)
    ]
    divergence, loss, agrees = (
      np.concatenate(part)[: self._windows].astype(np.float64) for part in zip(*parts, strict=True)
    )
    counts = [loss.shape[1]] * self._windows
    mean = lambda values: text_windows.mean_over_windows(values.sum(axis=1), counts)
    return Scores(mean(divergence), mean(loss), float(agrees.mean()))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: models.Decoder, params: Any, tokens: Array) -> Array:
  return model.apply(params, tokens, method='hidden_states')  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(
  model: models.Decoder, params: Any, float_head: Any, tokens: Array, float_hidden: Array
) -> tuple[Array, Array, Array]:
  """Returns divergence, loss and agreement, [windows, length - 1]."""
  shape = tokens.shape[0], tokens.shape[1] - 1
  hidden = _hidden(model, params, tokens)
  rows = [x[:, :-1].reshape(-1, x.shape[-1]) for x in (hidden, float_hidden)]
  rows.append(tokens[:, 1:].reshape(-1))
  chunk = min(CHUNK, rows[0].shape[0])
  padded = lambda x: jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))
  chunks = [padded(x).reshape(-1, chunk, *x.shape[1:]) for x in rows]

  def of_chunk(arguments: list[Array]) -> tuple[Array, Array, Array]:
    found, expected = (
      jax.nn.log_softmax(model.apply(tree, state[None], method='logits')[0])
      for tree, state in zip((params, float_head), arguments, strict=False)
    )
    return (
      jnp.sum(jnp.exp(expected) * (expected - found), axis=1),
      -jnp.take_along_axis(found, arguments[2][:, None], axis=1)[:, 0],
      jnp.argmax(found, axis=1) == jnp.argmax(expected, axis=1),
    )

  scores = jax.lax.map(of_chunk, chunks)
  return tuple(x.reshape(-1)[: shape[0] * shape[1]].reshape(shape) for x in scores)
