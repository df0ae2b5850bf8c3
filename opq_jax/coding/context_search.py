"""The encoder of `opq_jax.coding.contexts`: chooses arrangement, scores and ranges.

Several plans are made for the codes of a kernel, with and without neighbours, with and without
scores of inputs and outputs, and the one of the fewest bits is written.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8, UInt8

from opq_jax.coding import ans, arrangements, frequencies, neighbours, trellis
from opq_jax.coding.coded_kernels import CodedKernel, coded_kernel
from opq_jax.coding.contexts import Head, Scores, grouped
from opq_jax.coding.score_fitting import fitted_scores
from opq_jax.coding.score_ranges import counts_by_score, partition

_SMALL = 1 << 16
"""Weights up to which all combinations of scores are tried."""


class _Plan(NamedTuple):
  """One way to code a kernel.

  Attributes:
    bits: that the payload has, about.
    coded: the kernel.
    scores: of inputs, outputs and activities.
    head: of the payload.
  """

  bits: float
  coded: CodedKernel
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
  # signs are flipped, and int8 has no 128: codes that hold -128 cannot have contexts
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
    # an index that did not occur may be chosen all the same: its frequency will not be 0 then.  The
    # rarest that can occur has 1 of 2**P and costs P bits; one that does not is priced a bit above
    row[:] = model.precision + 1
    occurs = model.frequencies > 0
    places = model.symbols[occurs].astype(int) + trellis.MAX_INDEX
    row[places] = model.precision - np.log2(model.frequencies[occurs])
  return Prices(plan, bits.reshape(-1, 2, bits.shape[1]))


def _with_codes(coder: ans.Coder, plan: _Plan) -> ans.Coder:
  """Puts all codes onto a coder, the last one first."""
  head, (_, blocks, occurring) = plan.head, plan.coded
  range_of = head.range_of()
  ranges_of = lambda block: range_of[plan.scores.of_block(block.rows, block.activities)]
  if not head.has_trellis:
    for block in reversed(blocks):
      order, ends = grouped(ranges_of(block), len(head.models))
      # a range at a time: constriction takes all symbols of one model in one call
      in_order = occurring[block.symbols.reshape(-1)[order]]
      parts = zip(head.models, [0, *ends[:-1]], ends, strict=True)
      for model, start, stop in reversed(list(parts)):
        model.encode(coder, in_order[start:stop])
    return coder
  from opq_jax.coding import sequential_ans  # loads numba

  # C order, not range by range: a decoder knows the subset of an index from all indices before it
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
  # their bits tell whether neighbours pay for the 21 scores of their activities
  for has_window in (True, False) if kernel.shape[0] > 1 else (False,):
    coded = coded_kernel(kernel, subsets, window, has_window)
    for has_inputs, has_outputs in itertools.product((True, False), repeat=2):
      # a plan walks the whole kernel: a large one with a window has both scores, or none
      if has_window and not is_small and has_inputs != has_outputs:
        continue
      scores = fitted_scores(
        coded, has_inputs=has_inputs, has_outputs=has_outputs, has_window=has_window
      )
      yield _plan(coded, scores, arrangement, has_window, subsets is not None)


def _plan(
  coded: CodedKernel, scores: Scores, arrangement: int, has_window: bool, has_trellis: bool
) -> _Plan:
  """Returns the plan of given scores: their ranges, and the bits of all."""
  occurring_scores, counts = counts_by_score(coded, scores)
  bits, first = partition(counts)
  for part in scores:
    if part.any():
      histogram = frequencies.histogram(part)
      bits += float(frequencies.ideal_bits(histogram)) + len(
        frequencies.write_table(frequencies.fit(histogram))
      )
  # a table of activities is what tells a decoder that there are neighbours: with a window it is
  # stored even where all its scores are 0
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
