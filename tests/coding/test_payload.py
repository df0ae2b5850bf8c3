import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opq_jax.coding import ans, frequencies
from opq_jax.coding.payload import decode_codes, encode_codes, entropy

INT8 = st.integers(-128, 127)


def laplace_codes(size, threshold=0.8, step=1.3, seed=0):
  weights = np.random.default_rng(seed).laplace(size=size)
  cells = 1 + np.floor((np.abs(weights) - threshold) / step)
  return (np.sign(weights) * np.clip(cells, 0, 127)).astype(np.int8)


def assert_round_trip(codes):
  payload = encode_codes(codes)
  decoded = decode_codes(payload, codes.shape)
  assert decoded.dtype == np.int8 and decoded.shape == codes.shape
  np.testing.assert_array_equal(decoded, codes)
  plain = encode_codes(codes, contexts=False)
  assert len(payload) <= len(plain)
  np.testing.assert_array_equal(decode_codes(plain, codes.shape), codes)
  return payload


@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=5, max_side=20, min_side=0)))
@settings(deadline=None)
def test_decode_any_codes(codes):
  assert_round_trip(codes)


@given(st.lists(st.tuples(INT8, st.integers(1, 5000)), max_size=6))
@settings(deadline=None)
def test_decode_runs(runs):
  # long runs of whatever symbol first: the length check must never refuse what was encoded
  assert_round_trip(
    np.concatenate([np.zeros(0, np.int8), *(np.full(n, c, np.int8) for c, n in runs)])
  )


@pytest.mark.parametrize('first, second', [(0, 1), (1, 0), (-1, 0), (0, -1), (-128, 127), (5, 0)])
@pytest.mark.parametrize('share', [1, 1000, 100_000, 199_999])
def test_decode_two_long_runs(first, second, share):
  runs = np.repeat(np.array([first, second], np.int8), [200_000 - share, share])
  assert_round_trip(runs)
  assert_round_trip(runs[::-1])


@pytest.mark.parametrize('value', [0, 1, -1, 127, -128])
@pytest.mark.parametrize('size', [1, 2, 300, 65_535, 65_536, 65_537, 1_000_000])
def test_encode_constant_codes(value, size):
  payload = assert_round_trip(np.full(size, value, np.int8))
  assert len(payload) <= 32


def test_decode_every_symbol():
  assert_round_trip(np.arange(-128, 128, dtype=np.int8))
  assert_round_trip(np.random.default_rng(0).integers(-128, 128, 100_000, dtype=np.int8))


def test_encode_no_codes():
  assert encode_codes(np.zeros((0, 3), np.int8)) == b''
  assert decode_codes(b'', (0, 3)).shape == (0, 3)


def test_encode_strided_codes():
  codes = laplace_codes(4000).reshape(40, 100)
  payload = encode_codes(codes.T)
  np.testing.assert_array_equal(decode_codes(memoryview(payload), (100, 40)), codes.T)
  assert payload == encode_codes(codes.T.copy())


def test_encode_refuses_dtypes():
  with pytest.raises(ValueError, match='found codes of dtype int32, expected int8'):
    encode_codes(np.zeros(3, np.int32))


@pytest.mark.parametrize('threshold, step', [(0.36, 0.66), (0.8, 1.3), (1.4, 2.2), (3.0, 4.0)])
def test_encode_takes_the_entropy(threshold, step):
  codes = laplace_codes(100_000, threshold, step)
  assert len(encode_codes(codes)) <= 1.005 * entropy(codes) * codes.size / 8


def test_encode_small_table():
  codes = laplace_codes(288, 0.36, 0.66)
  assert len(np.unique(codes)) >= 10
  assert len(encode_codes(codes)) <= entropy(codes) * codes.size / 8 + 18


def test_decode_golden_payload():
  # one payload of version 1 as it was written once: every later version must read it
  payload = bytes.fromhex('3ddb548058139acebb4905')
  codes = np.array([0, 0, 1, -1, 0, 2, 0, 0, -3, 1, 0, 0, 0, 0, -1, 0], np.int8)
  np.testing.assert_array_equal(decode_codes(payload, (16,)), codes)
  assert encode_codes(codes) == payload


def test_encode_unknown_symbol_fails():
  model = frequencies.fit(frequencies.histogram(np.array([0, 0, 1, 2], np.int8)))
  with pytest.raises(KeyError):
    model.encode(ans.begin(np.zeros(1, np.int8)), np.array([-1], np.int8))


@pytest.mark.parametrize('codes, bits', [([0, 0, 1, -1], 1.5), ([7] * 9, 0.0), ([], 0.0)])
def test_entropy(codes, bits):
  assert entropy(np.array(codes, np.int8)) == bits


@pytest.mark.parametrize('mask', [0x01, 0x80, 0xFF])
def test_decode_finds_flips(mask):
  codes = laplace_codes(500)
  payload = encode_codes(codes)
  for i in range(len(payload)):
    damaged = bytearray(payload)
    damaged[i] ^= mask
    with pytest.raises(ValueError):
      decode_codes(bytes(damaged), codes.shape)


def test_decode_finds_cuts():
  codes = laplace_codes(500)
  payload = encode_codes(codes)
  for length in range(len(payload)):
    with pytest.raises(ValueError):
      decode_codes(payload[:length], codes.shape)
  for tail in (b'\0', b'\1', b'\0\0\0\0', b'\0\0\0\1'):
    with pytest.raises(ValueError):
      decode_codes(payload + tail, codes.shape)


@pytest.mark.parametrize('size', [-1, 0, 1, 499, 501, 10_000])
def test_decode_refuses_other_sizes(size):
  payload = encode_codes(laplace_codes(500))
  with pytest.raises(ValueError):
    decode_codes(payload, (size,))


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=300)
def test_decode_refuses_noise(data, size):
  if size or data:
    with pytest.raises(ValueError):
      decode_codes(data, (size,))


@pytest.mark.parametrize('codes', [np.zeros(1000, np.int8), laplace_codes(500)])
@pytest.mark.parametrize('size', [10**8, 10**12, 10**30])
def test_decode_refuses_huge_sizes(codes, size):
  payload = encode_codes(codes)
  tracemalloc.start()
  began = time.perf_counter()
  with pytest.raises(ValueError, match=f'expected {size}'):
    decode_codes(payload, (size,))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.perf_counter() - began < 0.5 and peak < 1 << 20
