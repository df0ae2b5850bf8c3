"""The value of every code of a compressed leaf, in NumPy alone: reading a file needs no JAX.

Cell k = 0, 1, ..., levels - 1 holds the magnitudes |w| of [threshold + k step, threshold +
(k + 1) step) and has the value v_k = first + k step, rounded to float32.  Code 0 has the value 0,
and code c != 0 the value sign(c) v_(|c| - 1), rounded to the leaf's dtype:

    dtype of 23 bits of mantissa and more   v_k as it is
    narrower                                the nearest number of the dtype to v_k; where this lies
                                            in another cell, the next number towards cell k
                                            (outwards from the last cell: as it is)

where the cell of a magnitude m is floor((m - threshold) (1 / step)), each operation in float32.
`opq_jax.compression.cells` computes the same values in JAX, bit for bit.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from opq_jax.core.array_types import Float32, Int8, Shaped
from opq_jax.core.limits import ESCAPE, MAX_LEVELS

_CHUNK = 1 << 16  # codes looked up at a time: NumPy widens the indices to 8 bytes each
_WIDE = 23  # bits of float32's mantissa: such a dtype holds every value exactly

ALL_CODES = np.arange(256).astype(np.uint8).view(np.int8)
"""Every int8, at the place that is its own byte: 0, 1, ..., 127, -128, ..., -1."""


class LevelValues(NamedTuple):
  """The values v_k of a grid.

  Attributes:
    values: first + k step in float32, of max(levels, 1) cells.
    rounds: whether a sum first + k step is not exact in float32.
    has_exact_products: whether every k step is.
  """

  values: Float32[np.ndarray, ' levels']
  rounds: bool
  has_exact_products: bool


class Grid(NamedTuple):
  """The grid of one compressed leaf.

  Attributes:
    threshold: the magnitude at which the first cell begins.
    first: the value of the first cell.
    step: the width of a cell and the distance between values.
    levels: cells a sign, 0 to 127.
    dtype: the leaf's dtype.
  """

  threshold: np.float32
  first: np.float32
  step: np.float32
  levels: int
  dtype: np.dtype

  def row(self) -> list[np.float32]:
    """Returns its row in a file: threshold, first value and step."""
    return [self.threshold, self.first, self.step]

  def level_values(self) -> LevelValues:
    """Returns the value of every cell, with what rounding it took."""
    # 24 bits of a step times 7 of a level: exact in float64
    exact = np.float64(self.step) * np.arange(max(self.levels, 1))
    products = exact.astype(np.float32)
    values = self.first + products
    rounds = bool((values != np.float64(self.first) + exact).any())
    return LevelValues(values, rounds, bool((products == exact).all()))

  def codebook(self) -> Float32[np.ndarray, '255']:
    """Returns the float32 value of every code, `codebook[code]`, negative codes from the end.

    Beyond the last level the largest value repeats, as in `opq_jax.compression.LeafState`.
    """
    cell = np.minimum(np.arange(MAX_LEVELS), max(self.levels - 1, 0))
    positive = self.level_values().values[cell] if self.levels else np.zeros(cell.size, np.float32)
    return np.concatenate([np.zeros(1, np.float32), positive, -positive[::-1]])

  def cell(self, magnitude: Float32[np.ndarray, ' n']) -> Float32[np.ndarray, ' n']:
    """Returns the cell of every |w|, counted from 0, without bounds."""
    # times the reciprocal, as the encoder computes it: a quotient differs at the edges of cells
    with np.errstate(over='ignore', invalid='ignore'):  # of a step below 1 / float32's largest
      return np.floor((magnitude - self.threshold) * (1 / self.step))

  def value_table(self) -> Shaped[np.ndarray, '256']:
    """Returns the value of every code in the leaf's dtype, in the order of `ALL_CODES`.

    The entry of `ESCAPE` is 0: the value of an escaped weight is not on the grid.

    >>> grid = Grid(np.float32(0.5), np.float32(0.75), np.float32(0.5), 2, np.dtype(np.float16))
    >>> grid.value_table()[[0, 1, 2, -1, -2]].tolist()
    [0.0, 0.75, 1.25, -0.75, -1.25]
    """
    values = self.codebook()[ALL_CODES]
    if ml_dtypes.finfo(self.dtype).nmant < _WIDE:
      cells = np.clip(np.abs(ALL_CODES.astype(np.float32)) - 1, 0, max(self.levels - 1, 0))
      magnitudes = self._inside_cells(np.abs(values), cells)
      values = np.where(ALL_CODES < 0, -magnitudes, magnitudes)
      values[0] = 0
    table = values.astype(self.dtype)
    table[np.uint8(ESCAPE & 255)] = 0
    return table

  def values(self, codes: Int8[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns the value of every code in the leaf's dtype."""
    table, flat = self.value_table(), np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    values = np.empty(flat.size, table.dtype)
    for start in range(0, flat.size, _CHUNK):
      values[start : start + _CHUNK] = table[flat[start : start + _CHUNK]]
    return values.reshape(codes.shape)

  def _inside_cells(
    self, magnitudes: Float32[np.ndarray, '256'], cells: Float32[np.ndarray, '256']
  ) -> Shaped[np.ndarray, '256']:
    """Rounds magnitudes to the leaf's dtype, each within its cell where the cell has a number."""
    largest = np.array(ml_dtypes.finfo(self.dtype).max, self.dtype)
    # at most the largest number, since infinity lies in no cell
    rounded = np.minimum(magnitudes, np.float32(largest)).astype(self.dtype)
    rounded_cells = self.cell(rounded.astype(np.float32))
    # positive numbers of a dtype are in the order of their bits
    bits = rounded.view(f'u{self.dtype.itemsize}')
    one, most = bits.dtype.type(1), largest.view(bits.dtype)
    bits = np.where(rounded_cells < cells, np.minimum(bits + one, most), bits)
    is_beyond = (rounded_cells > cells) & (cells < max(self.levels - 1, 0))
    bits = np.where(is_beyond, np.maximum(bits, one) - one, bits)
    return bits.view(self.dtype)
