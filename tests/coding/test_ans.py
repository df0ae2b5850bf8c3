import zlib

import numpy as np
import pytest

from opq_jax.coding import encode_codes, frequencies


def golomb_of(bits, k):
  """Takes a number in the exponential Golomb code of order k off a list of bits."""
  zeros = 0
  while bits[zeros] == 0:
    zeros += 1
  number = int(''.join(map(str, bits[: 2 * zeros + k + 1])), 2)
  del bits[: 2 * zeros + k + 1]
  return number - 2**k


def described_table(bits):
  """Takes a table off bits, as `opq_jax.coding.frequencies` says; symbols that occur and P."""
  precision = int(''.join(map(str, bits[:4])), 2) + 1
  del bits[:4]
  largest, least = golomb_of(bits, 2), -golomb_of(bits, 2)
  symbols = [s for size in range(1, 129) for s in (size, -size) if least <= s <= largest]
  counts, before = [], 2**precision >> 3
  for _ in symbols:
    before = golomb_of(bits, max(0, before.bit_length() - 2))
    counts.append(before)
  known = {0: 2**precision - sum(counts), **dict(zip(symbols, counts, strict=True))}
  return {symbol: count for symbol, count in known.items() if count}, precision


def described_codes(payload, size):
  """Decodes a plain payload with whole numbers alone, as `opq_jax.coding.ans` says."""
  bits = [int(bit) for byte in payload for bit in f'{byte:08b}']
  table, precision = described_table(bits)
  data = payload[-(len(bits) // 8) :]
  data += bytes(-len(data) % 4)
  stack = [int.from_bytes(data[i : i + 4], 'little') for i in range(0, len(data), 4)]
  state = stack.pop()
  if stack:
    state = state << 32 | stack.pop()
  begins, total = [], 0
  for place, count in enumerate(table.values()):
    begins.append(place + (total * (2**24 - len(table)) >> precision))
    total += count
  begins.append(2**24)
  symbols, codes = list(table), []
  for _ in range(size):
    slot = state % 2**24
    place = max(i for i in range(len(table)) if begins[i] <= slot)
    state = (state >> 24) * (begins[place + 1] - begins[place]) + slot - begins[place]
    if state < 2**32 and stack:
      state = state << 32 | stack.pop()
    codes.append(symbols[place])
  return np.array(codes, np.int8), [*stack, state]


@pytest.mark.parametrize('scale', [0.2, 1.0, 5.0, 60.0])
@pytest.mark.parametrize('size', [1, 3, 50, 2000])
def test_words_are_as_described(scale, size):
  rng = np.random.default_rng(size)
  codes = np.clip(np.rint(scale * rng.laplace(size=size)), -128, 127).astype(np.int8)
  payload = encode_codes(codes, contexts=False)
  decoded, left = described_codes(payload, size)
  np.testing.assert_array_equal(decoded, codes)
  assert left == [zlib.crc32(codes.tobytes()) | 1 << 31]


def test_fit_keeps_two_symbols():
  for codes in (np.zeros(5, np.int8), np.full(5, 7, np.int8), np.full(5, -128, np.int8)):
    model = frequencies.fit(frequencies.histogram(codes))
    assert np.count_nonzero(model.frequencies) == 2 and model.least_bits > 0


def test_hostile_tables_are_value_errors():
  # each frequency sets the order of the code of the next: numbers that are not bounded explode
  bits = f'{15:04b}' + frequencies.golomb(127, 2) + frequencies.golomb(128, 2)
  previous = 1 << 13
  for _ in range(256):
    number = 2 * previous * (1 << 14)
    bits += frequencies.golomb(number, frequencies._order(previous))
    previous = number
    with pytest.raises(ValueError, match='table of frequencies'):
      frequencies.read_table(bits, 0)
    if len(bits) > 4000:
      break
