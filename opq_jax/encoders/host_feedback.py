"""Error feedback on the host, for encoders that choose the codes of several rows together.

The update is that of `opq_jax.encoders.Feedback`, whose docstring derives it.  `Feedback` runs it
in XLA, with the inputs in the order of their energy.  Along a trellis, codes have the order of the
file, and each of them depends on the codes before it, so the update runs between the calls of a
search that is compiled by numba.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int8

from opq_jax.core import native
from opq_jax.encoders.factors import Factor

# inputs; errors are pushed on one by one within a block that stays in the processor's cache, and
# by one product of matrices to all inputs after it
_BLOCK = 64

Rows = Float32[np.ndarray, 'inputs outputs']


class RowFeedback:
  """Pushes the errors of coded rows on to the rows that are still to be coded.

  Args:
    rows: the weights, inputs by outputs; rows to be coded change in place.
    is_escaped: which weights keep their value, whatever is pushed on to them.
    factor: U of each group of outputs, from `opq_jax.encoders.factors.factor_of`.
    values: the value of every code; a negative code counts from the end.
    limit: the largest error that is pushed on; a larger one counts as so much.
  """

  def __init__(
    self,
    rows: Rows,
    is_escaped: Bool[np.ndarray, 'inputs outputs'],
    factor: Factor,
    values: Float32[np.ndarray, '256'],
    limit: float,
  ):
    self._rows, self._factor, self._is_escaped = rows, factor, is_escaped
    # an escaped weight has its original value, without the errors that were pushed on to it
    self._exact = rows.copy() if is_escaped.any() else rows
    self._values, self._limit = values, limit
    self._scaled_errors = np.zeros(rows.shape, np.float32)  # (w_i - q_i) / U_ii

  def end_of_block(self, begin: int) -> int:
    """Returns the end of the block that row `begin` is in: a `push` may not reach beyond it."""
    return min((begin // _BLOCK + 1) * _BLOCK, len(self._rows))

  def push(self, begin: int, codes: Int8[np.ndarray, 'inputs outputs']) -> None:
    """Pushes on the errors of the rows from `begin` on, which have these codes."""
    end, stop = self.end_of_block(begin), begin + len(codes)
    _push_within_block(
      self._rows,
      self._exact,
      self._is_escaped,
      codes,
      self._factor,
      self._scaled_errors,
      begin,
      end,
      self._values,
      self._limit,
    )
    # all errors of the block at once, where the last of its rows is coded
    if stop == end < len(self._rows):
      block = slice((begin // _BLOCK) * _BLOCK, end)
      groups, outputs = len(self._factor), self._rows.shape[1]
      errors = self._scaled_errors[block].reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
      push = np.matmul(self._factor[:, block, end:].transpose(0, 2, 1), errors)
      self._rows[end:] -= push.transpose(1, 0, 2).reshape(-1, outputs)


@native.compiled
def _push_within_block(  # type: ignore[no-untyped-def]
  rows, exact, is_escaped, codes, factor, scaled_errors, begin, end, values, limit
):
  """Pushes the errors of the coded rows on to the rows before `end`, and keeps them."""
  groups = factor.shape[0]
  channels = rows.shape[1] // groups
  for i in range(begin, begin + codes.shape[0]):
    for group in range(groups):
      scale = np.float32(1) / factor[group, i, i]
      for o in range(group * channels, (group + 1) * channels):
        value = exact[i, o] if is_escaped[i, o] else values[codes[i - begin, o]]
        error = rows[i, o] - value
        scaled_errors[i, o] = np.float32(min(max(error, -limit), limit)) * scale
      # row by row, so that the innermost loop runs along memory
      for j in range(i + 1, end):
        share = factor[group, i, j]
        for o in range(group * channels, (group + 1) * channels):
          rows[j, o] -= share * scaled_errors[i, o]
