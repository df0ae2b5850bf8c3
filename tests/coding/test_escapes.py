import time
import tracemalloc
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opq_jax.coding import escapes
from opq_jax.coding import payload as entropy_coding

FLOAT32 = np.dtype(np.float32)
DTYPES = [
  np.dtype(scalar)
  for scalar in (
    *(np.float32, np.float16, np.float64),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
  )
]


def outliers(count, dtype=FLOAT32, seed=0):
  """Values of both signs whose exponents are much alike, as those beyond a grid are."""
  rng = np.random.default_rng(seed)
  return (rng.choice([-1, 1], count) * rng.uniform(8, 200, count)).astype(dtype)


def somewhere(size, count, seed=0):
  return np.sort(np.random.default_rng(seed).choice(size, count, replace=False))


def assert_round_trip(positions, values, size):
  data = escapes.encode(positions, values)
  assert escapes.encode(positions, values) == data
  places, found = escapes.decode(data, size, positions.size, values.dtype)
  assert places.dtype == np.int64 and found.dtype == values.dtype
  np.testing.assert_array_equal(places, positions)
  assert found.tobytes() == values.tobytes()
  return data


@given(
  st.sets(st.integers(0, 1 << 40), min_size=1, max_size=40),
  st.integers(0, 1 << 30),
  st.sampled_from(DTYPES),
  st.data(),
)
@settings(deadline=None)
def test_decode_any_escapes(places, rest, dtype, data):
  positions = np.array(sorted(places))
  size = len(places) * dtype.itemsize
  values = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype)
  assert_round_trip(positions, values, int(positions[-1]) + 1 + rest)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=20))
