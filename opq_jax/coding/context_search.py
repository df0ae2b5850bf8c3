"""The encoder of `opq_jax.coding.contexts`: chooses arrangement, scores and ranges.

Several plans are made for the codes of a kernel, with and without neighbours, with and without
scores of inputs and outputs, and the one of the fewest bits is written.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int64, UInt8

from opq_jax.coding import ans, arrangements, frequencies, neighbours, trellis
from opq_jax.coding.contexts import (
  MAX_RANGES,
  SCORES_PER_OCTAVE,
  Head,
  Scores,
  grouped,
)

_MAX_SCORE = 40  # 2**(40 / 3), some 10,000 times the mean magnitude or as many times less
_SWEEPS = 2  # rounds in which three factors are fitted in turn
_PRIOR = 8.0  # added to observed and expected sums of |code|: a few codes make no score
_SMALL = 1 << 16  # weights up to which all combinations of scores are tried
# factors on the bits of tables: the next one, where more than `MAX_RANGES` ranges are left; with
# infinity there is one range
_TABLE_PRICES = (1, 2, 4, 8, 16, 32, math.inf)


class _Block(NamedTuple):
  """A block of a kernel as it is coded.

  Attributes:
    rows: its inputs.
    activities: of each weight, None where no weight has neighbours.
    symbols: of each weight, as places among the symbols that occur: counts of these are small.
    subsets: of each weight where codes follow the trellis.
  """

  rows: slice
  activities: UInt8[np.ndarray, 'rows outputs'] | None
  symbols: UInt8[np.ndarray, 'rows outputs']
  subsets: UInt8[np.ndarray, 'rows outputs'] | None


class _Coded(NamedTuple):
  """A kernel as it is coded, signs flipped.

  Attributes:
    shape: of the kernel.
    blocks: in the order of the payload.
    occurring: the symbols that occur.
  """

  shape: tuple[int, ...]
  blocks: list[_Block]
  occurring: Int8[np.ndarray, ' symbols']

  @property
  def magnitudes(self) -> Float32[np.ndarray, ' symbols']:
    """The magnitude of every symbol that occurs."""
    return np.abs(self.occurring.astype(np.float32))


class _Plan(NamedTuple):
  """One way to code a kernel.

  Attributes:
    bits: that the payload has, about.
    coded: the kernel.
    scores: of inputs, outputs and activities.
    head: of the payload.
  """

  bits: float
  coded: _Coded
  scores: Scores
  head: Head


class Prices(NamedTuple):
  """Bits of codes that are like those of a plan: an encoder chooses other codes by them.

  Attributes:
    plan: for codes that follow the trellis.
    bits: of each index + 64, in every range and subset.
  """

  plan: _Plan
  bits: Float32[np.ndarray, 'ranges 2 129']

  def of_tap(
    self, indices: arrangements.Kernel, window: tuple[int, ...], tap: int
  ) -> tuple[UInt8[np.ndarray, 'inputs outputs'], Bool[np.ndarray, 'inputs outputs']]:
    """Returns range and flip of every weight of a tap, from the indices of the taps before it."""
    rows, head = slice(0, indices.shape[1]), self.plan.head
    activities, is_flipped = neighbours.NOTHING
    if head.has_window:
      activities, is_flipped = neighbours.neighbourhood(indices, window, tap, rows)
    ranges = head.range_of()[self.plan.scores.of_block(rows, activities)]
    return ranges, np.zeros(ranges.shape, bool) if is_flipped is None else is_flipped


def encode(codes: Int8[np.ndarray, '...']) -> bytes | None:
  """Returns the payload of codes from -127 to 127; None where their shape has no arrangement."""
  choices = arrangements.choices(codes.shape)
  if not choices or codes.min() < -127:
    return None
  plan = _best_plan(codes, choices)
  head = plan.head.to_bytes()
  # an ANS gives back first what was put on it last
  coder = _with_codes(ans.begin(codes, head), plan)
  for model, part in reversed(list(zip(plan.head.score_models, plan.scores, strict=True))):
    if model is not None:
      model.encode(coder, part)
  return head + ans.end(coder)


def prices(codes: Int8[np.ndarray, '...'], arrangement: int) -> Prices:
  """Returns the prices in the shortest payload of codes that follow the trellis.

  Args:
    codes: of one leaf.
    arrangement: of its axes.
  """
  plan = _best_plan(codes, [arrangement])
  models = plan.head.models
  bits = np.empty((len(models), 2 * trellis.MAX_INDEX + 1), np.float32)
  for row, model in zip(bits, models, strict=True):
    # an index that did not occur may be chosen all the same: its frequency will not be 0 then
    row[:] = model.precision + 1
    occurs = model.frequencies > 0
    at = model.symbols[occurs].astype(int) + trellis.MAX_INDEX
    row[at] = model.precision - np.log2(model.frequencies[occurs])
  return Prices(plan, bits.reshape(-1, 2, bits.shape[1]))


def _with_codes(coder: ans.Coder, plan: _Plan) -> ans.Coder:
  """Puts all codes onto a coder, the last one first."""
  head, (_, blocks, occurring) = plan.head, plan.coded
  range_of = head.range_of()
  ranges_of = lambda block: range_of[plan.scores.of_block(block.rows, block.activities)]
  if not head.has_trellis:
    for block in reversed(blocks):
      order, ends = grouped(ranges_of(block), len(head.models))
      in_order = occurring[block.symbols.reshape(-1)[order]]
      parts = zip(head.models, [0, *ends[:-1]], ends, strict=True)
      for model, start, stop in reversed(list(parts)):
        model.encode(coder, in_order[start:stop])
    return coder
  from opq_jax.coding import sequential_ans  # loads numba

  models = [(2 * ranges_of(block) + block.subsets).reshape(-1) for block in blocks]
  symbols = [occurring[block.symbols].reshape(-1) for block in blocks]
  tables = sequential_ans.tables(head.models)
  words = sequential_ans.encode(
    ans.words(coder), np.concatenate(symbols), np.concatenate(models), tables
  )
  return ans.from_words(words)


def _best_plan(codes: Int8[np.ndarray, '...'], choices: list[int]) -> _Plan:
  plans = (plan for choice in choices for plan in _plans(codes, choice))
  return min(plans, key=lambda plan: plan.bits)


def _plans(codes: Int8[np.ndarray, '...'], arrangement: int) -> Iterator[_Plan]:
  """Yields plans with and without neighbours, with and without scores of inputs and outputs."""
  kernel, window = arrangements.arranged(codes, arrangement)
  along_trellis = trellis.indices_and_subsets(kernel)
  kernel, subsets = (kernel, None) if along_trellis is None else along_trellis
  is_small = kernel.size <= _SMALL
  for has_window in (True, False) if kernel.shape[0] > 1 else (False,):
    coded = _coded(kernel, subsets, window, has_window)
    for has_inputs, has_outputs in itertools.product((True, False), repeat=2):
      if has_window and not is_small and has_inputs != has_outputs:
        continue
      scores = _fitted(coded, has_inputs, has_outputs, has_window)
      yield _plan(coded, scores, arrangement, has_window, subsets is not None)


def _plan(
  coded: _Coded, scores: Scores, arrangement: int, has_window: bool, has_trellis: bool
) -> _Plan:
  """Returns the plan of given scores: their ranges, and the bits of all."""
  occurring_scores, counts = _counts_by_score(coded, scores)
  bits, first = _partition(counts)
  for part in scores:
    if part.any():
      histogram = frequencies.histogram(part)
      bits += float(frequencies.ideal_bits(histogram)) + len(
        frequencies.write_table(frequencies.fit(histogram))
      )
  is_stored = scores.inputs.any(), scores.outputs.any(), has_window
  head = Head(
    has_trellis,
    arrangement,
    [
      frequencies.fit(frequencies.histogram(part)) if stored else None
      for part, stored in zip(scores, is_stored, strict=True)
    ],
    occurring_scores[first[1:]].tolist(),
    [frequencies.fit(row) for row in np.add.reduceat(counts, first).reshape(-1, 256)],
  )
  return _Plan(bits, coded, scores, head)


def _coded(
  kernel: arrangements.Kernel,
  subsets: UInt8[np.ndarray, 'taps inputs outputs'] | None,
  window: tuple[int, ...],
  has_window: bool,
) -> _Coded:
  """Returns a kernel with its activities and flipped signs."""
  counts = frequencies.histogram(kernel)
  counts += counts[-np.arange(256)]  # a sign may be flipped
  occurring = np.flatnonzero(counts).astype(np.uint8)
  place = np.zeros(256, np.uint8)
  place[occurring] = np.arange(occurring.size)
  blocks = []
  for tap, rows in arrangements.blocks(kernel.shape):
    activities, is_flipped = neighbours.NOTHING
    if has_window:
      activities, is_flipped = neighbours.neighbourhood(kernel, window, tap, rows)
    symbols = place[neighbours.flipped(kernel[tap, rows], is_flipped).view(np.uint8)]
    block_subsets = None if subsets is None else subsets[tap, rows]
    blocks.append(_Block(rows, activities, symbols, block_subsets))
  return _Coded(kernel.shape, blocks, occurring.view(np.int8))


def _fitted(coded: _Coded, has_inputs: bool, has_outputs: bool, has_window: bool) -> Scores:
  """Fits scores: |code| is expected to be mean x factor of input x of output x of activity.

  Each factor in turn is set such that the expected sums of |code| over every input (output,
  activity) are the observed ones, which is iterative proportional fitting.
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
      observed, expected = np.full((2, neighbours.ACTIVITIES), _PRIOR)
      for b in blocks:
        if b.activities is not None:
          at = b.activities.reshape(-1)
          product = (mean * of_input[b.rows, None]) * of_output * of_activity[b.activities]
          observed += np.bincount(at, magnitudes[b.symbols].reshape(-1), neighbours.ACTIVITIES)
          expected += np.bincount(at, product.reshape(-1), neighbours.ACTIVITIES)
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
  of_activity: Float32[np.ndarray, ' activities'], block: _Block
) -> Float32[np.ndarray, 'rows outputs']:
  """The factor of every weight of a block by its activity; [1, 1] where there are none."""
  if block.activities is None:
    return of_activity[np.zeros((1, 1), int)]
  return of_activity[block.activities]


