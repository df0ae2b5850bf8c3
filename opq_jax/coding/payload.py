"""Payloads: arrays of integer codes to bytes and back, at their entropy or below it.

A payload codes one array, in the shorter of two ways.  A plain payload takes the entropy of the
codes in C order:

    [table of frequencies, padded with zeros to whole bytes][words of an ANS]

as in `opq_jax.coding.frequencies` and `opq_jax.coding.ans`.  A payload with contexts
(`opq_jax.coding.contexts`) knows the axes of the kernel and takes less; it begins with bits that
begin no table.  An empty array has an empty payload.

The words end in the checksum of the codes, one byte more than words without it.  A decoder must
find it there.

No symbol is ever certain, so the length of a payload bounds the number of codes in it:
`decode_codes` refuses a shape that the payload cannot hold before it allocates anything.
"""

import math

import numpy as np

from opq_jax.coding import ans, arrangements, axis_orders, frequencies, trellis
from opq_jax.coding import contexts as context_coding
from opq_jax.core.array_types import Int8

_MAX_TABLE_BYTES = 1200
"""Bytes of a table: 255 frequencies of at most 33 bits, the bounds of the alphabet, and P."""


def entropy(codes: Int8[np.ndarray, '...']) -> float:
  """Returns the empirical zeroth-order entropy of codes in bits per code.

  sum_c (n_c / n) log2(n / n_c) over the n_c codes c of n.  Where codes follow the trellis of
  `opq_jax.coding.trellis` in some order of their axes, the entropy of their indices given their
  subsets.  The code -128 of an escaped weight is a symbol like any other; along a trellis it takes
  the place of a 0.

  >>> entropy(np.array([0, 0, 1, -1], np.int8))
  1.5
  """
  escaped = codes == -128
  # a writer codes 0 in the place of an escape, and the trellis goes through that 0
  on_grid = np.where(escaped, np.int8(0), codes) if escaped.any() else codes
  axes = axis_orders.of_trellis(on_grid)
  on_grid, escaped = on_grid.transpose(axes), escaped.transpose(axes)
  for arrangement in arrangements.choices(on_grid.shape):
    # codes that were not chosen along a trellis leave it within a few weights: the test is cheap
    along_trellis = trellis.indices_and_subsets(arrangements.arranged(on_grid, arrangement)[0])
    if along_trellis is not None:
      indices, subsets = along_trellis
      indices[arrangements.arranged(escaped, arrangement)[0]] = -128
      counts = [frequencies.histogram(indices[subsets == q]) for q in (0, 1)]
      bits = sum(float(frequencies.ideal_bits(count)) for count in counts)
      return bits / max(codes.size, 1)
  return float(frequencies.ideal_bits(frequencies.histogram(codes))) / max(codes.size, 1)


def encode_codes(codes: Int8[np.ndarray, '...'], *, contexts: bool = True) -> bytes:
  """Returns the payload of codes.

  Args:
    codes: int8, of any shape and any values.
    contexts: whether to try them; a plain payload is encoded 6 to 60 times faster and takes the
      entropy (`experiments.benchmarks.rate.payload`).

  Returns:
    The payload, empty where `codes` is.  The same codes make the same bytes.

  Raises:
    ValueError: `codes` is not int8.

  >>> payload = encode_codes(np.array([0, 3, 0, 0, -1, 0], np.int8))
  >>> decode_codes(payload, (6,)).tolist()
  [0, 3, 0, 0, -1, 0]
  """
  if codes.dtype != np.int8:
    raise ValueError(f'found codes of dtype {codes.dtype}, expected int8')
  if codes.size == 0:
    return b''
  codes = np.ascontiguousarray(codes)
  model = frequencies.fit(frequencies.histogram(codes))
  coder = ans.begin(codes)
  model.encode(coder, codes.reshape(-1))
  plain = frequencies.to_bytes(frequencies.write_table(model)) + ans.end(coder)
  with_contexts = None
  if contexts:
    from opq_jax.coding import context_search  # a reader needs no encoder

    with_contexts = context_search.encode(codes)
  # of equal lengths `min` takes the plain one, which decodes faster
  return plain if with_contexts is None else min(plain, with_contexts, key=len)


def decode_codes(data: bytes | memoryview, shape: tuple[int, ...]) -> Int8[np.ndarray, '...']:
  """Returns the codes of a payload.

  Args:
    data: the payload.
    shape: of the codes.

  Returns:
    int8, of that shape.

  Raises:
    ValueError: `data` is no payload of codes of this shape.  Nothing larger than such a payload can
      hold is ever allocated, whatever `shape` says.
  """
  size = math.prod(shape)
  if size == 0 and len(data) == 0 and min(shape) >= 0:
    return np.zeros(shape, np.int8)
  # a shape from a file: two negative axes have a positive product
  if size <= 0 or min(shape, default=1) <= 0 or len(data) == 0:
    raise ValueError(f'found {len(data)} bytes of codes, expected those of {size} codes')
  bits = frequencies.to_bits(data, _MAX_TABLE_BYTES)
  if bits.startswith((context_coding.MARKER, context_coding.TRELLIS_MARKER)):
    return context_coding.decode(data, shape)
  model, position = frequencies.read_table(bits, 0)
  end = frequencies.end_of_bits(bits, position)
  coder = ans.resume(bytes(data[end:]), size, model.least_bits)
  codes = ans.room(shape)
  model.decode(coder, codes.reshape(-1))
  ans.check_end(coder, codes)
  return codes
