"""Predicted bits of codes: entropy, frequency tables, checksums and escaped weights."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from opq_jax.allocation.bins import BINS_AN_OCTAVE
from opq_jax.allocation.histogram_sums import Sums

CODER_BITS = 40
"""Bits of a payload beside table and codes: a checksum of 32, and one byte of the coder's state."""

# additions of `opq_jax.coding` to the entropy; tests hold the sum to 1.5 % of actual payloads
_BITS_OF_PRECISION = 4  # the field of a table that tells how precise its frequencies are
_BITS_OF_PLACE = 0.02  # of an escaped weight, over the entropy of the places of escaped weights
_BITS_OF_ESCAPES = 190.0  # of a section of escaped weights: its checksum, tables and entry
_BITS_OF_EMPTY = 1.5  # of an empty cell that the frequency table lists before a later one
_LISTED = 0.1  # expected weights in a cell from which on the table is taken to reach it


def payload_bits(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  escaped: Float[Array, 'leaves levels'],
  sizes: Float[Array | np.ndarray, 'leaves'],
  value_bits: Float[Array, 'leaves'],
) -> Float[Array, 'leaves levels']:
  """Returns bits per weight of each leaf's payload in a file, for every number of levels a sign.

  A payload takes the zeroth-order entropy of the codes, in which an escaped weight has the code of
  a pruned one.  To it `opq_jax.coding.payload` adds a table (a frequency f in about 2 + log2 f
  bits, and the bounds of the alphabet) and a checksum, which is not little in a small leaf.  An
  escaped weight takes the bits of its value and, unless all weights escape, those of its position.

  Args:
    pruned: share of the weights.
    cells: share of the weights in each cell of a sign.
    escaped: share of the weights beyond the last cell, for 0, 1, ... levels.
    sizes: weights of each leaf.
    value_bits: bits of an escaped value in each leaf.  One number for all levels is approximate;
      `escaped_value_bits` is exact for one of them.
  """
  dtype = cells.dtype
  # the precision P of the frequencies grows with the size, up to 16 bits
  # (`opq_jax.coding.frequencies.fit`)
  # the exponent of a whole number is its bit length; P is 16 from 20 bits on
  bits = jnp.frexp(jnp.minimum(sizes, 2.0**20))[1]
  precision = jnp.minimum(1 + 3 * bits // 4, 16)
  whole = jnp.ldexp(jnp.ones_like(sizes), precision)[:, None, None]
  # an expected count below one is the probability that the cell occurs at all
  occurs = jnp.minimum(cells * sizes[:, None, None], 1)
  # an empty cell is listed where an occupied one follows
  number = np.arange(1, cells.shape[2] + 1, dtype=np.int32)[None, None]
  listed = lax.cummax(jnp.where(occurs > _LISTED, number, 0), axis=2).astype(dtype)
  each = occurs * (2 + jnp.log2(jnp.maximum(cells * whole, 1)))
  # no frequency is below 1: rare codes take fewer bits than their share says, all others more
  surprise = -cells * jnp.log2(jnp.maximum(cells, 1 / whole))
  raised = occurs * jnp.maximum(1 / whole - cells, 0)
  # summed together: XLA compiles several kernels for each cumulative sum
  of_both_signs = [jnp.sum(x, axis=1, keepdims=True) for x in (surprise, raised)]
  sums = jnp.cumsum(jnp.concatenate([occurs, each, *of_both_signs], axis=1), axis=2)
  empty = jnp.maximum(listed - sums[:, :2], 0)
  table = sums[:, 2:4] + _BITS_OF_EMPTY * empty + 2 * jnp.log2(listed + 4)
  surprise, raised = sums[:, 4], sums[:, 5]
  first = lambda x, value: jnp.pad(x, ((0, 0), (1, 0)), constant_values=value)
  # without levels the bounds of the alphabet are still written: 2 log2(4) bits for each sign
  table = first(jnp.sum(table, axis=1), 2 * 2 * 2.0)
  codes = first(surprise, 0.0)
  codes = codes - times_log2(pruned[:, None] + escaped) + jnp.log2(1 + first(raised, 0.0))
  beside = escaped * (value_bits[:, None] + _BITS_OF_PLACE)
  beside = beside - times_log2(escaped) - times_log2(1 - escaped)
  beside = beside + jnp.where(escaped > 0, _BITS_OF_ESCAPES / sizes[:, None], 0)
  return codes + (_BITS_OF_PRECISION + CODER_BITS + table) / sizes[:, None] + beside


def escaped_value_bits(
  sums: Sums, escaped: Float[Array, 'leaves'], mantissa: Float[Array, 'leaves']
) -> Float[Array, 'leaves']:
  """Returns the bits of a value beyond an edge: sign, mantissa, and its exponent's entropy.

  Args:
    sums: the histograms.
    escaped: share of the weights beyond the edge.
    mantissa: bits of the mantissa of the leaf's dtype.
  """
  # an octave of magnitudes has one exponent
  octaves = jnp.sum(sums.columns[:, ::BINS_AN_OCTAVE, :2], axis=2)
  # the first bin holds zeros, and they do not escape
  octaves = octaves.at[:, 0].set(sums.nonzero())
  # the edge cuts its own octave: no more is beyond an octave's lower end than beyond the edge
  beyond = jnp.minimum(octaves, escaped[:, None])
  share = (beyond[:, :-1] - beyond[:, 1:]) / jnp.maximum(beyond[:, :1], 1e-30)
  return 1 + mantissa - jnp.sum(times_log2(jnp.maximum(share, 0)), axis=1)


def times_log2(x: Float[Array, '...']) -> Float[Array, '...']:
  """Returns x log2 x, 0 at 0."""
  return x * jnp.log2(jnp.where(x > 0, x, 1))


def code_entropy(
  pruned: Float[Array, 'leaves'],
  cells: Float[Array, 'leaves 2 cells'],
  escaped: Float[Array, 'leaves'],
  value_bits: Float[Array, 'leaves'],
) -> Float[Array, 'leaves']:
  """Returns the zeroth-order entropy of each leaf's codes and escaped values, bits per weight.

  Args:
    pruned, cells, escaped: shares of the weights.
    value_bits: bits of an escaped value.
  """
  codes = times_log2(pruned) + jnp.sum(times_log2(cells), axis=(1, 2)) + times_log2(escaped)
  return escaped * value_bits - codes
