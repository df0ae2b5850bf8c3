"""Codes <-> bytes, each code with the frequencies of weights like it: below the entropy.

The weights of one kernel are not alike.  Some inputs and some outputs have larger ones, and in a
window those that lie side by side have like size and like sign.  So codes come tap by tap, and what
has come says what to expect:

    score  =  score of the input  +  score of the output  +  score of the neighbours' level

in thirds of an octave of the expected |code|.  Ranges of the score have their own frequencies, from
the leaf alone; nothing adapts, so that thousands of codes of one range are decoded at once.  Where
the neighbours are mostly negative the code is coded with its sign turned.

A payload:

    [bits, padded with zeros to whole bytes][words of an ANS, little-endian uint32]

    bits     the marker 0000100100 (no table of `opq_jax.ans` begins so); is the window last; then
             for the inputs, the outputs and the levels: are they scored, and the table of their
             scores; one less than the number of ranges, where each but the first begins, and their
             tables
    words    the scores, then the codes of `_BLOCK` weights at a time of one tap, range by range

A neighbour is the weight of the same input and output at a tap that came before and is next to this
one: along one axis of the window it counts six times, along two once.  Of the codes c and the
counts w of the neighbours, with m = sum w |c| over sum w in twelfths, rounded down, the level is

    0 without neighbours,  1 + 2 #{edges <= m} + (2 |sum w c| >= sum w |c|)  otherwise.

Contexts of neighbours are what image coders live by; that signs of neighbouring taps predict each
other, and that scores in place of adapting contexts leave a coder that fast, is ours.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int8, Int16, Int64, UInt8

from opq_jax import ans

MARKER = '0000' + ans.golomb(0, 2) + ans.golomb(0, 2)

_BLOCK = 1 << 18
_MAX_TAPS = 1024  # of a window: each costs some microseconds, and no window has as many
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


@dataclasses.dataclass(frozen=True)
class _Scores:
  """Of each input, output and level; zeros where they are not scored."""

  inputs: Int8[np.ndarray, ' inputs']
  outputs: Int8[np.ndarray, ' outputs']
  levels: Int8[np.ndarray, ' levels']

  def parts(self) -> list[Int8[np.ndarray, ' k']]:
    return [self.inputs, self.outputs, self.levels]


@dataclasses.dataclass(frozen=True)
class _Block:
  """What the encoder knows of some inputs of a tap."""

  rows: slice
  levels: UInt8[np.ndarray, 'rows outputs'] | None
  symbols: UInt8[np.ndarray, 'rows outputs']  # the place of each among those that occur


def encode(codes: Int8[np.ndarray, '...']) -> bytes | None:
  """The payload of codes from -127 to 127; None where there is nothing to know about them."""
  if codes.ndim < 2 or codes.size < 2 or codes.min() < -127:
    return None
  window_last = _is_window_last(codes.shape)
  kernel, window = _arranged(codes, window_last)
  _, scores, starts = _best_scores(kernel, window)
  return _payload(codes, kernel, window, window_last, scores, starts)


def decode(data: bytes | memoryview, shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """The codes of a payload that begins with `MARKER`.

  Raises:
    ValueError: `data` is no payload of codes of this shape.
  """
  size = math.prod(shape)
  head = bytes(data[:_MAX_BITS_BYTES])
  bits = f'{int.from_bytes(head, "big"):0{8 * len(head)}b}'
  window_last, position = bits[len(MARKER)] == '1', len(MARKER) + 1
  if not len(shape) >= 2 or window_last != _is_window_last(shape):
    raise ValueError(f'found contexts of another shape than {shape}')
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
  starts = []
  for i in range(more):
    step, position = ans.read_golomb(bits, position, 8 if i == 0 else 2)
    starts.append(step if i == 0 else starts[-1] + 1 + step)
  models = []
  for _ in range(more + 1):
    model, position = ans.read_table(bits, position)
    models.append(model)
  end = -(-position // 8)
  if '1' in bits[position : 8 * end]:
    raise ValueError('found tables that are not padded with zeros')
  least_bits = min(model.least_bits for model in models)
  coder = ans.resume(bytes(data[end:]), size, least_bits)

  # a view of the same memory, whose axes may be in another order
  codes = ans.room(shape)
  kernel, window = _arranged(codes, window_last)
  parts = []
  for model, count in zip(score_models, (*kernel.shape[1:], _LEVELS), strict=True):
    part = np.zeros(count, np.int8)
    if model is not None:
      model.decode(coder, part)
    parts.append(part)
  scores = _Scores(*parts)
  has_window = score_models[2] is not None
  range_of = _range_of(starts)
  for tap, rows in _blocks(kernel.shape):
    levels, is_turned = _neighbourhood(kernel, window, tap, rows, has_window)
    ranges = range_of[_index(scores, rows, levels)]
    order, ends = _grouped(ranges, len(models))
    sorted_codes = np.empty(order.size, np.int8)
    for model, start, stop in zip(models, [0, *ends], ends, strict=False):
      if stop > start:
        model.decode(coder, sorted_codes[start:stop])
    block = np.empty(order.size, np.int8)
    block[order] = sorted_codes
    block = block.reshape(ranges.shape)
    if is_turned is not None:
      np.negative(block, out=block, where=is_turned)
    kernel[tap, rows] = block
  ans.check_end(coder, codes, bytes(data[:end]))
  return codes


def _payload(
  codes: Int8[np.ndarray, '...'],
  kernel: Kernel,
  window: tuple[int, ...],
  window_last: bool,
  scores: _Scores,
  starts: list[int],
) -> bytes:
  range_of = _range_of(starts)
  has_window = bool(scores.levels.any())
  counts = np.zeros((len(starts) + 1, 256), np.int64)
  for tap, rows in _blocks(kernel.shape):
    levels, is_turned = _neighbourhood(kernel, window, tap, rows, has_window)
    ranges = range_of[_index(scores, rows, levels)]
    symbols = _turned(kernel[tap, rows], is_turned).view(np.uint8)
    joint = ranges.astype(np.int64) * 256 + symbols
    counts += np.bincount(joint.ravel(), minlength=counts.size).reshape(counts.shape)
  models = [ans.fit(row if row.any() else counts.sum(0)) for row in counts]

  bits = MARKER + str(int(window_last))
  score_models = []
  for part in scores.parts():
    model = ans.fit(ans.histogram(part)) if part.any() else None
    score_models.append(model)
    bits += '0' if model is None else '1' + ans.write_table(model)
  bits += ans.golomb(len(starts), 2)
  for i, start in enumerate(starts):
    bits += ans.golomb(start - starts[i - 1] - 1, 2) if i else ans.golomb(start, 8)
  bits += ''.join(map(ans.write_table, models))
  bits += '0' * (-len(bits) % 8)
  head = int(bits, 2).to_bytes(len(bits) // 8, 'big')

  coder = ans.begin(codes, head)
  for tap, rows in reversed(list(_blocks(kernel.shape))):
    levels, is_turned = _neighbourhood(kernel, window, tap, rows, has_window)
    order, ends = _grouped(range_of[_index(scores, rows, levels)], len(models))
    sorted_codes = _turned(kernel[tap, rows], is_turned).reshape(-1)[order]
    for model, start, stop in reversed(list(zip(models, [0, *ends], ends, strict=False))):
      model.encode(coder, sorted_codes[start:stop])
  for model, part in reversed(list(zip(score_models, scores.parts(), strict=True))):
    if model is not None:
      model.encode(coder, part)
  return head + ans.end(coder)


def _is_window_last(shape: tuple[int, ...]) -> bool:
  """Whether the last axes are the window, as in PyTorch, or the first, as in Flax."""
  return 1 < math.prod(shape[2:]) < math.prod(shape[:-2])


def _arranged(codes: Int8[np.ndarray, '...'], window_last: bool) -> tuple[Kernel, tuple[int, ...]]:
  """A view as taps, inputs and outputs, and the shape of the window."""
  first, last = codes.shape[:-2], codes.shape[2:]
  if window_last and _is_window(last):
    return np.moveaxis(codes.reshape(*codes.shape[:2], -1), -1, 0), last
  if not window_last and _is_window(first):
    return codes.reshape(-1, *codes.shape[-2:]), first
  return codes.reshape(1, -1, codes.shape[-1]), ()


def _is_window(axes: tuple[int, ...]) -> bool:
  return len(axes) <= 3 and math.prod(axes) <= _MAX_TAPS


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
  """Taps in order, and of each as many inputs at a time as make a block."""
  taps, inputs, outputs = shape
  count = max(1, _BLOCK // max(outputs, 1))
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
    if offset < (0,) * len(window) and distance <= 2:
      if all(0 <= a < n for a, n in zip(other, window, strict=True)):
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
  signed = magnitude = np.int16(0)
  for other, count in neighbours:
    codes = kernel[other, rows].astype(np.int16)
    codes *= np.int16(count)
    signed = signed + codes
    magnitude = magnitude + np.abs(codes)
  level = _bucket_of(sum(count for _, count in neighbours))[magnitude]
  level *= _KINDS
  level += 1
  agreement = np.abs(signed).astype(np.int32) * 2
  level += agreement >= magnitude.astype(np.int32)
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


def _best_scores(kernel: Kernel, window: tuple[int, ...]) -> tuple[float, _Scores, list[int]]:
  """Bits, about; the scores that take fewest; and where the ranges begin."""
  best: tuple[float, _Scores, list[int]] | None = None
  is_small = kernel.size <= _FEW
  for has_window in (True, False) if kernel.shape[0] > 1 else (False,):
    blocks, used = _examined(kernel, window, has_window)
    for has_inputs, has_outputs in itertools.product((True, False), repeat=2):
      if has_window and not is_small and has_inputs != has_outputs:
        continue
      scores = _fitted(blocks, used, kernel.shape, has_inputs, has_outputs, has_window)
      bits, starts = _partition(*_histograms(blocks, used.size, scores))
      for part in scores.parts():
        if part.any():
          counts = ans.histogram(part)
          bits += _ideal_bits(counts[None])[0] + len(ans.write_table(ans.fit(counts)))
      if best is None or bits < best[0]:
        best = bits, scores, starts
  assert best is not None
  return best


def _examined(
  kernel: Kernel, window: tuple[int, ...], has_window: bool
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
    blocks.append(_Block(rows, levels, symbols))
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
        level = np.float32(1) if b.levels is None else of_level[b.levels]
        found[0, b.rows] += size_of[b.symbols].sum(1)
        found[1, b.rows] += (mean * of_input[b.rows]) * (of_output * level).sum(-1)
      of_input *= (found[0] / found[1]).astype(np.float32)
    if has_outputs:
      found = np.full((2, outputs), _PRIOR)
      for b in blocks:
        level = np.float32(1) if b.levels is None else of_level[b.levels]
        found[0] += size_of[b.symbols].sum(0)
        found[1] += (mean * of_output) * (of_input[b.rows, None] * level).sum(0)
      of_output *= (found[0] / found[1]).astype(np.float32)
  return _Scores(*map(_rounded, (of_input, of_output, of_level)))


def _rounded(factor: Float[np.ndarray, ' k']) -> Int8[np.ndarray, ' k']:
  score = np.rint(_UNIT * np.log2(factor))
  return np.clip(score, -_MOST_SCORE, _MOST_SCORE).astype(np.int8)


def _histograms(
  blocks: list[_Block], symbols: int, scores: _Scores
) -> tuple[Int64[np.ndarray, ' k'], Int64[np.ndarray, 'k symbols']]:
  """Scores from the least to the largest, and how often each symbol occurs with them."""
  least = sum(int(part.min()) for part in scores.parts()) + int(_BASE[0])
  largest = sum(int(part.max()) for part in scores.parts()) + int(_BASE.max())
  counts = np.zeros((largest - least + 1, symbols), np.int64)
  for b in blocks:
    joint = (_index(scores, b.rows, b.levels).astype(np.int64) - least) * symbols
    joint += b.symbols
    counts += np.bincount(joint.ravel(), minlength=counts.size).reshape(counts.shape)
  at = np.flatnonzero(counts.any(1))
  return at + least, counts[at]


def _ideal_bits(counts: Float[np.ndarray, 'k symbols']) -> Float[np.ndarray, ' k']:
  total = counts.sum(-1, keepdims=True)
  return (counts * np.log2(np.maximum(total, 1) / np.maximum(counts, 1))).sum(-1)


def _partition(
  at: Int64[np.ndarray, ' k'], counts: Int64[np.ndarray, 'k symbols']
) -> tuple[float, list[int]]:
  """Cuts the scores into the ranges that take the fewest bits, tables included."""
  sums = np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(counts, 0)])
  n = at.size
  # a higher price of tables makes fewer ranges
  for price in (1.0, 2.0, 4.0, 16.0, 1e9):
    best, cut = np.zeros(n + 1), np.zeros(n + 1, int)
    for stop in range(1, n + 1):
      parts = sums[stop] - sums[:stop]
      cost = best[:stop] + _ideal_bits(parts) + price * _table_bits(parts)
      cut[stop] = np.argmin(cost)
      best[stop] = cost[cut[stop]]
    starts, stop = [], n
    while stop:
      stop = int(cut[stop])
      starts.append(int(at[stop]))
    if len(starts) <= _MAX_RANGES:
      break
  return float(best[n]), starts[::-1][1:]


def _table_bits(counts: Float[np.ndarray, 'k symbols']) -> Float[np.ndarray, ' k']:
  """About what `ans.write_table` takes."""
  total = counts.sum(-1, keepdims=True)
  precision = np.minimum(1 + 0.75 * np.log2(np.maximum(total, 1)), 16)
  frequency = counts * 2**precision / np.maximum(total, 1)
  return 10 + (np.log2(1 + frequency) + 1.5 * (counts > 0)).sum(-1)
