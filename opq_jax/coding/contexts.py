"""Payloads below the entropy: every code is coded with the frequencies of weights like it.

The weights of one kernel are not alike: some inputs and outputs have larger ones, and neighbours in
a window have like sizes and like signs.  Three scores add up to say how large a code to expect, in
thirds of an octave of its mean magnitude:

    score  =  score of its input  +  score of its output  +  score of its activity
              + 384  +  768 if the signs of its neighbours agree

with activities, neighbours and flips of signs as in `opq_jax.coding.neighbours`.  The 384 keep the
sum of three int8 from being negative, and the 768 keep the two kinds of neighbours apart.  The
scores 0 to 1535 are cut into at most 16 ranges, and every range has frequencies of its own.  All
scores and frequencies are stored, nothing adapts: thousands of codes of one range are decoded at
once.

A payload is

    [bits, padded with zeros to whole bytes][words of an ANS, little-endian uint32]

The bits are, in this order, with Golomb(k) the exponential Golomb code of order k and tables of
frequencies as in `opq_jax.coding.ans`:

    marker         0000100100, or 0001100100 of codes along a trellis: no table begins so
    arrangement    2 bits (`opq_jax.coding.arrangements`)
    score tables   of inputs, outputs and activities, each: one bit, and after a 1 the table of the
                   scores; after a 0 these scores are all 0, and without a table of activities no
                   weight has neighbours
    ranges         Golomb(2) of one less than their number; the score at which the second begins,
                   as Golomb(8); how many more than one score later the next begins, as Golomb(2),
                   for each of the others
    tables         of every range

The words hold the scores that have a table, each as an int8, then the codes, signs flipped: block
after block in the order of `opq_jax.coding.arrangements`, of a block range after range, and of a
range in C order.  Last comes the checksum of bits and codes.

Codes that follow the trellis of `opq_jax.coding.trellis` in the order of taps, inputs and outputs
are coded as their indices in subsets.  Neighbours are then those indices.  Every range has two
tables, of subset 0 and of subset 1, and the indices come weight after weight in the order of the
trellis (`opq_jax.coding.sequential_ans`).

Contexts of neighbours are an old tool of image coders, and the coder of NNCodec (ISO/IEC 15938-17)
has some that adapt, and a trellis.  Signs flipped by those of neighbouring taps, and scores that
add up and are stored instead of adapting, are ours.
"""

import math
from typing import NamedTuple

import numpy as np

from opq_jax.coding import ans, arrangements, frequencies, neighbours, trellis
from opq_jax.core.array_types import Int8, Int16, Int64, UInt8

# read as a table: a precision of 1 or 2 bits, then 0 as largest and as least symbol, which no table
# has, because every one knows two symbols
MARKER = '0000' + frequencies.golomb(0, 2) + frequencies.golomb(0, 2)
TRELLIS_MARKER = '0001' + frequencies.golomb(0, 2) + frequencies.golomb(0, 2)

MAX_RANGES = 16
MAX_HEAD_BYTES = 1 << 15
"""Bytes of the bits: three times what 35 tables of all 255 symbols take."""

SCORES_PER_OCTAVE = 3
KIND_SPAN = 768
"""Scores of one kind of neighbours: more than the sum of three int8, -384 to 381."""

