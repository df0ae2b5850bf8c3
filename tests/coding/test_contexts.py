import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opq_jax.coding import ans, context_search, escapes, frequencies, trellis
from opq_jax.coding import contexts as context_coding
from opq_jax.coding.payload import decode_codes, encode_codes, entropy
from opq_jax.compression import LeafState
from opq_jax.compression.records import affine_codebook
from opq_jax.file import writer

RNG = np.random.default_rng
CODE = st.integers(-127, 127)
# in every arrangement, and with one, two and three axes of a window
SHAPES = [(3, 3, 24, 32), (32, 24, 3, 3), (7, 16, 40), (40, 16, 7), (60, 5, 12), (2, 3, 2, 24, 16)]
SHAPES += [(96, 64), (3, 3, 1, 300), (1, 1, 50, 40)]


def smooth_codes(shape, seed=0):
  """Laplace weights whose windows are smooth and whose inputs and outputs differ in scale."""
  rng = RNG(seed)
  weights = rng.laplace(size=shape)
  small = [axis for axis, n in enumerate(shape) if 1 < n <= 7]
  for axis in small:
    weights = np.cumsum(weights, axis)
  for axis, n in enumerate(shape):
    if n > 7:
      factors = np.exp(0.5 * rng.normal(size=n))
      weights *= np.expand_dims(factors, [a for a in range(len(shape)) if a != axis])
  step = np.abs(weights).mean()
  return np.clip(np.trunc(weights / step), -127, 127).astype(np.int8)


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


def codes_along_the_trellis(shape, seed=0, torch=False):
  """Of the same weights as `smooth_codes`, chosen without contexts, in the order of the coder."""
  half = smooth_codes(shape, seed).astype(np.int8) // 2
  view = np.moveaxis(half.reshape(*shape[:2], -1), -1, 0) if torch else half
  state, subsets = 0, np.zeros(view.size, np.uint8)
  for i, k in enumerate(view.reshape(-1).tolist()):
    subsets[i] = trellis.SUBSET_OF[state]
    state = trellis.NEXT[state, k & 1]
  chosen = trellis.join(np.ascontiguousarray(view), subsets.reshape(view.shape))
  return np.moveaxis(chosen, 0, -1).reshape(shape).copy() if torch else chosen


@pytest.mark.parametrize('shape', SHAPES)
def test_the_decoder_of_a_trellis_is_the_one_that_is_described(shape):
  torch = shape in [(32, 24, 3, 3), (40, 16, 7)]
  codes = codes_along_the_trellis(shape, torch=torch)
  payload = context_search.encode(codes)
  assert f'{payload[0]:08b}' == '00011001'
  np.testing.assert_array_equal(spec_decode(payload, shape), codes)
  np.testing.assert_array_equal(context_coding.decode(payload, shape), codes)
  # all its levels, as if the codes before did not tell every other one, take more
  assert len(payload) < 0.9 * len(encode_codes(codes, contexts=False))


def test_escapes_take_the_places_of_zeros_along_a_trellis():
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
  record = LeafState(
    kinds=np.ones(codes.shape, np.uint8),
    codebook=affine_codebook(*map(jnp.float32, (1, 1)), jnp.int32(127)),
    threshold=jnp.float32(0.5),
    step=jnp.float32(1),
    levels=jnp.int32(127),
    dtype=np.dtype(np.float32),
  )
  values = np.full(zeros.size, 1000, np.float32)
  written = writer.written_leaf(escaped, values, record, contexts=True)
  payload = encode_codes(codes)
  assert written.payload == payload + escapes.encode(zeros, values)
  assert frequencies.to_bits(payload, 8).startswith(context_coding.TRELLIS_MARKER)


@pytest.mark.parametrize('at', range(0, 1200, 97))
def test_a_damaged_payload_of_a_trellis_is_refused(at):
  codes = codes_along_the_trellis((96, 64))
  payload = bytearray(context_search.encode(codes))
  payload[at % len(payload)] ^= 4
  with pytest.raises(ValueError, match='found'):
    decode_codes(bytes(payload), codes.shape)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_decoder_is_the_one_that_is_described(shape):
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
def test_any_codes_come_back(codes):
  payload = context_search.encode(codes)
  if payload is None:
    assert codes.ndim == 6  # four axes of a window
  else:
    np.testing.assert_array_equal(context_coding.decode(payload, codes.shape), codes)


def test_scales_of_channels_are_worth_what_they_tell():
  # what a coder pays that knows the scale of every input and output beforehand
  rng = RNG(1)
  inputs, outputs = np.exp2(rng.integers(-2, 3, 400)), np.exp2(rng.integers(-2, 3, 500))
  scales = inputs[:, None] * outputs
  codes = np.clip(np.trunc(rng.laplace(size=scales.shape) * scales), -127, 127).astype(np.int8)
  ideal = sum(entropy(c) * c.size for c in (codes[scales == s] for s in np.unique(scales))) / 8
  assert ideal < 0.9 * entropy(codes) * codes.size / 8
  assert ideal < len(encode_codes(codes)) < 1.02 * ideal


def scaled_codes(shape, seed=1):
  """Laplace codes whose inputs and outputs differ by powers of two, and those scales."""
  rng = RNG(seed)
  inputs, outputs = (np.exp2(rng.integers(-2, 3, n)) for n in shape[-2:])
  scales = np.broadcast_to(inputs[:, None] * outputs, shape)
  codes = np.trunc(rng.laplace(size=shape) * scales)
  return np.clip(codes, -127, 127).astype(np.int8), scales


