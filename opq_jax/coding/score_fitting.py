"""Fits the scores of `opq_jax.coding.contexts` to a kernel: a mean magnitude for every weight."""

import math

import numpy as np
from jaxtyping import Float, Float32, Int8

from opq_jax.coding import neighbours
from opq_jax.coding.coded_kernels import Block, CodedKernel
from opq_jax.coding.contexts import SCORES_PER_OCTAVE, Scores

_MAX_SCORE = 40
"""2**(40 / 3), some 10,000 times the mean magnitude or as many times less."""

_SWEEPS = 2
"""Rounds in which three factors are fitted in turn."""

_PRIOR = 8.0
"""Added to observed and expected sums of |code|: a few codes make no score."""


def fitted_scores(
  coded: CodedKernel, *, has_inputs: bool, has_outputs: bool, has_window: bool
) -> Scores:
  """Fits scores: |code| is expected to be mean x factor of input x of output x of activity.

  Each factor in turn is set such that the expected sums of |code| over every input (output,
  activity) are the observed ones, which is iterative proportional fitting.

  Args:
    coded: the kernel.
    has_inputs, has_outputs, has_window: which factors are fitted; the others stay 1.
  """
  _, inputs, outputs = coded.shape
  of_activity, of_input, of_output = (
    np.ones(n, np.float32) for n in (neighbours.ACTIVITIES, inputs, outputs)
  )
  magnitudes, blocks = coded.magnitudes, coded.blocks
  mean = sum(float(magnitudes[b.symbols].sum()) for b in blocks) / math.prod(coded.shape)
  # two factors alone are fitted in one sweep, for the sums of one are those of the other
  for _ in range(_SWEEPS if has_window else 1):
    if has_window:
      # the prior on both sides pulls a factor towards 1 and keeps it positive, for the logarithm;
      # where all codes are 0 every factor stays 1
      observed, expected = np.full((2, neighbours.ACTIVITIES), _PRIOR)
      for b in blocks:
        if b.activities is not None:
          activity = b.activities.reshape(-1)
          product = (mean * of_input[b.rows, None]) * of_output * of_activity[b.activities]
          observed += np.bincount(
            activity, magnitudes[b.symbols].reshape(-1), neighbours.ACTIVITIES
          )
          expected += np.bincount(activity, product.reshape(-1), neighbours.ACTIVITIES)
      of_activity *= (observed / expected).astype(np.float32)
    if has_inputs:
      observed, expected = np.full((2, inputs), _PRIOR)
      for b in blocks:
        factor = _factors(of_activity, b)
        observed[b.rows] += magnitudes[b.symbols].sum(1)
        expected[b.rows] += (mean * of_input[b.rows]) * (of_output * factor).sum(-1)
      of_input *= (observed / expected).astype(np.float32)
    if has_outputs:
      observed, expected = np.full((2, outputs), _PRIOR)
      for b in blocks:
        factor = _factors(of_activity, b)
        observed += magnitudes[b.symbols].sum(0)
        expected += (mean * of_output) * (of_input[b.rows, None] * factor).sum(0)
      of_output *= (observed / expected).astype(np.float32)
  return Scores(*map(_rounded, (of_input, of_output, of_activity)))


def _factors(
  of_activity: Float32[np.ndarray, ' activities'], block: Block
) -> Float32[np.ndarray, 'rows outputs']:
  """The factor of every weight of a block by its activity; [1, 1] where there are none."""
  if block.activities is None:
    return of_activity[np.zeros((1, 1), int)]
  return of_activity[block.activities]


def _rounded(factor: Float[np.ndarray, ' k']) -> Int8[np.ndarray, ' k']:
  """The score of every factor."""
  score = np.rint(SCORES_PER_OCTAVE * np.log2(factor))
  return np.clip(score, -_MAX_SCORE, _MAX_SCORE).astype(np.int8)