_OFFSETS = (KIND_SPAN // 2 + KIND_SPAN * neighbours.AGREES).astype(np.int16)


class Scores(NamedTuple):
  """Scores of each input, output and activity; zeros where they are not stored."""

  inputs: Int8[np.ndarray, ' inputs']
  outputs: Int8[np.ndarray, ' outputs']
  activities: Int8[np.ndarray, ' activities']

  def bounds(self) -> tuple[int, int]:
    """Returns a lower and an upper bound of the scores of all weights."""
    least = sum(int(np.min(part)) for part in self) + int(np.min(_OFFSETS))
    return least, sum(int(np.max(part)) for part in self) + int(np.max(_OFFSETS))

  def of_block(
    self, rows: slice, activities: UInt8[np.ndarray, 'rows outputs'] | None
  ) -> Int16[np.ndarray, 'rows outputs']:
    """Returns the score of every weight of the inputs `rows` of a tap."""
    # an int8 and an int16 add up to int16, which holds every score, 0 to 1535; larger integers
    # would double the memory that a block of 2**18 scores moves
    of_activity = self.activities + _OFFSETS
    if activities is None:
      return (self.inputs[rows, None] + of_activity[0]) + self.outputs
    scores = of_activity[activities]
    scores += self.inputs[rows, None]
    scores += self.outputs
    return scores


class Head(NamedTuple):
  """The bits of a payload, parsed.

  Attributes:
    has_trellis: whether codes are indices in subsets.
    arrangement: of the axes.
    score_models: frequencies of the scores of inputs, outputs and activities, or None.
    starts: the score at which each range but the first begins.
    models: frequencies of each range; with a trellis those of subset 0 and subset 1 of each.
  """

  has_trellis: bool
  arrangement: int
  score_models: list[frequencies.Frequencies | None]
  starts: list[int]
  models: list[frequencies.Frequencies]

  @property
  def has_window(self) -> bool:
    """Whether weights have neighbours."""
    return self.score_models[2] is not None

  def range_of(self) -> UInt8[np.ndarray, ' scores']:
    """Returns the range of every score from 0 to 1535."""
    return np.searchsorted(self.starts, np.arange(2 * KIND_SPAN), 'right').astype(np.uint8)

  def to_bytes(self) -> bytes:
    """Returns the bits, padded."""
    bits = f'{TRELLIS_MARKER if self.has_trellis else MARKER}{self.arrangement:02b}'
    for model in self.score_models:
      bits += '0' if model is None else '1' + frequencies.write_table(model)
    bits += frequencies.golomb(len(self.starts), 2)
    for i, start in enumerate(self.starts):
      bits += (
        frequencies.golomb(start - self.starts[i - 1] - 1, 2) if i else frequencies.golomb(start, 8)
      )
    bits += ''.join(map(frequencies.write_table, self.models))
    return frequencies.to_bytes(bits)


def read_head(data: bytes | memoryview, shape: tuple[int, ...]) -> tuple[Head, int]:
  """Returns the head of a payload, and its bytes.

  Raises:
    ValueError: no encoder writes such bits for codes of this shape.
  """
  bits, position = frequencies.to_bits(data, MAX_HEAD_BYTES), len(MARKER) + 2
  has_trellis = bits.startswith(TRELLIS_MARKER)
  arrangement = int(bits[position - 2 : position], 2)
  if not arrangements.is_possible(shape, arrangement):
    raise ValueError(f'found codes in arrangement {arrangement}, expected those of shape {shape}')
  score_models: list[frequencies.Frequencies | None] = []
  for _ in Scores._fields:
    is_stored, position = bits[position : position + 1] == '1', position + 1
    model = None
    if is_stored:
      model, position = frequencies.read_table(bits, position)
    score_models.append(model)
  more, position = frequencies.read_golomb(bits, position, 2)
  if more >= MAX_RANGES:
    raise ValueError(f'found {more + 1} ranges of scores, expected at most {MAX_RANGES}')
  # a range that begins beyond the largest score has no weights, which does no harm
  starts: list[int] = []
  for i in range(more):
    # the first start is of the size of the offset 384, the distances of a few thirds of an octave
    gap, position = frequencies.read_golomb(bits, position, 2 if i else 8)
    starts.append(starts[-1] + 1 + gap if i else gap)
  models = []
  for _ in range((more + 1) * (1 + has_trellis)):
    model, position = frequencies.read_table(bits, position)
    models.append(model)
  head = Head(has_trellis, arrangement, score_models, starts, models)
  return head, frequencies.end_of_bits(bits, position)


def decode(data: bytes | memoryview, shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """Returns the codes of a payload that begins with `MARKER` or `TRELLIS_MARKER`.

  Raises:
    ValueError: `data` is no payload of codes of this shape.
  """
  # the shape is not allocated before the number of words is known to suffice for it (`resume`)
  head, end = read_head(data, shape)
  least_bits = min(model.least_bits for model in head.models)
  coder = ans.resume(bytes(data[end:]), math.prod(shape), least_bits)
  codes = ans.room(shape)
  kernel, window = arrangements.arranged(codes, head.arrangement)  # of the memory of `codes`
  parts = []
  counts = *kernel.shape[1:], neighbours.ACTIVITIES
  for model, count in zip(head.score_models, counts, strict=True):
    part = np.zeros(count, np.int8)
    if model is not None:
      model.decode(coder, part)
    parts.append(part)
  decode_kernel = _decode_along_trellis if head.has_trellis else _decode_ranges
  coder = decode_kernel(coder, head, Scores(*parts), kernel, window)
  ans.check_end(coder, codes, bytes(data[:end]))
  return codes


def _decode_ranges(
  coder: ans.Coder,
  head: Head,
  scores: Scores,
  kernel: arrangements.Kernel,
  window: tuple[int, ...],
) -> ans.Coder:
  """Takes the codes of a kernel off a coder: range by range, whole blocks at once."""
  range_of = head.range_of()
  for tap, rows in arrangements.blocks(kernel.shape):
    # neighbours lie at taps before this one, and these have their codes already
    activities, is_flipped = _neighbourhood(head, kernel, window, tap, rows)
    ranges = range_of[scores.of_block(rows, activities)]
    order, ends = grouped(ranges, len(head.models))
    in_order, block = np.empty((2, order.size), np.int8)
    for model, start, stop in zip(head.models, [0, *ends[:-1]], ends, strict=True):
      model.decode(coder, in_order[start:stop])
    block[order] = in_order
    kernel[tap, rows] = neighbours.flipped(block.reshape(ranges.shape), is_flipped)
  return coder


def _decode_along_trellis(
  coder: ans.Coder,
  head: Head,
  scores: Scores,
  kernel: arrangements.Kernel,
  window: tuple[int, ...],
) -> ans.Coder:
  """Takes the indices of a kernel off a coder, one after the other, and makes them codes."""
  from opq_jax.coding import sequential_ans  # loads numba

  range_of, subsets = head.range_of(), ans.room(kernel.shape).view(np.uint8)
  tables, words, state = sequential_ans.tables(head.models), ans.words(coder), 0
  for tap, rows in arrangements.blocks(kernel.shape):
    activities, is_flipped = _neighbourhood(head, kernel, window, tap, rows)
    ranges = range_of[scores.of_block(rows, activities)]
    indices, block_subsets = np.empty((2, ranges.size), np.int8)
    # `kernel` holds indices until all are decoded, since neighbours along a trellis are indices
    words, state = sequential_ans.decode(
      words, ranges.reshape(-1), state, tables, indices, block_subsets.view(np.uint8)
    )
    kernel[tap, rows] = neighbours.flipped(indices.reshape(ranges.shape), is_flipped)
    subsets[tap, rows] = block_subsets.reshape(ranges.shape)
  kernel[...] = trellis.join(kernel, subsets)
  return ans.from_words(words)


def _neighbourhood(
  head: Head, kernel: arrangements.Kernel, window: tuple[int, ...], tap: int, rows: slice
) -> neighbours.Neighbourhood:
  if not head.has_window:
    return neighbours.NOTHING
  return neighbours.neighbourhood(kernel, window, tap, rows)


def grouped(
  ranges: UInt8[np.ndarray, 'rows outputs'], count: int
) -> tuple[Int64[np.ndarray, ' size'], list[int]]:
  """Returns the order that brings the weights of a range together, and where each range ends."""
  # stable: within a range the weights stay in C order, as the format has them
  flat = ranges.reshape(-1)
  return np.argsort(flat, kind='stable'), np.cumsum(np.bincount(flat, minlength=count)).tolist()