def _rounded(factor: Float[np.ndarray, ' k']) -> Int8[np.ndarray, ' k']:
  """The score of every factor."""
  score = np.rint(SCORES_PER_OCTAVE * np.log2(factor))
  return np.clip(score, -_MAX_SCORE, _MAX_SCORE).astype(np.int8)


def _counts_by_score(
  coded: _Coded, scores: Scores
) -> tuple[Int64[np.ndarray, ' k'], Int64[np.ndarray, 'k subsets 256']]:
  """The scores that occur, in order, and how often each symbol of each subset has each of them."""
  several = 1 if coded.blocks[0].subsets is None else 2
  symbols = coded.occurring.size
  least, largest = scores.bounds()
  by_score = np.zeros((largest - least + 1, several, symbols), np.int64)
  for b in coded.blocks:
    place = scores.of_block(b.rows, b.activities).astype(np.int64) - least
    if b.subsets is not None:
      place = 2 * place + b.subsets
    place = place * symbols + b.symbols
    by_score += np.bincount(place.reshape(-1), minlength=by_score.size).reshape(by_score.shape)
  occurring = np.flatnonzero(by_score.any((1, 2)))
  counts = np.zeros((occurring.size, several, 256), np.int64)
  counts[..., coded.occurring.view(np.uint8)] = by_score[occurring]
  return occurring + least, counts


