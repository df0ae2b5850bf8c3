"""Calibration tokens: of texts, random, and written by a model."""

import jax
import numpy as np
import pytest

from opq_jax import language
from opq_jax.importers import language_models
from tests.helpers.language_models import network


def test_of_text_takes_whole_windows_of_all_texts():
  found = language.of_text([range(25), range(100, 130)], count=1000, window=10)
  assert found.tokens.tolist() == [
    *(list(range(begin, begin + 10)) for begin in (0, 10, 100, 110, 120))
  ]
  few = language.of_text([range(1000)], count=30, window=10)
  assert few.tokens[:, 0].tolist() == [0, 500, 990]
  with pytest.raises(ValueError, match='texts of at most 9 tokens, expected 10 or more'):
    language.of_text([range(9), range(3)], count=10, window=10)


def test_written_text_is_what_the_model_expects():
  model, tensors = network('gpt2')
  variables = language_models.from_tensors(model, tensors).variables
  found = language.written_by(model, variables, first=3, count=640, window=32)
  again = language.written_by(model, variables, first=3, count=640, window=32)
  assert found.tokens.shape == (20, 32) and (found.tokens[:, 0] == 3).all()
  assert found.digest == again.digest

  def loss(tokens):
    log_probs = np.asarray(jax.nn.log_softmax(model.apply(variables, tokens)))
    return -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1).mean()

  # its entropy is less than what random tokens cost it
  assert loss(found.tokens) < loss(language.at_random(40, 640, 32).tokens) - 0.1
