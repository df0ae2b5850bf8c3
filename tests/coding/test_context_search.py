import numpy as np
import pytest

from opq_jax.coding.payload import decode_codes, encode_codes, entropy
from tests.helpers.kernels import scaled_codes, smooth_codes

RNG = np.random.default_rng


def test_encode_scales_of_channels():
  # what a coder pays that knows the scale of every input and output beforehand
  rng = RNG(1)
  inputs, outputs = np.exp2(rng.integers(-2, 3, 400)), np.exp2(rng.integers(-2, 3, 500))
  scales = inputs[:, None] * outputs
  codes = np.clip(np.trunc(rng.laplace(size=scales.shape) * scales), -127, 127).astype(np.int8)
  ideal = sum(entropy(c) * c.size for c in (codes[scales == s] for s in np.unique(scales))) / 8
  assert ideal < 0.9 * entropy(codes) * codes.size / 8
  assert ideal < len(encode_codes(codes)) < 1.02 * ideal


def test_encode_large_window():
  # although the encoder tries less where there are more than 2**16 weights
  codes, _ = scaled_codes((3, 3, 64, 144))
  codes[1:] = codes[:1] + codes[1:] // 4  # worth looking at neighbours
  halves = codes[..., ::2], codes[..., 1::2]
  apart = sum(len(encode_codes(half.copy())) for half in halves)
  assert len(encode_codes(codes)) < 1.02 * apart


def test_encode_scores_and_signs():
  # these tell the sign and little of the size, which is that of the input and the output
  rng, shape = RNG(5), (3, 3, 48, 128)
  inputs, outputs = (np.exp2(rng.integers(-2, 4, n)) for n in shape[-2:])
  scales = np.broadcast_to(inputs[:, None] * outputs, shape)
  sizes = np.minimum(np.trunc(rng.exponential(size=shape) * scales), 127)
  codes = (sizes * rng.choice([-1, 1], shape[-2:])).astype(np.int8)
  ideal = sum(entropy(c) * c.size for c in (np.abs(codes)[scales == s] for s in np.unique(scales)))
  ideal += (codes != 0).any((0, 1)).sum()  # a sign of each window
  assert 8 * len(encode_codes(codes)) < 1.12 * ideal


def test_encode_small_kernel():
  codes, _ = scaled_codes((60, 5, 12))
  assert len(encode_codes(codes)) < 0.905 * len(encode_codes(codes, contexts=False))


def test_encode_smooth_windows():
  codes = smooth_codes((5, 5, 48, 64))
  first = len(encode_codes(codes))
  last = len(encode_codes(np.ascontiguousarray(codes.transpose(3, 2, 0, 1))))
  assert first < 0.8 * len(encode_codes(codes, contexts=False))
  assert last == pytest.approx(first, rel=0.005)


def test_encode_flips_signs():
  # sizes alone, with signs at random: then only those of the neighbours are lost
  codes = smooth_codes((3, 3, 64, 64))
  signs = RNG(2).choice(np.array([-1, 1], np.int8), codes.shape)
  assert len(encode_codes(codes)) < 0.92 * len(encode_codes(np.abs(codes) * signs))


@pytest.mark.parametrize('wrong', [0.0, 0.05])
def test_encode_signs_alone(wrong):
  # no input, output or level of neighbours has a score but 0
  rng = RNG(4)
  signs = np.broadcast_to(rng.choice([-1, 1], (40, 50)), (3, 3, 40, 50))
  codes = np.where(rng.random(signs.shape) < wrong, -signs, signs).astype(np.int8)
  payload = encode_codes(codes)
  np.testing.assert_array_equal(decode_codes(payload, codes.shape), codes)
  assert len(payload) < 0.5 * len(encode_codes(codes, contexts=False))


def test_encode_codes_all_alike():
  codes = np.trunc(RNG(3).laplace(size=(3, 3, 64, 128))).astype(np.int8)
  assert len(encode_codes(codes)) <= 1.002 * entropy(codes) * codes.size / 8
