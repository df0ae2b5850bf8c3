"""What error feedback leaves of an error, against the errors of codes."""

import jax.numpy as jnp
import numpy as np
import pytest

from opq_jax import language
from opq_jax.core import trees
from opq_jax.language.feedback_gains import feedback_gains
from opq_jax.language.parts import Block, Start
from opq_jax.network import second_moments
from tests.helpers.language_models import network


def test_feedback_gains_from_eigenvalues():
  model, tensors = network('llama_biases')
  tokens = language.at_random(40, 640, 16).tokens
  stored = language.stored_network(model, tensors)
  found = feedback_gains(stored, tokens, damping=0.1)
  x, context = Start(stored.model)(stored.outer(), jnp.asarray(tokens))
  params = stored.layer(0)
  moments = second_moments(Block(stored.model), params, x, context)
  for path, own in zip(trees.named_leaves(params), trees.beside(params, moments), strict=True):
    name = stored.site(path, 0).name
    if own is None:
      assert name not in found
      continue
    matrix = np.asarray(own.matrix[0], np.float64)
    damped = matrix + 0.1 * matrix.trace() / len(matrix) * np.eye(len(matrix))
    # det H = prod 1 / U_ii^2, and the trace is the sum of the eigenvalues
    values = np.linalg.eigvalsh(damped)
    expected = np.sqrt(np.exp(np.log(values).mean()) / values.mean())
    assert found[name] == pytest.approx(expected, rel=1e-3)
    assert 0 < found[name] < 1
