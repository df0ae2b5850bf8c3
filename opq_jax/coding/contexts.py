"""Codes <-> bytes, each code with the frequencies of weights like it: fewer than the entropy.

The weights of one kernel are not alike.  Some inputs and some outputs have larger ones, and those
that lie side by side in a window have like size and like sign.  So codes come tap by tap, and what
has come says what to expect of a weight:

    score  =  score of its input  +  score of its output  +  score of its neighbours' level

in thirds of an octave of the expected |code|.  Ranges of the score have frequencies of their own.
All are stored, nothing adapts, so that thousands of codes of one range are decoded at once.

The neighbours of a weight are those of the same input and output at the taps before its own, in C
order, that are one step away along one axis of the window (their weight w is 6) or along two (1).
Where sum w c < 0 the sign of the code is turned.  With m = sum w |c| / sum w in twelfths of a level
of the codebook, rounded down, neighbours have the level

    0 where there are none,  else  1 + 2 #{edges <= m} + [2 |sum w c| >= sum w |c|]

Levels of the second kind, whose signs agree, have ranges of their own: 768 is added to the score,
and 384 to all, so that none is negative.

A payload is

    [bits, padded with zeros to whole bytes][words of an ANS, little-endian uint32]

    bits     the marker 0000100100 (no table of `opq_jax.coding.ans` begins so); the
             arrangement, two bits;
             for inputs, outputs and levels: whether they are scored, and the table of their scores;
             one less than the number of ranges, the score that each but the first begins with, and
             their tables
    words    the scores, then the codes, of as many inputs of a tap at a time as have at most 2**18
             weights, range by range

Codes that follow the trellis of `opq_jax.coding.trellis`, in the order of taps, inputs and
outputs, are coded as indices in their subsets.  All of the above holds for these, but that every
range has two tables, that of subset 0 and that of subset 1, and that the codes come one after the
other in the order of the trellis, each with the table of its range and subset
(`opq_jax.coding.sequential_ans`).  The marker of such a payload is 0001100100.

The arrangement says which axes are taps, inputs and outputs: 0 all but the last two are taps, as in
Flax; 1 all but the first two, as in PyTorch; 2 all but the last are inputs; 3 all but the first are
outputs.  A window has at most three axes and 1024 taps, and there are at most 2**18 outputs.

Contexts of neighbours are an old tool of image coders, and the coder of NNCodec (ISO/IEC 15938-17)
has some that adapt, and a trellis.  Turning signs by those of neighbouring taps, and scores that
add up and are stored instead of adapting, are ours.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int16, Int64, UInt8

from opq_jax.coding import ans, sequential_ans, trellis

MARKER = '0000' + ans.golomb(0, 2) + ans.golomb(0, 2)
TRELLIS_MARKER = '0001' + ans.golomb(0, 2) + ans.golomb(0, 2)

_BLOCK = 1 << 18
_MAX_TAPS = 1024  # of a window: each is a step of Python's, and no window has as many
_MAX_RANGES = 16
_MAX_BITS_BYTES = 1 << 15
_UNIT = 3  # scores an octave
_MOST_SCORE = 40
_EDGES = (1, 3, 6, 10, 16, 28, 48, 90, 160)  # twelfths of a level of the codebook
_KINDS = 2  # of neighbours: their signs differ, or mostly agree
_LEVELS = 1 + _KINDS * (len(_EDGES) + 1)
_SPAN = 768  # of one kind: more than the sum of three int8
_SWEEPS = 2
_PRIOR = 8.0  # to a sum of |code|, so that a few codes make no score
_FEW = 1 << 16  # weights with which the encoder tries more

# what a level adds to the score, that kinds of neighbours have ranges of their own
_KIND_OF_LEVEL = np.array([0] + [i % _KINDS for i in range(_LEVELS - 1)])
_BASE = (_SPAN // 2 + _SPAN * _KIND_OF_LEVEL).astype(np.int16)

Kernel = Int8[np.ndarray, 'taps inputs outputs']


class _Scores(NamedTuple):
  """Of each input, output and level; zeros where they are not scored."""

  inputs: Int8[np.ndarray, ' inputs']
  outputs: Int8[np.ndarray, ' outputs']
  levels: Int8[np.ndarray, ' levels']


class _Block(NamedTuple):
  """What the encoder knows of some inputs of a tap."""

  rows: slice
  levels: UInt8[np.ndarray, 'rows outputs'] | None
  symbols: UInt8[np.ndarray, 'rows outputs']  # the place of each among those that occur
  subsets: UInt8[np.ndarray, 'rows outputs'] | None  # where codes follow the trellis


class _Plan(NamedTuple):
  """One way to code a kernel.

  Attributes:
    bits: that it takes, about.
    arrangement, has_window: of the kernel, and whether neighbours are looked at.
    blocks, used: the codes, signs turned, as places among the symbols that occur.
    scores: of inputs, outputs and levels.
    starts, models: where each range but the first begins, and the frequencies of each, or of its
      subset 0 and then of its subset 1.
    has_trellis: whether codes are indices in subsets.
  """

  bits: float
  arrangement: int
  has_window: bool
  blocks: list[_Block]
  used: Int8[np.ndarray, ' symbols']
  scores: _Scores
  starts: list[int]
  models: list[ans.Frequencies]
  has_trellis: bool

  def score_models(self) -> list[ans.Frequencies | None]:
    """Of inputs, outputs and levels, None where they are not scored."""
    inputs, outputs, _ = self.scores
    is_scored = inputs.any(), outputs.any(), self.has_window
    return [
      ans.fit(ans.histogram(part)) if said else None
      for part, said in zip(self.scores, is_scored, strict=True)
    ]


def encode(codes: Int8[np.ndarray, '...']) -> bytes | None:
  """The payload of codes from -127 to 127; None where no arrangement is for their shape."""
  tried = choices(codes.shape)
  if not tried or codes.min() < -127:
    return None
  plan = _best_plan(codes, tried)
  score_models = plan.score_models()
  bits = f'{TRELLIS_MARKER if plan.has_trellis else MARKER}{plan.arrangement:02b}'
  for model in score_models:
    bits += '0' if model is None else '1' + ans.write_table(model)
  bits += ans.golomb(len(plan.starts), 2)
  for i, start in enumerate(plan.starts):
    bits += ans.golomb(start - plan.starts[i - 1] - 1, 2) if i else ans.golomb(start, 8)
  bits += ''.join(map(ans.write_table, plan.models))
  head = ans.to_bytes(bits)

  coder = ans.begin(codes, head)
  range_of = _range_of(plan.starts)
  ranges_of = lambda block: range_of[_index(plan.scores, block.rows, block.levels)]
  if plan.has_trellis:
    models = [(2 * ranges_of(block) + block.subsets).reshape(-1) for block in plan.blocks]
    symbols = [plan.used[block.symbols].reshape(-1) for block in plan.blocks]
    known = sequential_ans.tables(plan.models)
    words = sequential_ans.encode(
      ans.words(coder), np.concatenate(symbols), np.concatenate(models), known
    )
    coder = ans.from_words(words)
  else:
    for block in reversed(plan.blocks):
      order, ends = _grouped(ranges_of(block), len(plan.models))
      in_order = plan.used[block.symbols.reshape(-1)[order]]
      ranged = zip(plan.models, [0, *ends[:-1]], ends, strict=True)
      for model, start, stop in reversed(list(ranged)):
        model.encode(coder, in_order[start:stop])
  for score_model, part in reversed(list(zip(score_models, plan.scores, strict=True))):
    if score_model is not None:
      score_model.encode(coder, part)
  return head + ans.end(coder)


class Prices(NamedTuple):
  """What codes cost that are like those of a plan, to choose others by.

  Attributes:
    plan: of codes that follow the trellis.
    bits: of each index + 64, in every range and subset.
  """

  plan: _Plan
  bits: Float32[np.ndarray, 'ranges 2 129']

  def of_tap(
    self, indices: Kernel, window: tuple[int, ...], tap: int
  ) -> tuple[UInt8[np.ndarray, 'inputs outputs'], Bool[np.ndarray, 'inputs outputs']]:
    """The range of every weight of a tap, and where its sign is turned, by the taps before it."""
    rows = slice(0, indices.shape[1])
    levels, is_turned = _neighbourhood(indices, window, tap, rows, self.plan.has_window)
    ranges = _range_of(self.plan.starts)[_index(self.plan.scores, rows, levels)]
    return ranges, np.zeros(ranges.shape, bool) if is_turned is None else is_turned


def prices(codes: Int8[np.ndarray, '...'], arrangement: int) -> Prices:
  """The prices of the shortest payload of codes that follow the trellis in this arrangement."""
  plan = _best_plan(codes, [arrangement])
  bits = np.empty((len(plan.models), 2 * trellis.MOST_INDEX + 1), np.float32)
  for row, model in zip(bits, plan.models, strict=True):
    row[:] = model.precision + 1  # what did not occur may
    occurs = model.frequencies > 0
    at = model.symbols[occurs].astype(int) + trellis.MOST_INDEX
    row[at] = model.precision - np.log2(model.frequencies[occurs])
  return Prices(plan, bits.reshape(-1, 2, bits.shape[1]))


def decode(data: bytes | memoryview, shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """The codes of a payload that begins with `MARKER` or `TRELLIS_MARKER`.

  Raises:
    ValueError: `data` is no payload of codes of this shape.
  """
  bits, position = ans.to_bits(data, _MAX_BITS_BYTES), len(MARKER) + 2
  has_trellis = bits.startswith(TRELLIS_MARKER)
  arrangement = int(bits[position - 2 : position], 2)
  if not _is_possible(shape, arrangement):
    raise ValueError(f'found codes in arrangement {arrangement}, expected those of shape {shape}')
  score_models: list[ans.Frequencies | None] = []
  for _ in range(3):
    is_scored, position = bits[position : position + 1] == '1', position + 1
    model = None
    if is_scored:
      model, position = ans.read_table(bits, position)
    score_models.append(model)
  more, position = ans.read_golomb(bits, position, 2)
  if more >= _MAX_RANGES:
    raise ValueError(f'found {more + 1} ranges of scores, expected at most {_MAX_RANGES}')
  starts: list[int] = []
  for i in range(more):
    step, position = ans.read_golomb(bits, position, 2 if i else 8)
    starts.append(starts[-1] + 1 + step if i else step)
  models = []
  for _ in range((more + 1) * (1 + has_trellis)):
    model, position = ans.read_table(bits, position)
    models.append(model)
  end = ans.end_of_bits(bits, position)
  least_bits = min(model.least_bits for model in models)
  coder = ans.resume(bytes(data[end:]), math.prod(shape), least_bits)

  codes = ans.room(shape)
  kernel, window = arranged(codes, arrangement)  # of the same memory
  subsets = ans.room(kernel.shape).view(np.uint8) if has_trellis else None
  parts = []
  for model, count in zip(score_models, (*kernel.shape[1:], _LEVELS), strict=True):
    part = np.zeros(count, np.int8)
    if model is not None:
      model.decode(coder, part)
    parts.append(part)
  scores = _Scores(*parts)
  range_of, has_window = _range_of(starts), score_models[2] is not None
  if has_trellis:
    known, words, state = sequential_ans.tables(models), ans.words(coder), 0
  for tap, rows in _blocks(kernel.shape):
    levels, is_turned = _neighbourhood(kernel, window, tap, rows, has_window)
    ranges = range_of[_index(scores, rows, levels)]
    if subsets is not None:
      indices, theirs = np.empty((2, ranges.size), np.int8)
      words, state = sequential_ans.decode(
        words, ranges.reshape(-1), state, known, indices, theirs.view(np.uint8)
      )
      kernel[tap, rows] = _turned(indices.reshape(ranges.shape), is_turned)
      subsets[tap, rows] = theirs.reshape(ranges.shape)
      continue
    order, ends = _grouped(ranges, len(models))
    in_order, block = np.empty((2, order.size), np.int8)
    for model, start, stop in zip(models, [0, *ends[:-1]], ends, strict=True):
      model.decode(coder, in_order[start:stop])
    block[order] = in_order
    kernel[tap, rows] = _turned(block.reshape(ranges.shape), is_turned)
  if subsets is not None:
    kernel[...] = trellis.join(kernel, subsets)
    coder = ans.from_words(words)
  ans.check_end(coder, codes, bytes(data[:end]))
  return codes


def choices(shape: tuple[int, ...]) -> list[int]:
  """The arrangements that are worth trying: a projection onto heads has three axes as well."""
  first, last = math.prod(shape[:-2]), math.prod(shape[2:])
  window = 1 if 1 < last < first else 0
  tried = {0: [], 1: [], 2: [2], 3: [window, 2, 3]}.get(len(shape), [window])
  return [choice for choice in tried if _is_possible(shape, choice)]


def _is_possible(shape: tuple[int, ...], arrangement: int) -> bool:
  if len(shape) < 2:
    return False
  window = _window(shape, arrangement)
  outputs = (shape[-1], shape[1], shape[-1], math.prod(shape[1:]))[arrangement]
  return len(window) <= 3 and math.prod(window) <= _MAX_TAPS and outputs <= _BLOCK


def _window(shape: tuple[int, ...], arrangement: int) -> tuple[int, ...]:
  return {0: shape[:-2], 1: shape[2:]}.get(arrangement, ())


def arranged(codes: Int8[np.ndarray, '...'], arrangement: int) -> tuple[Kernel, tuple[int, ...]]:
  """A view as taps, inputs and outputs, and the shape of the window."""
  window = _window(codes.shape, arrangement)
  if arrangement == 0:
    return codes.reshape(-1, *codes.shape[-2:]), window
  if arrangement == 1:
    return np.moveaxis(codes.reshape(*codes.shape[:2], -1), -1, 0), window
  if arrangement == 2:
    return codes.reshape(1, -1, codes.shape[-1]), window
  return codes.reshape(1, codes.shape[0], -1), window


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
  """Taps in order, and of each as many inputs at a time as make a block."""
  taps, inputs, outputs = shape
  count = _BLOCK // outputs
  for tap in range(taps):
    for start in range(0, inputs, count):
      yield tap, slice(start, min(start + count, inputs))


@functools.lru_cache(maxsize=1 << 12)
def _neighbours(window: tuple[int, ...], tap: int) -> list[tuple[int, int]]:
  """Taps beside this one that came before it, and how often each counts."""
  place = np.unravel_index(tap, window)
  found = []
  for offset in itertools.product((-1, 0, 1), repeat=len(window)):
    distance = sum(map(abs, offset))
    other = [int(a) + b for a, b in zip(place, offset, strict=True)]
    is_inside = all(0 <= a < n for a, n in zip(other, window, strict=True))
    if offset < (0,) * len(window) and distance <= 2 and is_inside:
      found.append((int(np.ravel_multi_index(other, window)), 6 if distance == 1 else 1))
  return found


@functools.lru_cache
def _bucket_of(weight: int) -> UInt8[np.ndarray, ' magnitudes']:
  """The bucket of every sum of |code| that have this weight together."""
  twelfths = 12 * np.arange(128 * weight + 1) // weight
  return np.searchsorted(_EDGES, twelfths, 'right').astype(np.uint8)


def _neighbourhood(
  kernel: Kernel, window: tuple[int, ...], tap: int, rows: slice, has_window: bool
) -> tuple[UInt8[np.ndarray, 'rows outputs'] | None, Bool[np.ndarray, 'rows outputs'] | None]:
  """The level of every weight, and where its sign is turned; None where nothing is beside it."""
  neighbours = _neighbours(window, tap) if has_window else []
  if not neighbours:
    return None, None
  # 128 times the weight of the neighbours in three dimensions, 24, is far below 2**15
  signed, magnitude = np.zeros((2, *kernel[tap, rows].shape), np.int16)
  for other, count in neighbours:
    codes = kernel[other, rows].astype(np.int16)
    codes *= np.int16(count)
    signed += codes
    magnitude += np.abs(codes)
  level = _bucket_of(sum(count for _, count in neighbours))[magnitude]
  level *= _KINDS
  level += 1
  level += 2 * np.abs(signed) >= magnitude
  return level, signed < 0


def _index(
  scores: _Scores, rows: slice, levels: UInt8[np.ndarray, 'rows outputs'] | None
) -> Int16[np.ndarray, 'rows outputs']:
  """The score of every weight, from 0 up, those of another kind of neighbours after each other."""
  of_level = scores.levels + _BASE
  if levels is None:
    return (scores.inputs[rows, None] + of_level[0]) + scores.outputs
  index = of_level[levels]
  index += scores.inputs[rows, None]
  index += scores.outputs
  return index


def _range_of(starts: list[int]) -> UInt8[np.ndarray, ' scores']:
  return np.searchsorted(starts, np.arange(_SPAN * _KINDS), 'right').astype(np.uint8)


def _grouped(
  ranges: UInt8[np.ndarray, 'rows outputs'], count: int
) -> tuple[Int64[np.ndarray, ' size'], list[int]]:
  """The order that brings the ranges together, and where each ends."""
  flat = ranges.reshape(-1)
  return np.argsort(flat, kind='stable'), np.cumsum(np.bincount(flat, minlength=count)).tolist()


def _turned(
  codes: Int8[np.ndarray, 'rows outputs'], is_turned: Bool[np.ndarray, 'rows outputs'] | None
) -> Int8[np.ndarray, 'rows outputs']:
  codes = np.ascontiguousarray(codes)
  return codes if is_turned is None else np.where(is_turned, -codes, codes)


def _best_plan(codes: Int8[np.ndarray, '...'], choices: list[int]) -> _Plan:
  plans = (plan for choice in choices for plan in _plans(codes, choice))
  return min(plans, key=lambda plan: plan.bits)


def _plans(codes: Int8[np.ndarray, '...'], arrangement: int) -> Iterator[_Plan]:
  """With and without neighbours, with and without scores of inputs and outputs."""
  kernel, window = arranged(codes, arrangement)
  found = trellis.indices_and_subsets(kernel)
  kernel, subsets = (kernel, None) if found is None else found
  is_small = kernel.size <= _FEW
  for has_window in (True, False) if kernel.shape[0] > 1 else (False,):
    blocks, used = _examined(kernel, subsets, window, has_window)
    for has_inputs, has_outputs in itertools.product((True, False), repeat=2):
      if has_window and not is_small and has_inputs != has_outputs:
        continue
      scores = _fitted(blocks, used, kernel.shape, has_inputs, has_outputs, has_window)
      at, counts = _histograms(blocks, used, scores)
      bits, first = _partition(counts)
      for part in scores:
        if part.any():
          histogram = ans.histogram(part)
          bits += float(ans.ideal_bits(histogram)) + len(ans.write_table(ans.fit(histogram)))
      models = [ans.fit(row) for row in np.add.reduceat(counts, first).reshape(-1, 256)]
      starts = at[first[1:]].tolist()
      rest = starts, models, subsets is not None
      yield _Plan(bits, arrangement, has_window, blocks, used, scores, *rest)


def _examined(
  kernel: Kernel,
  subsets: UInt8[np.ndarray, 'taps inputs outputs'] | None,
  window: tuple[int, ...],
  has_window: bool,
) -> tuple[list[_Block], Int8[np.ndarray, ' symbols']]:
  """All blocks, and the symbols that occur."""
  counts = ans.histogram(kernel)
  counts += counts[-np.arange(256)]  # a sign may be turned
  used = np.flatnonzero(counts).astype(np.uint8)
  place = np.zeros(256, np.uint8)
  place[used] = np.arange(used.size)
  blocks = []
  for tap, rows in _blocks(kernel.shape):
    levels, is_turned = _neighbourhood(kernel, window, tap, rows, has_window)
    symbols = place[_turned(kernel[tap, rows], is_turned).view(np.uint8)]
    blocks.append(_Block(rows, levels, symbols, None if subsets is None else subsets[tap, rows]))
  return blocks, used.view(np.int8)


def _fitted(
  blocks: list[_Block],
  used: Int8[np.ndarray, ' symbols'],
  shape: tuple[int, ...],
  has_inputs: bool,
  has_outputs: bool,
  has_window: bool,
) -> _Scores:
  """Scores of a product of three factors, each made to give its own sums of |code|, in turns."""
  _, inputs, outputs = shape
  of_level, of_input, of_output = (np.ones(n, np.float32) for n in (_LEVELS, inputs, outputs))
  size_of = np.abs(used.astype(np.float32))
  mean = sum(float(size_of[b.symbols].sum()) for b in blocks) / math.prod(shape)
  # of a product of two factors the sums are the answer at once
  for _ in range(_SWEEPS if has_window else 1):
    if has_window:
      found = np.full((2, _LEVELS), _PRIOR)
      for b in blocks:
        if b.levels is not None:
          level = b.levels.reshape(-1)
          expected = (mean * of_input[b.rows, None]) * of_output * of_level[b.levels]
          found[0] += np.bincount(level, size_of[b.symbols].reshape(-1), _LEVELS)
          found[1] += np.bincount(level, expected.reshape(-1), _LEVELS)
      of_level *= (found[0] / found[1]).astype(np.float32)
    if has_inputs:
      found = np.full((2, inputs), _PRIOR)
      for b in blocks:
        level = of_level[np.zeros((1, 1), int) if b.levels is None else b.levels]
        found[0, b.rows] += size_of[b.symbols].sum(1)
        found[1, b.rows] += (mean * of_input[b.rows]) * (of_output * level).sum(-1)
      of_input *= (found[0] / found[1]).astype(np.float32)
    if has_outputs:
      found = np.full((2, outputs), _PRIOR)
      for b in blocks:
        level = of_level[np.zeros((1, 1), int) if b.levels is None else b.levels]
        found[0] += size_of[b.symbols].sum(0)
        found[1] += (mean * of_output) * (of_input[b.rows, None] * level).sum(0)
      of_output *= (found[0] / found[1]).astype(np.float32)
  return _Scores(*map(_rounded, (of_input, of_output, of_level)))


def _rounded(factor: Float[np.ndarray, ' k']) -> Int8[np.ndarray, ' k']:
  score = np.rint(_UNIT * np.log2(factor))
  return np.clip(score, -_MOST_SCORE, _MOST_SCORE).astype(np.int8)


def _histograms(
  blocks: list[_Block], used: Int8[np.ndarray, ' symbols'], scores: _Scores
) -> tuple[Int64[np.ndarray, ' k'], Int64[np.ndarray, 'k subsets 256']]:
  """The scores that occur, in order, and how often each symbol of each subset has each of them."""
  least = sum(int(part.min()) for part in scores) + int(_BASE[0])
  largest = sum(int(part.max()) for part in scores) + int(_BASE.max())
  several = 1 if blocks[0].subsets is None else 2
  counts = np.zeros((largest - least + 1, several, used.size), np.int64)
  for b in blocks:
    joint = _index(scores, b.rows, b.levels).astype(np.int64) - least
    if b.subsets is not None:
      joint = 2 * joint + b.subsets
    joint = joint * used.size + b.symbols
    counts += np.bincount(joint.reshape(-1), minlength=counts.size).reshape(counts.shape)
  at = np.flatnonzero(counts.any((1, 2)))
  histograms = np.zeros((at.size, several, 256), np.int64)
  histograms[..., used.view(np.uint8)] = counts[at]
  return at + least, histograms


def _partition(counts: Int64[np.ndarray, 'k subsets 256']) -> tuple[float, list[int]]:
  """Cuts scores into ranges that take the fewest bits, tables included: bits, and where they begin.

  The shortest path over all cuts, in k**2 steps.
  """
  occurring = counts[..., counts.any((0, 1))]
  sums = np.concatenate([np.zeros((1, *occurring.shape[1:])), np.cumsum(occurring, 0)])
  n = len(counts)
  for price in (1, 2, 4, 8, 16, 32, math.inf):  # of a table: a higher one makes fewer ranges
    best, cut = np.zeros(n + 1), np.zeros(n + 1, int)
    for stop in range(1, n + 1):
      start = np.arange(stop) if price < math.inf else np.zeros(1, int)
      parts = sums[stop] - sums[start]
      bits = ans.ideal_bits(parts) + min(price, 64) * _table_bits(parts)
      bits = best[start] + bits.sum(-1)
      cut[stop], best[stop] = start[np.argmin(bits)], bits.min()
    first, stop = [], n
    while stop:
      stop = int(cut[stop])
      first.append(stop)
    if len(first) <= _MAX_RANGES:
      break
  return float(best[n]), first[::-1]


def _table_bits(counts: Float[np.ndarray, '... symbols']) -> Float[np.ndarray, '...']:
  """About what `ans.write_table` takes."""
  total = counts.sum(-1, keepdims=True)
  precision = np.minimum(1 + 0.75 * np.log2(np.maximum(total, 1)), 16)
  frequency = counts * 2**precision / np.maximum(total, 1)
  return 10 + (np.log2(1 + frequency) + 1.5 * (counts > 0)).sum(-1)
