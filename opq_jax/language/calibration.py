"""The tokens that a language model is calibrated on: of a text, written by itself, or random."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from opq_jax.core.trees import PyTree
from opq_jax.models import Decoder
from opq_jax.models.generation import generate

TEXT, SELF, RANDOM = 'text', 'self', 'random'

WINDOW = 256
"""Tokens of a sequence: attention costs the square, and activations of a block are its multiple."""

SENTENCE = 64
"""Tokens of a sequence for an encoder of sentences, those that frame it counted."""

_SEED = 20210202  # of all draws: the same model has the same calibration tokens
_AT_ONCE = 16  # sequences written together


class Calibration(NamedTuple):
  """Calibration tokens.

  Attributes:
    source: `text`, `self` or `random`.
    tokens: sequences of one length.
  """

  source: str
  tokens: Int[np.ndarray, 'sequences length']

  @property
  def digest(self) -> str:
    """SHA-256 of the tokens, as int32."""
    return hashlib.sha256(np.ascontiguousarray(self.tokens, np.int32).tobytes()).hexdigest()


def of_text(sequences: Sequence[Sequence[int]], count: int, window: int = WINDOW) -> Calibration:
  """Returns windows of texts, spread evenly over them.

  Args:
    sequences: the tokens of each text.
    count: how many tokens to use, at most.
    window: tokens of a sequence; the rest of a text behind its last whole window is not used.

  Raises:
    ValueError: no text has as many tokens as a window.

  >>> of_text([range(100)], count=20, window=10).tokens[:, 0].tolist()
  [0, 90]
  """
  windows = [
    np.asarray(sequence[begin : begin + window], np.int32)
    for sequence in sequences
    for begin in range(0, len(sequence) - window + 1, window)
  ]
  if not windows:
    longest = max(map(len, sequences), default=0)
    raise ValueError(f'found texts of at most {longest} tokens, expected {window} or more')
  places = np.linspace(0, len(windows) - 1, min(max(count // window, 1), len(windows)))
  return Calibration(TEXT, np.stack([windows[round(place)] for place in places]))


def framed(calibration: Calibration, first: int, last: int) -> Calibration:
  """Returns sequences with a token in front of each and one behind it, as encoders read them.

  >>> framed(of_text([range(8)], count=8, window=4), 101, 102).tokens.tolist()
  [[101, 0, 1, 2, 3, 102], [101, 4, 5, 6, 7, 102]]
  """
  ends = ((0, 0), (1, 1))
  tokens = np.pad(calibration.tokens, ends, constant_values=((0, 0), (first, last)))
  return calibration._replace(tokens=tokens)


def at_random(vocabulary: int, count: int, window: int) -> Calibration:
  """Returns tokens drawn evenly from a vocabulary; the same ones every time.

  >>> at_random(50, count=64, window=16).tokens.shape
  (4, 16)
  """
  rng = np.random.default_rng(_SEED)
  shape = max(count // window, 1), window
  return Calibration(RANDOM, rng.integers(0, vocabulary, shape, np.int32))


def written_by(
  model: Decoder,
  variables: PyTree,
  first: int,
  count: int,
  window: int = WINDOW,
  told: Callable[[float], Any] = lambda share: None,
) -> Calibration:
  """Returns text that a model writes itself from a token on: drawn from its own answers.

  Args:
    model, variables: the language model.
    first: the token that every sequence begins with: that of the begin of a text.
    count: how many tokens to write.
    window: tokens of a sequence.
    told: called with the share that is done.
  """
  window = min(window, model.positions)
  total = max(count // window, 1)
  sequences: list[np.ndarray] = []
  for begin in range(0, total, _AT_ONCE):
    prompt = np.full((min(_AT_ONCE, total - begin), 1), first, np.int32)
    key = jax.random.fold_in(jax.random.key(_SEED), begin)
    written = [prompt[:, 0]]
    for place, tokens in enumerate(
      generate(model, variables, jnp.asarray(prompt), window - 1, key), start=1
    ):
      written.append(tokens)
      told((begin + len(prompt) * place / window) / total)
    sequences.append(np.stack(written, axis=1))
  return Calibration(SELF, np.concatenate(sequences).astype(np.int32))
