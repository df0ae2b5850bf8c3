"""Scales of outputs: integers and numbers, and products that do not round."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opq_jax.coding import output_scales

CODES = np.arange(-127, 128).astype(np.int8)


def test_scales_of_codes_rise_and_come_back():
  scales = output_scales.scales_of(CODES)
  assert (np.diff(scales) > 0).all() and scales[127] == 1
  np.testing.assert_array_equal(output_scales.codes_of(scales), CODES)
  ratio = scales[1:] / scales[:-1]
  assert ratio.min() > 1.06 and ratio.max() <= 1.125


@given(st.floats(2.0**-15, 2.0**15))
def test_nearest_codes_are_nearest(scale):
  scales = output_scales.scales_of(CODES)
  found = output_scales.scales_of(output_scales.nearest_codes(np.array([scale])))[0]
  assert abs(found - scale) == np.abs(scales - scale).min()


def test_rounding_to_scales_loses_a_thousandth_of_a_bit():
  best = np.exp2(np.linspace(0, 1, 10_000, endpoint=False))
  miss = np.log2(output_scales.scales_of(output_scales.nearest_codes(best)) / best)
  # of errors that are equal with the best scales, by the arithmetic over the geometric mean
  lost = 0.5 * np.log2(np.mean(np.exp2(2 * miss))) - np.mean(miss)
  assert 9e-4 < lost < 1.1e-3


@given(st.integers(1, (1 << output_scales.GRID_BITS) - 1), st.integers(-60, 60))
def test_products_with_scales_are_exact(number, exponent):
  number = np.ldexp(np.float32(number), exponent)
  scales = output_scales.scales_of(CODES)
  exact = number.astype(np.float64) * scales.astype(np.float64)
  np.testing.assert_array_equal(number * scales, exact)


@given(st.lists(st.sampled_from(CODES.tolist()), min_size=1, max_size=60))
def test_section_round_trip(codes):
  scales = output_scales.scales_of(np.array(codes, np.int8))
  section = output_scales.encode(scales)
  np.testing.assert_array_equal(output_scales.decode(section, len(codes)), scales)
  with pytest.raises(ValueError):
    output_scales.decode(section, len(codes) + 1)


@pytest.mark.parametrize('scale', [1.3, 0.0, -1.0, np.nan, np.inf, 2.0**40])
def test_codes_of_refuses_other_numbers(scale):
  with pytest.raises(ValueError, match='found an output scale of'):
    output_scales.codes_of(np.array([1.0, scale], np.float32))


def test_decode_refuses_code_without_scale():
  from opq_jax.coding import encode_codes

  section = encode_codes(np.array([0, -128, 1], np.int8), contexts=False)
  with pytest.raises(ValueError, match='found a code of an output scale of -128'):
    output_scales.decode(section, 3)


def test_output_of_every_weight():
  shape = 3, 4, 2
  for axis in range(3):
    expected = np.indices(shape)[axis].reshape(-1)
    for start, stop in itertools.combinations(range(0, 25, 5), 2):
      found = output_scales.output_of(shape, axis, start, stop)
      np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize(('an_octave', 'bits'), [(4, 0.0040), (8, 0.0010), (16, 0.0003)])
def test_bits_lost_by_rounding_to_scales_of_an_octave(an_octave, bits):
  """Equal costs s^2 D need the very s: others cost half of log2(arithmetic / geometric mean)."""
  wanted = np.exp2(np.linspace(0, 1, 1 << 16, endpoint=False))
  there = 1 + np.arange(an_octave + 1) / an_octave
  ratio = there[np.abs(wanted[:, None] - there).argmin(axis=1)] / wanted
  lost = 0.5 * np.log2(np.square(ratio).mean()) - np.log2(ratio).mean()
  assert lost == pytest.approx(bits, abs=5e-5)
  if an_octave == 8:
    np.testing.assert_array_equal(there[:-1], output_scales.OCTAVE)