@settings(deadline=None)
def test_decode_clusters(runs):
  is_escaped = np.concatenate([np.repeat([False, True], pair) for pair in runs])
  positions = np.flatnonzero(is_escaped)
  data = assert_round_trip(positions, outliers(positions.size), is_escaped.size)
  # a run costs some bits, whatever its length
  assert len(data) - 4 * positions.size <= 40 + 6 * len(runs) + positions.size // 8


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('size', [1, 2, 100, 65_536, 65_537])
def test_decode_one_and_all(dtype, size):
  assert_round_trip(np.arange(size), outliers(size, dtype), size)
  for place in (0, size // 2, size - 1):
    assert len(assert_round_trip(np.array([place]), outliers(1, dtype), size)) <= 42


@pytest.mark.parametrize('size', [1 << 31, (1 << 62) - 1])
def test_decode_ends_of_huge_leaf(size):
  positions = np.array([0, 1, size // 2, size - 2, size - 1])
  assert_round_trip(positions, outliers(5), size)


@pytest.mark.parametrize('share', [2, 30, 1000, 100_000])
def test_encode_bits_of_positions(share):
  count = 20_000
  size = share * count
  values = np.frombuffer(np.random.default_rng(1).bytes(4 * count), np.float32)
  data = assert_round_trip(somewhere(size, count), values, size)
  assert 8 * len(data) / count == pytest.approx(np.log2(share) + 1.5 + 32, rel=0.1)
  # values that are noise hide what places cost
  places = 8 * (len(data) - 4 * count) / count
  assert places <= np.log2(share) + 1.6


def test_encode_bits_of_exponents():
  positions = somewhere(100_000, 1000)
  noise = np.frombuffer(np.random.default_rng(1).bytes(4000), np.float32)
  whole = len(escapes.encode(positions, noise))
  # of one octave, and of two that are as frequent: 24 and 25 bits, beside those of the places
  one = np.random.default_rng(2).uniform(8, 16, 1000).astype(np.float32)
  two = one * np.random.default_rng(3).choice([1, 2], 1000).astype(np.float32)
  for values, bits in ((one, 24), (two, 25)):
    size = len(escapes.encode(positions, values))
    assert size < whole
    assert 8 * size / 1000 == pytest.approx(np.log2(100) + 1.5 + bits, rel=0.02)


def test_encode_nothing():
  assert escapes.encode(np.zeros(0, np.int64), np.zeros(0, np.float32)) == b''
  places, values = escapes.decode(b'', 10, 0, FLOAT32)
  assert places.size == values.size == 0 and values.dtype == FLOAT32


def test_encode_in_bounded_memory():
  size = 10_000_000
  positions = np.arange(size)
  values = np.zeros(size, np.float32)
  tracemalloc.start()
  data = escapes.encode(positions, values)
  encoding = tracemalloc.get_traced_memory()[1]
  tracemalloc.reset_peak()
  places, found = escapes.decode(data, size, size, FLOAT32)
  decoding = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert places[-1] == size - 1 and not found.any()
  # of a weight: its bucket and its value; when decoded its place as well
  assert encoding <= 14 * size + (20 << 20)
  assert decoding <= 26 * size + (20 << 20)


# ---- damaged and hostile sections ----


def sealed(body):
  return body + zlib.crc32(body).to_bytes(4, 'little')


def two(heads=(0, 0), usual=0, rests=bytes(6), length=None):
  """Two values of float32."""
  coded = entropy_coding.encode_codes(np.array(heads, np.int8), contexts=False)
  length = len(coded) if length is None else length
  return length.to_bytes(4, 'little') + bytes([usual]) + coded + rests


def section(buckets, bits=b'', values=None, length=None):
  values = two() if values is None else values
  coded = entropy_coding.encode_codes(np.array(buckets, np.int8), contexts=False)
  length = len(coded) if length is None else length
  return sealed(length.to_bytes(4, 'little') + coded + bits + values)


def test_decode_section_by_hand():
  # gaps 3 and 5: of 2 and 3 bits, below whose leading ones are 1 and 01
  # exponents 127 and 128; a sign and a mantissa of 0, a mantissa of .5
  values = two([0, 1], 127, bytes([0, 0, 128, 0, 0, 64]))
  places, values = escapes.decode(section([2, 3], b'\xa0', values), 100, 2, FLOAT32)
  assert places.tolist() == [3, 9] and values.tolist() == [-1, 3]


@pytest.mark.parametrize('mask', [0x01, 0x80, 0xFF])
def test_decode_finds_flips_and_cuts(mask):
  data = escapes.encode(somewhere(1000, 20), outliers(20))
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= mask
    for bad in (bytes(damaged), data[:i], data + data[: i + 1]):
      with pytest.raises(ValueError):
        escapes.decode(bad, 1000, 20, FLOAT32)


HOSTILE = {
  'empty': b'',
  'only a checksum': sealed(b''),
  'no buckets': sealed(bytes(4)),
  'too many buckets': section([2, 3], b'\xa0', length=1 << 31),
  'negative buckets': section([-1, 3], b'\xa0'),
  'buckets of an int8': section([127, 127], bytes(32)),
  'a gap beyond the end': section([2, 7], b'\xff'),
  'gaps beyond the end': section([6, 6], b'\xff\xff'[:2]),
  'the place after the last': section([0, 7], b'\x8c'),
  'no bits': section([2, 3], b'', b''),
  'bits that are not padded': section([2, 3], b'\xa1'),
  'no values': section([2, 3], b'\xa0', b''),
  'fewer values': section([2, 3], b'\xa0', two(rests=bytes(5))),
  'more values': section([2, 3], b'\xa0', two(rests=bytes(7))),
  'no heads': section([2, 3], b'\xa0', bytes(5) + bytes(6)),
  'heads beyond the end': section([2, 3], b'\xa0', two(length=1 << 30)),
  'heads of fewer': section([2, 3], b'\xa0', two(heads=[0])),
}


def refused(data, size, count, match='found'):
  tracemalloc.start()
  began = time.process_time()
  with pytest.raises(ValueError, match=match):
    escapes.decode(data, size, count, FLOAT32)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < 1 and peak < 4 << 20


@pytest.mark.parametrize('name', HOSTILE)
def test_decode_refuses_sections(name):
  refused(HOSTILE[name], 100, 2)


def test_decode_refuses_wrapped_sums():
  size = (1 << 62) - 1
  count = 40
  bits = np.packbits(np.ones(61 * count, np.uint8)).tobytes()
  data = section([62] * count, bits, bytes(4 * count))
  refused(data, size, count, 'found an escaped weight beyond')


def test_decode_refuses_counts():
  data = escapes.encode(somewhere(1000, 20), outliers(20))
  for size, count in ((1000, 19), (1000, 21), (10, 20), (1 << 60, 1 << 59), (5, -1)):
    refused(data, size, count)
  refused(b'', 1 << 60, 1 << 59)
  with pytest.raises(ValueError, match='found 9 bytes of escaped weights, expected none'):
    escapes.decode(bytes(9), 10, 0, FLOAT32)


@given(st.binary(max_size=80), st.integers(1, 30), st.integers(0, 2000))
@settings(deadline=None)
def test_decode_refuses_noise(noise, count, rest):
  with pytest.raises(ValueError):
    escapes.decode(sealed(len(noise).to_bytes(4, 'little') + noise), count + rest, count, FLOAT32)
