"""The grids of a leaf's outputs: one grid, times a scale of each output.

Output j has the grid of threshold, first value and step times s_j, and values and cells by the rule
of every grid (`opq_jax.file.grids`).  Scales have few significant bits and grids so few that no
product with a scale rounds, so these numbers are the same whoever computes them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from opq_jax.coding.frequencies import histogram
from opq_jax.coding.output_scales import GRID_BITS, SCALE_BITS, output_of
from opq_jax.core.array_types import Float32, Int8, Shaped
from opq_jax.file import checks
from opq_jax.file.container import VERSIONS
from opq_jax.file.grids import Grid

_CHUNK = 1 << 16  # codes looked up at a time: NumPy widens the indices to 8 bytes each


class OutputGrids(NamedTuple):
  """The grids of the outputs of one leaf, or of one slice.

  Attributes:
    grid: of an output whose scale is 1.
    scales: of all outputs; None where all are 1.
    axis: of the outputs.
  """

  grid: Grid
  scales: Float32[np.ndarray, ' outputs'] | None = None
  axis: int = 0

  @classmethod
  def of(cls, grid: Grid, scales: Any, shape: tuple[int, ...]) -> 'OutputGrids':
    """Returns the grids of a leaf of this shape; its scales broadcast over it, or are None.

    Raises:
      ValueError: the scales are not those of one axis.
    """
    if scales is None:
      return cls(grid)
    scales = np.asarray(scales)
    for axis, outputs in enumerate(shape):
      if scales.shape == (1,) * axis + (outputs,) + (1,) * (len(shape) - axis - 1):
        return cls(grid, scales.reshape(-1), axis)
    raise ValueError(
      f'found output scales of shape {scales.shape}, expected those of one axis of {shape}'
    )

  def moved(self, axes: tuple[int, ...]) -> 'OutputGrids':
    """Returns the grids of the leaf with its axes in another order."""
    return self if self.scales is None else self._replace(axis=axes.index(self.axis))

  def over_weights(self, ndim: int) -> Float32[np.ndarray, '...'] | None:
    """Returns the scales with an axis of length 1 for each other axis of the leaf."""
    if self.scales is None:
      return None
    return self.scales.reshape([-1 if axis == self.axis else 1 for axis in range(ndim)])

  def of_weights(
    self, shape: tuple[int, ...], start: int, stop: int
  ) -> Float32[np.ndarray, ' weights'] | None:
    """Returns the scale of each weight of a run in C order of a leaf of this shape."""
    if self.scales is None:
      return None
    return self.scales[output_of(shape, self.axis, start, stop)]

  def in_units(self, array: Shaped[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns an array of the leaf's shape over the scales, in float32; without scales, itself."""
    scales = self.over_weights(array.ndim)
    return array if scales is None else array.astype(np.float32) / scales

  def values(self, codes: Int8[np.ndarray, '...']) -> Shaped[np.ndarray, '...']:
    """Returns the value of every code in the leaf's dtype."""
    if self.scales is None:
      return self.grid.values(codes)
    tables = np.stack([grid.value_table() for grid in self._each()]).reshape(-1)
    values = np.empty(codes.size, tables.dtype)
    for start, places in self._places(codes):
      values[start : start + places.size] = tables[places]
    return values.reshape(codes.shape)

  def check_grids(self, name: str) -> None:
    """Checks that every output has cells and values.

    Raises:
      ValueError: a product with a scale rounds, or a grid is none (`checks.check_grid`).
    """
    if self.scales is None:
      return
    numbers = np.array([self.grid.threshold, self.grid.first, self.grid.step], np.float64)
    # a product of float64 is exact here: 24 bits times 4
    exact = numbers * np.unique(self.scales).astype(np.float64)[:, None]
    with np.errstate(over='ignore', under='ignore'):  # of a damaged file
      rounded = exact.astype(np.float32)
    if (rounded != exact).any():
      raise ValueError(
        f'{name}: found a grid of threshold {self.grid.threshold}, first value {self.grid.first} '
        f'and step {self.grid.step} with output scales, expected numbers of {GRID_BITS} '
        f'significant bits, whose products with scales of {SCALE_BITS} float32 holds exactly'
      )
    for grid in self._each():
      checks.check_grid(name, grid, VERSIONS[-1])

  def check_cells(self, name: str, codes: Int8[np.ndarray, '...']) -> None:
    """Checks that encoding the values of codes again gives these codes.

    Raises:
      ValueError: as `checks.check_cells`.
    """
    if self.scales is None:
      checks.check_cells(name, histogram(codes), self.grid)
      return
    each = list(self._each())
    counts = np.zeros((len(each), 256), np.int64)
    for _, places in self._places(codes):
      counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
    for grid, own in zip(each, counts, strict=True):
      checks.check_cells(name, own, grid)

  def _each(self) -> Iterator[Grid]:
    """Yields the grid of each scale that there is, in ascending order."""
    assert self.scales is not None
    for scale in np.unique(self.scales):
      threshold, first, step = (scale * x for x in self.grid[:3])
      yield Grid(threshold, first, step, *self.grid[3:])

  def _places(self, codes: Int8[np.ndarray, '...']) -> Iterator[tuple[int, Any]]:
    """Yields, for runs of codes, the begin and 256 times the number of its scale, plus the code."""
    assert self.scales is not None
    # the number of each output's scale among those that there are
    number = np.unique(self.scales, return_inverse=True)[1].reshape(-1)
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK):
      stop = min(start + _CHUNK, flat.size)
      output = output_of(codes.shape, self.axis, start, stop)
      yield start, number[output] * 256 + flat[start:stop]
