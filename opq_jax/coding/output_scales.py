"""Scales of a leaf's outputs: numbers of four significant bits, told by small integers.

An output j of a leaf may have a scale s_j.  Its grid is then the leaf's grid with threshold, first
value and step times s_j.  The integer c, -127 to 127, tells the scale

    s = (1 + (c mod 8) / 8) 2^floor(c / 8)

so an octave has eight scales, 6 to 12.5 % apart.  Rounding to them loses .0010 bits a weight, to
four an octave .0040, to sixteen .0003, and twice as many take another bit an output: of some
hundred to a thousand inputs, eight take the least.

Four bits of a scale and the `GRID_BITS` of a grid's own numbers are the bits of a float32: no
product with a scale rounds (`opq_jax.compression.records.exact_grid`).
"""

import math

import numpy as np

from opq_jax.coding.payload import decode_codes, encode_codes
from opq_jax.core.array_types import Float32, Int8, Int64

SCALE_BITS = 4
"""Significant bits of a scale."""

GRID_BITS = 24 - SCALE_BITS
"""Significant bits of a number whose product with any scale float32 holds exactly."""

_AN_OCTAVE = 1 << (SCALE_BITS - 1)
_LARGEST = 127  # code: -128 is no code of a scale


def scales_of(codes: Int8[np.ndarray, '...']) -> Float32[np.ndarray, '...']:
  """Returns the scales that integers tell.

  >>> scales_of(np.array([0, 4, 8, -8, -1], np.int8)).tolist()
  [1.0, 1.5, 2.0, 0.5, 0.9375]
  """
  octave, place = np.divmod(np.asarray(codes, np.int32), _AN_OCTAVE)
  return np.ldexp(np.float32(1) + place.astype(np.float32) / _AN_OCTAVE, octave)


OCTAVE = scales_of(np.arange(_AN_OCTAVE, dtype=np.int8))
"""The scales of one octave, from 1 on."""


def nearest_codes(scales: Float32[np.ndarray, '...']) -> Int8[np.ndarray, '...']:
  """Returns the integers of the nearest scales that there are; of positive numbers.

  >>> nearest_codes(np.array([1.03, 3.1, 1e-9], np.float32)).tolist()
  [0, 12, -127]
  """
  mantissa, exponent = np.frexp(np.asarray(scales, np.float64))
  # of a mantissa of 1/2 to 1; one that rounds up to 1 is the first scale of the next octave
  place = np.rint((2 * mantissa - 1) * _AN_OCTAVE).astype(np.int64)
  codes = (exponent - 1) * _AN_OCTAVE + place
  return np.clip(codes, -_LARGEST, _LARGEST).astype(np.int8)


def codes_of(scales: Float32[np.ndarray, ' outputs']) -> Int8[np.ndarray, ' outputs']:
  """Returns the integers that tell scales.

  Raises:
    ValueError: one of them is none of `scales_of`.
  """
  scales = np.asarray(scales, np.float32)
  is_positive = np.isfinite(scales) & (scales > 0)
  codes = nearest_codes(np.where(is_positive, scales, 1))
  is_other = ~is_positive | (scales_of(codes) != scales)
  if is_other.any():
    raise ValueError(
      f'found an output scale of {scales[is_other][0]}, expected (1 + m / {_AN_OCTAVE}) 2^n with '
      f'whole m below {_AN_OCTAVE}'
    )
  return codes


def encode(scales: Float32[np.ndarray, ' outputs']) -> bytes:
  """Returns the section of scales in a payload: a plain payload of their integers.

  Raises:
    ValueError: as `codes_of`.

  >>> section = encode(np.array([1, 1, 0.75, 1.5], np.float32))
  >>> decode(section, 4).tolist()
  [1.0, 1.0, 0.75, 1.5]
  """
  return encode_codes(codes_of(scales), contexts=False)


def decode(data: bytes, outputs: int) -> Float32[np.ndarray, ' outputs']:
  """Returns the scales of a section.

  Raises:
    ValueError: `data` is no section of so many scales.
  """
  codes = decode_codes(data, (outputs,))
  if codes.min(initial=0) < -_LARGEST:
    raise ValueError(f'found a code of an output scale of {codes.min()}, expected -127 to 127')
  return scales_of(codes)


def section_bits(codes: Int8[np.ndarray, ' outputs']) -> float:
  """Returns the bits of the section that tells scales, given their integers."""
  return 8.0 * len(encode_codes(codes, contexts=False))


def output_of(
  shape: tuple[int, ...], axis: int, start: int, stop: int
) -> Int64[np.ndarray, ' weights']:
  """Returns the output of each weight of a run in C order.

  Args:
    shape: of the leaf.
    axis: of its outputs.
    start, stop: the run.

  >>> output_of((2, 3), 1, 1, 5).tolist(), output_of((2, 3), 0, 1, 5).tolist()
  ([1, 2, 0, 1], [0, 0, 1, 1])
  """
  return np.arange(start, stop) // math.prod(shape[axis + 1 :]) % shape[axis]