@pytest.mark.parametrize('shape', [(700, 500), (500, 700)])
def test_blocks_of_inputs_are_those_that_are_described(shape):
  # more weights than are coded at once
  codes, scales = scaled_codes(shape)
  payload = context_search.encode(codes)
  np.testing.assert_array_equal(spec_decode(payload, shape), codes)
  np.testing.assert_array_equal(context_coding.decode(payload, shape), codes)
  ideal = sum(entropy(c) * c.size for c in (codes[scales == s] for s in np.unique(scales))) / 8
  assert len(payload) < 1.02 * ideal


def test_a_large_window_takes_about_what_its_halves_do():
  # although the encoder tries less where there are more than 2**16 weights
  codes, _ = scaled_codes((3, 3, 64, 144))
  codes[1:] = codes[:1] + codes[1:] // 4  # worth looking at neighbours
  halves = codes[..., ::2], codes[..., 1::2]
  apart = sum(len(encode_codes(half.copy())) for half in halves)
  assert len(encode_codes(codes)) < 1.02 * apart


def test_scores_of_channels_count_beside_neighbours():
  # these tell the sign and little of the size, which is that of the input and the output
  rng, shape = RNG(5), (3, 3, 48, 128)
  inputs, outputs = (np.exp2(rng.integers(-2, 4, n)) for n in shape[-2:])
  scales = np.broadcast_to(inputs[:, None] * outputs, shape)
  sizes = np.minimum(np.trunc(rng.exponential(size=shape) * scales), 127)
  codes = (sizes * rng.choice([-1, 1], shape[-2:])).astype(np.int8)
  ideal = sum(entropy(c) * c.size for c in (np.abs(codes)[scales == s] for s in np.unique(scales)))
  ideal += (codes != 0).any((0, 1)).sum()  # a sign of each window
  assert 8 * len(encode_codes(codes)) < 1.12 * ideal


def test_a_small_kernel_is_not_cut_into_ranges_whose_tables_cost_more_than_they_tell():
  codes, _ = scaled_codes((60, 5, 12))
  assert len(encode_codes(codes)) < 0.905 * len(encode_codes(codes, contexts=False))


def test_a_vector_has_no_arrangement():
  payload = context_search.encode(scaled_codes((1, 5000))[0])
  assert payload is not None
  with pytest.raises(ValueError, match=r'arrangement 2, expected those of shape \(5000,\)'):
    context_coding.decode(payload, (5000,))


def test_more_ranges_than_there_may_be_are_refused():
  bits = f'{context_coding.MARKER}00' + '000' + frequencies.golomb(16, 2)
  with pytest.raises(ValueError, match='found 17 ranges of scores, expected at most 16'):
    decode_codes(frequencies.to_bytes(bits) + bytes(400), (3, 3, 24, 32))


def test_smooth_windows_take_less_in_either_layout():
  codes = smooth_codes((5, 5, 48, 64))
  first = len(encode_codes(codes))
  last = len(encode_codes(np.ascontiguousarray(codes.transpose(3, 2, 0, 1))))
  assert first < 0.8 * len(encode_codes(codes, contexts=False))
  assert last == pytest.approx(first, rel=0.005)


def test_turned_signs_take_less():
  # sizes alone, with signs at random: then only those of the neighbours are lost
  codes = smooth_codes((3, 3, 64, 64))
  signs = RNG(2).choice(np.array([-1, 1], np.int8), codes.shape)
  assert len(encode_codes(codes)) < 0.92 * len(encode_codes(np.abs(codes) * signs))


@pytest.mark.parametrize('wrong', [0.0, 0.05])
def test_signs_alone_are_worth_it_where_all_sizes_are_one(wrong):
  # no input, output or level of neighbours has a score but 0
  rng = RNG(4)
  signs = np.broadcast_to(rng.choice([-1, 1], (40, 50)), (3, 3, 40, 50))
  codes = np.where(rng.random(signs.shape) < wrong, -signs, signs).astype(np.int8)
  payload = encode_codes(codes)
  np.testing.assert_array_equal(decode_codes(payload, codes.shape), codes)
  assert len(payload) < 0.5 * len(encode_codes(codes, contexts=False))


def test_codes_that_are_all_alike_take_their_entropy():
  codes = np.trunc(RNG(3).laplace(size=(3, 3, 64, 128))).astype(np.int8)
  assert len(encode_codes(codes)) <= 1.002 * entropy(codes) * codes.size / 8


@pytest.mark.parametrize('mask', [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_found(mask):
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


def test_other_shapes_are_found():
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
def test_noise_is_refused(data, shape):
  number = int(context_coding.MARKER, 2) << 6
  with pytest.raises(ValueError):
    decode_codes(number.to_bytes(2, 'big') + data, tuple(shape))


@pytest.mark.parametrize('shape', [(40, 40, 2, 3), (2, 2, 2, 2, 5, 6), (1, 1 << 19)])
def test_shapes_without_a_window_come_back(shape):
  codes = smooth_codes(shape)
  np.testing.assert_array_equal(decode_codes(encode_codes(codes), shape), codes)


def test_the_format_does_not_move():
  # one payload as it was written once: every later version must read it
  codes = np.array(
    [[[0, 1], [2, 0], [-1, 0]], [[0, 2], [3, 0], [-1, 1]], [[0, 1], [2, 0], [0, 0]]], np.int8
  )
  payload = bytes.fromhex('09110fd232207e47a0f21df008b207')
  np.testing.assert_array_equal(decode_codes(payload, codes.shape), codes)
