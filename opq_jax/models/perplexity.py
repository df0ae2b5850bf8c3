"""How well a language model predicts a text, and how far its answers are from another model's."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from opq_jax.core.trees import PyTree
from opq_jax.models.attention import check_vocabulary
from opq_jax.models.decoder import Decoder
from opq_jax.report import text_windows
from opq_jax.report.text_windows import Mean, Window

_BATCH = 2048  # tokens that a step reads: enough for a matrix product to be efficient
_CHUNK = 256  # tokens whose logits are in memory at once: 50 MB for a vocabulary of 50,000


class Scores(NamedTuple):
  """What a model says of tokens 1, 2, ... of a sequence, given the tokens before each.

  Attributes:
    loss: -log p(token), in nats.
    divergence: KL(other || model) of the distributions over the vocabulary, in nats; 0 without
      another model.
    agrees: whether both models find the same token the likeliest.
  """

  loss: Float[Array, 'sequences length-1']
  divergence: Float[Array, 'sequences length-1']
  agrees: Bool[Array, 'sequences length-1']


class Evaluation(NamedTuple):
  """A model on a text.

  Attributes:
    tokens: predictions that count.
    windows: windows that they are in, over which the intervals are.
    loss: mean of -log p(token), in nats a token.
    divergence: mean of KL(other || model), in nats a token; None without another model.
    agreement: share of tokens for which both find the same token the likeliest.
  """

  tokens: int
  windows: int
  loss: Mean
  divergence: Mean | None
  agreement: float | None

  @property
  def perplexity(self) -> Mean:
    """exp of the loss, and of the ends of its interval."""
    return Mean(*(math.exp(min(value, 700.0)) for value in self.loss))


def evaluate(
  model: Decoder,
  variables: PyTree,
  sequences: Sequence[Sequence[int]],
  *,
  window: int = 512,
  stride: int | None = None,
  against: tuple[Decoder, PyTree] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
  """Returns perplexity on texts of any length, and the divergence from another model.

  Args:
    model, variables: the language model.
    sequences: the tokens of each text.  One of fewer than two tokens says nothing and is left out.
    window: tokens that the model reads at once.
    stride: tokens from the begin of a window to that of the next, by default a whole window.  A
      token is counted once, in the first window that it is in: a smaller stride gives more context.
    against: another model of the same vocabulary, and its variables: the float one, say.
    progress: called after every step with how many windows are done, and how many there are.

  Raises:
    ValueError: a token is not of the vocabulary, the vocabularies differ, a window is longer than
      the models' positions or the stride than the window, or there are no two tokens.

  >>> from opq_jax import models
  >>> model = models.GPT2(vocabulary=50, depth=1, features=8, hidden=16, heads=2, key_heads=2,
  ...                     head_features=4, positions=8, epsilon=1e-5)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8), int))
  >>> found = evaluate(model, variables, [range(20)], window=8, against=(model, variables))
  >>> found.tokens, found.windows, found.divergence.value, found.agreement
  (17, 3, 0.0, 1.0)
  """
  networks = [(model, variables), *([against] if against else [])]
  parts = _parts(sequences, window, window if stride is None else stride)
  _check([each for each, _ in networks], sequences, window)
  length = max(part.end - part.begin for _, part in parts)
  size = max(1, _BATCH // length)
  results: list[tuple[float, float, int, int]] = []
  for begin in range(0, len(parts), size):
    batch = parts[begin : begin + size]
    # of one shape, so that there is one program: a causal model does not see what follows
    tokens = np.zeros((min(size, len(parts)), length), np.int32)
    for row, (sequence, part) in zip(tokens, batch, strict=False):
      row[: part.end - part.begin] = sequence[part.begin : part.end]
    scores = jax.device_get(token_scores(*networks, tokens=jnp.asarray(tokens)))
    for number, (_, part) in enumerate(batch):
      place = number, slice(part.counted - part.begin - 1, part.end - part.begin - 1)
      loss, divergence, agrees = (np.asarray(x[place], np.float64) for x in scores)
      results.append((float(loss.sum()), float(divergence.sum()), int(agrees.sum()), agrees.size))
    if progress is not None:
      progress(len(results), len(parts))
  losses, divergences, agreed, counts = map(np.array, zip(*results, strict=True))
  return Evaluation(
    int(counts.sum()),
    len(parts),
    text_windows.mean_over_windows(losses, counts),
    text_windows.mean_over_windows(divergences, counts) if against else None,
    float(np.sum(agreed) / np.sum(counts)) if against else None,
  )


def token_scores(
  network: tuple[Decoder, PyTree],
  other: tuple[Decoder, PyTree] | None = None,
  *,
  tokens: Int[Array, 'sequences length'],
) -> Scores:
  """Returns what a model says of every token of sequences but their first ones.

  Args:
    network: the model and its variables.
    other: a model to compare its answers with, or None.
    tokens: the sequences.
  """
  networks = [network] if other is None else [network, other]
  return _token_scores(
    tuple(model for model, _ in networks), tuple(variables for _, variables in networks), tokens
  )


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(
  models: tuple[Decoder, ...], variables: tuple[PyTree, ...], tokens: Array
) -> Scores:
  places = tokens.shape[0], tokens.shape[1] - 1
  hidden = [
    _applied(model, tree, tokens, 'hidden_states')[:, :-1].reshape(-1, model.features)
    for model, tree in zip(models, variables, strict=True)
  ]
  targets = tokens[:, 1:].reshape(-1)

  def of_chunk(arguments: tuple[list[Array], Array]) -> Scores:
    states, target = arguments
    first, *others = (
      jax.nn.log_softmax(_applied(model, tree, state[None], 'logits')[0])
      for model, tree, state in zip(models, variables, states, strict=True)
    )
    other = others[0] if others else first
    return Scores(
      -jnp.take_along_axis(first, target[:, None], axis=1)[:, 0],
      jnp.sum(jnp.exp(other) * (other - first), axis=1),
      jnp.argmax(first, axis=1) == jnp.argmax(other, axis=1),
    )

  scores = jax.lax.map(of_chunk, _chunks((hidden, targets)))
  return Scores(*(x.reshape(-1)[: targets.size].reshape(places) for x in scores))


def _applied(model: Decoder, variables: PyTree, x: Array, method: str) -> Any:
  return model.apply(variables, x, method=method)


def _chunks(tree: PyTree) -> PyTree:
  """Returns arrays with their first axis padded and cut into chunks."""

  def cut(x: Array) -> Array:
    size = min(_CHUNK, x.shape[0])
    padding = [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])

  return jax.tree.map(cut, tree)


def _parts(
  sequences: Sequence[Sequence[int]], window: int, stride: int
) -> list[tuple[Sequence[int], Window]]:
  """Returns the windows of all sequences."""
  parts = [
    (sequence, part)
    for sequence in sequences
    if len(sequence) > 1
    for part in text_windows.windows(len(sequence), window, stride)
  ]
  if not parts:
    raise ValueError('found no text of 2 tokens or more, expected one')
  return parts


def _check(models: list[Decoder], sequences: Sequence[Sequence[int]], window: int) -> None:
  sizes = [model.vocabulary for model in models]
  if len(set(sizes)) > 1:
    raise ValueError(f'found vocabularies of {sizes[0]} and {sizes[1]} tokens, expected the same')
  for model in models:
    if window > model.positions:
      raise ValueError(f'window: found {window}, expected at most {model.positions} tokens')
  check_vocabulary(sequences, sizes[0])