def _partition(counts: Int64[np.ndarray, 'k subsets 256']) -> tuple[float, list[int]]:
  """Cuts the scores that occur into the ranges of the fewest bits, tables included.

  The shortest path from the first score to the last over all cuts, by dynamic programming in k**2
  steps.

  Returns:
    The bits, and the place at which each range begins.
  """
  occurring = counts[..., counts.any((0, 1))]
  sums = np.concatenate([np.zeros((1, *occurring.shape[1:])), np.cumsum(occurring, 0)])
  k = len(counts)
  for price in _TABLE_PRICES:
    best, cut = np.zeros(k + 1), np.zeros(k + 1, int)
    for stop in range(1, k + 1):
      start = np.arange(stop) if price < math.inf else np.zeros(1, int)
      parts = sums[stop] - sums[start]
      bits = frequencies.ideal_bits(parts) + min(price, 64) * _table_bits(parts)
      bits = best[start] + bits.sum(-1)
      cut[stop], best[stop] = start[np.argmin(bits)], bits.min()
    first, stop = [], k
    while stop:
      stop = int(cut[stop])
      first.append(stop)
    if len(first) <= MAX_RANGES:
      break
  return float(best[k]), first[::-1]


def _table_bits(counts: Float[np.ndarray, '... symbols']) -> Float[np.ndarray, '...']:
  """About the bits of `frequencies.write_table`, which would take too long for every cut."""
  total = counts.sum(-1, keepdims=True)
  precision = np.minimum(1 + 0.75 * np.log2(np.maximum(total, 1)), 16)
  frequency = counts * 2**precision / np.maximum(total, 1)
  return 10 + (np.log2(1 + frequency) + 1.5 * (counts > 0)).sum(-1)
