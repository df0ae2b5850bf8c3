import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opq_jax.coding import ans, context_search, escapes, frequencies, trellis
from opq_jax.coding import contexts as context_coding
from opq_jax.coding.payload import decode_codes, encode_codes, entropy
from opq_jax.file import written_leaves
from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids
from tests.helpers.kernels import codes_along_the_trellis, scaled_codes, smooth_codes

# in every arrangement, and with one, two and three axes of a window
SHAPES = [(3, 3, 24, 32), (32, 24, 3, 3), (7, 16, 40), (40, 16, 7), (60, 5, 12), (2, 3, 2, 24, 16)]
SHAPES += [(96, 64), (3, 3, 1, 300), (1, 1, 50, 40)]


def spec_decode(payload, shape):
  """The decoder that the module's docstring describes, weight after weight."""
  bits = ''.join(f'{byte:08b}' for byte in payload)
  has_trellis = bits.startswith('0001100100')
  assert has_trellis or bits.startswith('0000100100')
  arrangement, position = int(bits[10:12], 2), 12
  score_tables = []
  for _ in range(3):
    position += 1
    table = None
    if bits[position - 1] == '1':
      table, position = frequencies.read_table(bits, position)
    score_tables.append(table)
  more, position = frequencies.read_golomb(bits, position, 2)
  begins = [-(10**9)]
  for i in range(more):
    step, position = frequencies.read_golomb(bits, position, 2 if i else 8)
    begins.append(begins[-1] + 1 + step if i else step)
  tables = []
  for _ in range(2 * len(begins) if has_trellis else len(begins)):
    table, position = frequencies.read_table(bits, position)
    tables.append(table)
  coder = ans.resume(payload[-(-position // 8) :], 1, 1.0)

  codes = np.zeros(shape, np.int8)
  axes, window = list(range(len(shape))), {0: shape[:-2], 1: shape[2:]}.get(arrangement, ())
  if arrangement == 1:
    axes = axes[2:] + axes[:2]
  view = codes.transpose(axes)
  if arrangement == 2:
    view = codes.reshape(-1, shape[-1])
  if arrangement == 3:
    view = codes.reshape(shape[0], -1)
  inputs, outputs = view.shape[-2:]
  scores = []
  for table, count in zip(score_tables, (inputs, outputs, 21), strict=True):
    part = np.zeros(count, np.int8)
    if table is not None:
      table.decode(coder, part)
    scores.append(part.astype(int))
  head, words, state, subset_at = 0, [], 0, np.zeros(view.shape, int)
  if has_trellis:
    words = coder.get_compressed().tolist()
    head = (words.pop() << 32) + words.pop()
  parity = lambda number: bin(number).count('1') % 2
  edges = 1, 3, 6, 10, 16, 28, 48, 90, 160
  before = [d for d in itertools.product((-1, 0, 1), repeat=len(window)) if d < (0,) * len(window)]
  at_once = 2**18 // outputs
  for tap in itertools.product(*map(range, window)):
    for start in range(0, inputs, at_once):
      places = itertools.product(range(start, min(start + at_once, inputs)), range(outputs))
      waiting = [[] for _ in tables]
      for i, o in places:
        weight = signed = magnitude = 0
        for d in before if score_tables[2] is not None else ():
          other = tuple(a + b for a, b in zip(tap, d, strict=True))
          w = {1: 6, 2: 1}.get(sum(map(abs, d)), 0)
          if w and all(0 <= a < n for a, n in zip(other, window, strict=True)):
            c = int(view[(*other, i, o)])
            weight, signed, magnitude = weight + w, signed + w * c, magnitude + w * abs(c)
        level = 0
        if weight:
          mean = 12 * magnitude // weight
          level = 1 + 2 * sum(edge <= mean for edge in edges) + (2 * abs(signed) >= magnitude)
        agrees = level > 0 and level % 2 == 0
        score = scores[0][i] + scores[1][o] + scores[2][level] + 384 + 768 * agrees
        which = max(k for k, begin in enumerate(begins) if begin <= score)
        if has_trellis:
          subset = parity(state & 9)
          table = tables[2 * which + subset]
          slot, begin = head % (1 << table.precision), 0
          place = 0
          while slot >= begin + table.frequencies[place]:
            begin += int(table.frequencies[place])
            place += 1
          frequency, k = int(table.frequencies[place]), table.symbols[place]
          head = (head >> table.precision) * frequency + slot - begin
          if head < 1 << 32 and words:
            head = (head << 32) + words.pop()
          view[(*tap, i, o)] = -k if signed < 0 else k
          subset_at[(*tap, i, o)] = subset
          state = (state << 1) & 31 | (parity(state & 29) ^ (int(k) % 2))
          continue
        waiting[which].append(((*tap, i, o), -1 if signed < 0 else 1))
      for table, those in zip(tables, waiting, strict=True):
        found = np.zeros(len(those), np.int8)
        table.decode(coder, found)
        for (place, sign), code in zip(those, found, strict=True):
          view[place] = sign * code
  if has_trellis:
    view[...] = 2 * view - np.sign(view) * subset_at
  return codes


@pytest.mark.parametrize('shape', SHAPES)
def test_decode_trellis_as_described(shape):
  torch = shape in [(32, 24, 3, 3), (40, 16, 7)]
  codes = codes_along_the_trellis(shape, torch=torch)
  payload = context_search.encode(codes)
  assert f'{payload[0]:08b}' == '00011001'
  np.testing.assert_array_equal(spec_decode(payload, shape), codes)
  np.testing.assert_array_equal(context_coding.decode(payload, shape), codes)
  # all its levels, as if the codes before did not tell every other one, take more
  assert len(payload) < 0.9 * len(encode_codes(codes, contexts=False))


def test_entropy_escapes_on_trellis():
  codes = codes_along_the_trellis((96, 64))
  zeros = np.flatnonzero(codes == 0)[::7]
  escaped = codes.copy()
  escaped.reshape(-1)[zeros] = -128
  _, subsets = trellis.indices_and_subsets(codes)
  indices, _ = trellis.indices_and_subsets(codes)
  indices.reshape(-1)[zeros] = -128
  bits = sum(frequencies.ideal_bits(frequencies.histogram(indices[subsets == q])) for q in (0, 1))
  assert entropy(escaped) == pytest.approx(bits / codes.size)
  assert entropy(escaped) > entropy(codes)

  # a file codes them along the trellis still
  grid = Grid(*map(np.float32, (0.5, 1, 1)), 127, np.dtype(np.float32))
  values = np.full(zeros.size, 1000, np.float32)
  coded = CodedSlice(escaped, values, OutputGrids(grid))
  written = written_leaves.written_slice(coded, contexts=True)
  payload = encode_codes(codes)
  assert written.payload == payload + escapes.encode(zeros, values)
  assert frequencies.to_bits(payload, 8).startswith(context_coding.TRELLIS_MARKER)


@pytest.mark.parametrize('at', range(0, 1200, 97))
def test_decode_finds_flips_on_trellis(at):
  codes = codes_along_the_trellis((96, 64))
  payload = bytearray(context_search.encode(codes))
  payload[at % len(payload)] ^= 4
  with pytest.raises(ValueError, match='found'):
    decode_codes(bytes(payload), codes.shape)


@pytest.mark.parametrize('shape', SHAPES)
def test_decode_as_described(shape):
  codes = smooth_codes(shape)
  payload = context_search.encode(codes)
  np.testing.assert_array_equal(spec_decode(payload, shape), codes)
  np.testing.assert_array_equal(context_coding.decode(payload, shape), codes)


@given(
  hnp.arrays(
    np.int8, hnp.array_shapes(min_dims=2, max_dims=6, max_side=7), elements=st.integers(-127, 127)
  )
)
@settings(deadline=None)
def test_decode_any_codes(codes):
  payload = context_search.encode(codes)
  if payload is None:
    assert codes.ndim == 6  # four axes of a window
  else:
    np.testing.assert_array_equal(context_coding.decode(payload, codes.shape), codes)


@pytest.mark.parametrize('shape', [(700, 500), (500, 700)])
def test_decode_several_blocks(shape):
  # more weights than are coded at once
  codes, scales = scaled_codes(shape)
  payload = context_search.encode(codes)
  np.testing.assert_array_equal(spec_decode(payload, shape), codes)
  np.testing.assert_array_equal(context_coding.decode(payload, shape), codes)
  ideal = sum(entropy(c) * c.size for c in (codes[scales == s] for s in np.unique(scales))) / 8
  assert len(payload) < 1.02 * ideal


def test_decode_refuses_vectors():
  payload = context_search.encode(scaled_codes((1, 5000))[0])
  assert payload is not None
  with pytest.raises(ValueError, match=r'arrangement 2, expected those of shape \(5000,\)'):
    context_coding.decode(payload, (5000,))


def test_decode_refuses_many_ranges():
  bits = f'{context_coding.MARKER}00' + '000' + frequencies.golomb(16, 2)
  with pytest.raises(ValueError, match='found 17 ranges of scores, expected at most 16'):
    decode_codes(frequencies.to_bytes(bits) + bytes(400), (3, 3, 24, 32))


@pytest.mark.parametrize('mask', [0x01, 0x80, 0xFF])
def test_decode_finds_flips_and_cuts(mask):
  codes = smooth_codes((3, 3, 12, 16))
  payload = context_search.encode(codes)
  np.testing.assert_array_equal(decode_codes(payload, codes.shape), codes)
  for i in range(len(payload)):
    damaged = bytearray(payload)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      decode_codes(bytes(damaged), codes.shape)
  for length in range(len(payload)):
    with pytest.raises(ValueError):
      decode_codes(payload[:length], codes.shape)


def test_decode_refuses_other_shapes():
  payload = context_search.encode(smooth_codes((3, 3, 24, 32)))
  for shape in [(9, 24, 32), (24, 32, 3, 3), (216, 32), (6912,), (3, 3, 24, 33)]:
    with pytest.raises(ValueError):
      decode_codes(payload, shape)
  # a window of two axes that would cost a million steps, and one of more axes than are looked at
  for shape in [(1000, 1000, 1, 1), (2,) * 20, (1, 1 << 30), (1 << 20, 1 << 20, 1 << 20)]:
    with pytest.raises(ValueError, match='found codes'):
      decode_codes(payload, shape)


@given(st.binary(max_size=200), st.lists(st.integers(1, 30), min_size=2, max_size=5))
@settings(deadline=None, max_examples=300)
def test_decode_refuses_noise(data, shape):
  number = int(context_coding.MARKER, 2) << 6
  with pytest.raises(ValueError):
    decode_codes(number.to_bytes(2, 'big') + data, tuple(shape))


@pytest.mark.parametrize('shape', [(40, 40, 2, 3), (2, 2, 2, 2, 5, 6), (1, 1 << 19)])
def test_decode_without_a_window(shape):
  codes = smooth_codes(shape)
  np.testing.assert_array_equal(decode_codes(encode_codes(codes), shape), codes)


def test_decode_golden_payload():
  # one payload as it was written once: every later version must read it
  codes = np.array(
    [[[0, 1], [2, 0], [-1, 0]], [[0, 2], [3, 0], [-1, 1]], [[0, 1], [2, 0], [0, 0]]], np.int8
  )
  payload = bytes.fromhex('09110fd232207e47a0f21df008b207')
  np.testing.assert_array_equal(decode_codes(payload, codes.shape), codes)
