"""The core of WaterSIC: GPTQ's walk with a step for every input, and entropy-coded codes.

arXiv 2603.04956.  Rounding input q leaves the error e_q^2 / [H_F^-1]_qq = (e_q / U_qq)^2 in a row's
output (`gptq`), so steps in proportion to U_qq share the error evenly among the inputs: Delta U_qq.
Codes are integers without limits, and each column is read as gamma_q step_q times its codes, with
the factor of least squares.

The step Delta of a matrix is searched for, such that it has the bits that are asked for.  Counted
are the zeroth-order entropies of all columns, as a perfect coder that knows their frequencies would
need, and 16 bits each for gamma_q step_q.  This is generous; on the other hand the paper's
corrections of drift and of the residual stream are left out, and all matrices have the same bits.
"""

import numpy as np
from jaxtyping import Float, Int

from experiments.benchmarks.language_models import gptq
from experiments.benchmarks.language_models.coded import Matrix

STEP_BITS = 16
_ROUNDS, _TOLERANCE = 12, 0.005  # of the search for a step; bits
_BLOCK = 128  # columns whose errors are pushed on together


def quantized(
  weights: Matrix, moments: Float[np.ndarray, 'inputs inputs'], bits: float
) -> tuple[np.ndarray, float]:
  """Returns a matrix with codes of some entropy, and its bits.

  Args:
    weights: [outputs, inputs].
    moments: H = E[x^T x] of its inputs.
    bits: a weight, with all that is counted.
  """
  factor = gptq.factored(moments, np.arange(len(moments)))
  diagonal = np.diag(factor)
  variance = np.mean(np.square(weights), axis=0, dtype=np.float64)
  # of Gaussian weights with small steps
  logarithms = 0.5 * np.log2(2 * np.pi * np.e * np.maximum(variance, 1e-30)) - np.log2(diagonal)
  low, high = -np.inf, np.inf
  step = 2.0 ** (np.mean(logarithms) - bits)
  for _ in range(_ROUNDS):
    decoded, codes = _walked(weights, factor, step * diagonal)
    found = entropy(codes) + STEP_BITS / len(weights)
    if abs(found - bits) < _TOLERANCE:
      break
    low, high = (np.log2(step), high) if found > bits else (low, np.log2(step))
    following = np.log2(step) + found - bits
    if not low < following < high:
      following = (low + high) / 2
    step = 2.0**following
  return decoded.astype(np.float32), float(found * weights.size)


def entropy(codes: Int[np.ndarray, 'outputs inputs']) -> float:
  """Returns the mean zeroth-order entropy of columns, in bits.

  >>> entropy(np.array([[0, 1], [0, 2], [0, 3], [0, 4]]))
  1.0
  """
  outputs, inputs = codes.shape
  lowest = codes.min()
  width = int(codes.max() - lowest) + 1
  places = (codes - lowest) + width * np.arange(inputs)
  counts = np.bincount(places.ravel().astype(np.int64), minlength=width * inputs)
  shares = counts[counts > 0] / outputs
  return float(-np.sum(shares * np.log2(shares)) / inputs)


def _walked(
  weights: Matrix, factor: Float[np.ndarray, 'inputs inputs'], steps: Float[np.ndarray, ' inputs']
) -> tuple[np.ndarray, np.ndarray]:
  """Returns decoded weights and codes."""
  left = weights.astype(np.float64)
  decoded, codes = np.zeros_like(left), np.zeros(left.shape, np.int64)
  inputs = left.shape[1]
  for begin in range(0, inputs, _BLOCK):
    end = min(begin + _BLOCK, inputs)
    errors = np.empty((len(left), end - begin))
    for column in range(begin, end):
      own = left[:, column]
      code = np.round(own / steps[column])
      energy = code @ code
      decoded[:, column] = (code @ own / energy if energy else 0.0) * code
      codes[:, column] = code
      error = (own - decoded[:, column]) / factor[column, column]
      left[:, column:end] -= np.outer(error, factor[column, column:end])
      errors[:, column - begin] = error
    left[:, end:] -= errors @ factor[begin:end, end:]
  return decoded, codes
