"""How much of a leaf's output error is left once error feedback has pushed errors on."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from opq_jax.core import trees
from opq_jax.encoders.factors import factor_of
from opq_jax.language.network import StoredNetwork
from opq_jax.language.parts import Block, Start, applied
from opq_jax.network import InputMoments, second_moments

TOKENS = 2048
"""Calibration tokens that moments are from: a bound of the time that they take."""


def feedback_gains(
  network: StoredNetwork,
  tokens: Integer[np.ndarray, 'sequences length'],
  damping: float,
  told: Callable[[float], Any] = lambda share: None,
) -> dict[str, float]:
  r"""Returns the output error under feedback over that of rounding, of every tensor of a layer.

  Rounding errors of equal energy d in all weights give a layer's output the error d tr H.  With
  H^-1 = U^T U, feedback leaves d sum_i 1 / U_ii^2 (each error counts only with what the inputs to
  come cannot compensate), and so the ratio is

      K / (U_ii^2 tr H), by the geometric mean over i

  since an encoder of equal bits makes large errors where they cost little.  Of pruned weights and
  of inputs that earlier errors have changed less is made good: returned is the root of the ratio,
  half-way between rounding and all of it.

  Args:
    network: the language model.
    tokens: calibration tokens.
    damping: of the moments.
    told: called with the share that is done.

  Returns:
    Roots of ratios by the names of the tensors, 0 to 1; tensors without moments are missing.
  """
  block = Block(network.model)
  x, context = Start(network.model)(network.outer(), jnp.asarray(tokens))
  gains: dict[str, float] = {}
  for number in range(network.depth):
    params = network.layer(number)
    moments = second_moments(block, params, x, context)
    known: dict[int, float] = {}
    for path, found in zip(trees.named_leaves(params), trees.beside(params, moments), strict=True):
      if isinstance(found, InputMoments):
        # leaves that read the same rows share a matrix
        key = id(found.matrix)
        if key not in known:
          known[key] = _gain(np.asarray(found.matrix), damping)
        gains[network.site(path, number).name] = known[key]
    x = jax.block_until_ready(applied(block, params, x, context))
    told((number + 1) / network.depth)
  return gains


def _gain(matrix: np.ndarray, damping: float) -> float:
  """Returns the root of the ratio of one matrix of moments."""
  # of moments over their mean energy, damped
  factor = np.diagonal(factor_of(matrix.astype(np.float32), damping), axis1=1, axis2=2)
  return float(np.exp(-np.mean(np.log(factor.astype(np.float64)))) / math.sqrt(1 + damping))
