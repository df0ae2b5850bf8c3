"""Bins of a histogram of magnitudes: the upper 16 bits of |w| as a float32.

There are 128 bins an octave, of equal width within it, over the BINS / 128 octaves that end with
the octave of the leaf's largest |w|.  So a histogram is as fine for the small weights of a leaf as
for an outlier of a thousand standard deviations, holds bfloat16 and narrower weights exactly, and
the histograms of two parts of a leaf add up exactly.  Bin 0 counts every smaller magnitude (by a
factor of 2**-32 or more), zeros included.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

BINS_AN_OCTAVE = 128
"""The seven upper bits of a mantissa: all that bfloat16 has."""

BINS = 32 * BINS_AN_OCTAVE
"""Bins per sign: 32 octaves, over nine decades of magnitude."""

FINE_BINS = 1 << 12
"""Parts of one bin in a second look; each holds 16 numbers of float32."""

_SHIFT = 16  # bits of a float32 below its bin
_FINE_SHIFT = 4  # bits of a float32 below its part of a bin
_MANTISSA = 23  # bits of a float32 below its exponent
_LEAST_NORMAL = 1 << _MANTISSA  # the least normal float32, as bits


def _bits(magnitude: Float32[Array, '...']) -> Int32[Array, '...']:
  return lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)


def _end(largest: Float32[Array, '...']) -> Int32[Array, '...']:
  """Returns the bin after the octave of the largest |w|, counted from the bin of 0.0."""
  return ((_bits(largest) >> _MANTISSA) + 1) << (_MANTISSA - _SHIFT)


def bin_of(magnitude: Float32[Array, '...'], largest: Float32[Array, '']) -> Int32[Array, '...']:
  """Returns the bin of |w|, 0 ... BINS - 1.

  Args:
    magnitude: |w|.
    largest: largest |w| of the leaf; the bins end with its octave.

  >>> bin_of(jnp.float32([0.0, 1.0, 1.5, 1.999]), jnp.float32(1.7)).tolist()
  [0, 3968, 4032, 4095]
  """
  bits = _bits(magnitude)
  index = (bits >> _SHIFT) - (_end(largest) - BINS)
  # XLA flushes denormal numbers to zero, so they count as zeros
  return jnp.where(bits < _LEAST_NORMAL, 0, jnp.clip(index, 0, BINS - 1))


def signed_counts(
  weights: Float32[np.ndarray, '...'], largest: Float32[np.ndarray, '']
) -> Int32[np.ndarray, '2 bins']:
  """Counts weights on the host by sign (row 0: w >= 0, row 1: w < 0) and by `bin_of` |w|."""
  bits = np.abs(weights).view(np.int32)
  end = ((np.asarray(largest, np.float32).view(np.int32) >> _MANTISSA) + 1) << (_MANTISSA - _SHIFT)
  index = np.clip((bits >> _SHIFT) - (end - BINS), 0, BINS - 1)
  index = np.where(bits < _LEAST_NORMAL, 0, index + np.where(weights < 0, BINS, 0))
  return np.bincount(index.ravel(), minlength=2 * BINS).astype(np.int32).reshape(2, BINS)


def fine_bin_of(magnitude: Float32[Array, '...']) -> Int32[Array, '...']:
  """Returns the part of its bin in which |w| lies, 0 ... FINE_BINS - 1."""
  return _bits(magnitude) >> _FINE_SHIFT & (FINE_BINS - 1)


def bin_edge(
  index: Int32[Array, '...'], largest: Float32[Array, '...'], fine: Int32[Array, '...'] | int = 0
) -> Float32[Array, '...']:
  """Returns the inner edge of a bin, or of the part `fine` of it, 0 where it is denormal.

  Bin 0 also counts the magnitudes below its edge.

  >>> bin_edge(jnp.int32([3968, 4032, 4096]), jnp.float32(1.7)).tolist()
  [1.0, 1.5, 2.0]
  """
  bits = ((index + _end(largest) - BINS) << _SHIFT) + (fine << _FINE_SHIFT)
  bits = jnp.where(bits < _LEAST_NORMAL, 0, bits)
  return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def bin_position(
  magnitude: Float[Array, '...'], largest: Float32[Array, '...']
) -> Float[Array, '...']:
  """Returns the place of |w| among the bins: its bin, and the part of the bin below it.

  Within a bin the place is linear in |w|.  It lies between 0 and BINS.
  """
  bits = _bits(magnitude.astype(jnp.float32))
  whole = (bits >> _SHIFT) - (_end(largest) - BINS)
  part = (bits & ((1 << _SHIFT) - 1)).astype(magnitude.dtype) / (1 << _SHIFT)
  return jnp.clip(whole.astype(magnitude.dtype) + part, 0, BINS)
