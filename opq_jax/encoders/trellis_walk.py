"""The walk along a leaf: Viterbi's algorithm over its weights in the order in which they are coded.

A leaf is walked twice.  The first walk prices every index alike.  Its codes say what the context
coder will charge each weight (`opq_jax.coding.context_search`), and the second walk pays these
prices.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int8

from opq_jax.coding import arrangements, context_search, viterbi
from opq_jax.core.limits import ESCAPE
from opq_jax.encoders.factors import Factor
from opq_jax.encoders.host_feedback import RowFeedback
from opq_jax.encoders.trellis_grids import Fit, is_beyond

# weights of one search without feedback: bounds its memory, 36 bytes a weight
_SEARCH = 1 << 16
# weights of one search, at least, between which errors are pushed on: searches that are shorter
# begin more often, and longer ones push errors on too late
_SEARCH_WITH_FEEDBACK = 128
# look-ahead, in weights at least, of a search beyond the codes that it commits to; five times the
# register's five bits is the usual rule, and rows are often longer than this
_LOOK_AHEAD = 256
# bound of an input's worth over the geometric mean, either way: moments are estimates
_MAX_WORTH = 8.0


class Walk:
  """Chooses the codes of one leaf.

  Args:
    weights: of the leaf.
    fit: grid, slope, and the prices of the first walk.
    arrangement: the order of the codes (`opq_jax.coding.arrangements`); with feedback 0 or 2, which
      are the order of the weights.
    usable: the magnitudes of codes that may be chosen.
    values: the value of every code; a negative code counts from the end.
  """

  def __init__(
    self,
    weights: Float32[np.ndarray, '...'],
    fit: Fit,
    arrangement: int,
    usable: Bool[np.ndarray, '128'],
    values: Float32[np.ndarray, '256'],
  ):
    self._fit, self._arrangement = fit, arrangement
    self._usable, self._values = usable, values
    self._codes = np.empty(weights.shape, np.int8)
    view, self._window = arrangements.arranged(weights, arrangement)
    self._shape = view.shape
    self._rows = np.ascontiguousarray(view).reshape(-1, view.shape[-1])
    self._is_escaped = is_beyond(self._rows, fit.grid)
    self._has_escapes = bool(self._is_escaped.any())
    self._chosen = np.zeros(view.shape, np.int8)
    self._indices = np.zeros(view.shape, np.int8)

  def codes(self, factor: Factor | None, limit: float) -> Int8[np.ndarray, '...']:
    """Returns the codes of both walks, with the axes of the leaf.

    Args:
      factor: of the moments, by which the second walk pushes errors on; None without.
      limit: the largest error that is pushed on.
    """
    self._walk_without_contexts()
    self._walk(factor, limit)
    codes = self._in_place()
    if self._has_escapes:
      arranged, _ = arrangements.arranged(codes, self._arrangement)
      arranged[self._is_escaped.reshape(self._shape)] = ESCAPE
    return codes

  def _walk(self, factor: Factor | None, limit: float) -> None:
    taps, inputs, outputs = self._shape
    prices = context_search.prices(self._in_place(), self._arrangement)
    slopes = np.broadcast_to(np.float32(self._fit.slope), self._rows.shape)
    feedback, search = None, _SEARCH
    if factor is not None:
      # an error of input i costs h_i: the search divides by it and prices bits at slope / h_i
      # instead
      slopes = slopes * np.repeat(_worth(factor).T, outputs // len(factor), 1)
      # a copy, since feedback changes the weights to come in place
      self._rows = self._rows.copy()
      feedback = RowFeedback(self._rows, self._is_escaped, factor, self._values, limit)
      search = _SEARCH_WITH_FEEDBACK
    # whole rows: all outputs of an input are coded before its errors are pushed on
    rows_at_once, rows_ahead = -(-search // outputs), -(-_LOOK_AHEAD // outputs)
    state = 0
    for tap in range(taps):
      # contexts of a tap are known once the taps before it have codes
      ranges, is_turned = prices.of_tap(self._indices, self._window, tap)
      first_row, start = tap * inputs, 0
      while start < inputs:
        stop = min(start + rows_at_once, inputs)
        if feedback is not None:
          stop = min(stop, feedback.end_of_block(first_row + start) - first_row)
        # the look-ahead ends with the tap: what codes of the next one cost is not known yet
        rows = slice(first_row + start, first_row + min(stop + rows_ahead, inputs))
        in_tap = slice(start, rows.stop - first_row)
        # a view, which the search fills
        chosen = self._chosen[tap, start:stop]
        state = viterbi.search(
          self._weights_to_code(rows),
          slopes[rows].reshape(-1),
          ranges[in_tap].reshape(-1),
          is_turned[in_tap].reshape(-1),
          prices.bits,
          self._usable,
          *self._fit.grid,
          state,
          chosen.reshape(-1),
        )
        self._indices[tap, start:stop] = np.sign(chosen) * ((np.abs(chosen) + 1) >> 1)
        if feedback is not None:
          feedback.push(rows.start, chosen)
        start = stop

  def _walk_without_contexts(self) -> None:
    weights, codes = self._weights_to_code(slice(None)), self._chosen.reshape(-1)
    state = 0
    for start in range(0, weights.size, _SEARCH):
      stop = start + _SEARCH
      seen = weights[start : stop + _LOOK_AHEAD]
      state = viterbi.search(
        seen,
        np.full(seen.size, self._fit.slope, np.float32),
        np.zeros(seen.size, np.uint8),
        np.zeros(seen.size, bool),
        self._fit.bits,
        self._usable,
        *self._fit.grid,
        state,
        codes[start:stop],
      )

  def _weights_to_code(self, rows: slice) -> Float32[np.ndarray, ' n']:
    """Returns the weights of some rows, NaN where they escape."""
    weights = self._rows[rows]
    if self._has_escapes:
      weights = np.where(self._is_escaped[rows], np.float32(np.nan), weights)
    return weights.reshape(-1)

  def _in_place(self) -> Int8[np.ndarray, '...']:
    """Returns the codes with the axes of the leaf."""
    view, _ = arrangements.arranged(self._codes, self._arrangement)
    view[...] = self._chosen
    return self._codes


def _worth(factor: Factor) -> Float32[np.ndarray, 'groups K']:
  """Returns U_ii^2 of each input over the geometric mean: how cheap its errors are."""
  # in logarithms, since a product of thousands of U_ii leaves the range of floats
  logarithm = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2))
  relative = np.exp(logarithm - logarithm.mean())
  return np.clip(relative, 1 / _MAX_WORTH, _MAX_WORTH).astype(np.float32)
