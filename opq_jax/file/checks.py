"""Checks of the grid and the codes of a compressed leaf, for writer and reader alike.

A reader holds files of any origin to these rules: it takes no leaf that the writer would refuse.
"""

import numpy as np

from opq_jax.core.array_types import Int8, Int64
from opq_jax.core.limits import ESCAPE
from opq_jax.file.grids import ALL_CODES, Grid


def check_grid(name: str, grid: Grid, version: str) -> None:
  """Checks that a grid has cells and values.

  Raises:
    ValueError: a number is not finite, the threshold or the first value is negative, the step is
      not positive, a multiple of the step rounds in float32, the values do not rise, or, in version
      1, a value rounds.
  """
  # grids of a damaged file overflow here; the tests below find what comes of it
  with np.errstate(over='ignore', invalid='ignore'):
    values, rounds, has_exact_products = grid.level_values()
  is_finite = bool(np.isfinite([grid.threshold, grid.step, values[-1]]).all())
  is_rising = bool((values[1:] > values[:-1]).all())
  is_positive = grid.threshold >= 0 and grid.first >= 0 and grid.step > 0
  found = (
    f'{name}: found a grid of threshold {grid.threshold}, first value {grid.first}, step '
    f'{grid.step} and {grid.levels} levels'
  )
  if not (is_finite and has_exact_products and is_rising and is_positive):
    raise ValueError(
      f'{found}, expected finite numbers, threshold and first >= 0, step > 0, multiples of step '
      'that float32 holds exactly, and values that rise'
    )
  if rounds and version == '1':
    raise ValueError(f'{found}, expected values that float32 holds exactly in version 1')


def check_levels(codes: Int8[np.ndarray, '...'], levels: int) -> None:
  """Checks that no code is beyond the last level.

  Raises:
    ValueError: the largest |code| is more than `levels`.
  """
  largest = max(int(codes.max(initial=0)), -int(codes.min(initial=0)))
  if largest > levels:
    raise ValueError(f'found code {largest}, expected at most {levels}')


def check_cells(name: str, counts: Int64[np.ndarray, '256'], grid: Grid) -> None:
  """Checks that encoding the values of codes again gives these codes.

  Args:
    name: of the leaf.
    counts: how often every code occurs, in the order of `opq_jax.file.grids.ALL_CODES`.
    grid: of the codes.

  Raises:
    ValueError: the value of a code that occurs is not finite in the leaf's dtype, is below the
      normal numbers of float32, or lies in another cell than the code's own.
  """
  is_on_grid = (ALL_CODES != 0) & (ALL_CODES != ESCAPE)
  # 256 values in place of all weights; a level that no code has may lie in another cell, as many of
  # bfloat16 do far from 0
  counts = np.where(is_on_grid, counts, 0)
  values = grid.value_table().astype(np.float32)
  if bad := int(counts[~np.isfinite(values)].sum()):
    raise ValueError(
      f'{name}: found {bad} values that are NaN or infinite once they are {grid.dtype}, expected '
      'none'
    )
  # XLA takes such numbers for 0, NumPy does not: a state would not have the values that are read
  is_flushed = (values != 0) & (np.abs(values) < np.finfo(np.float32).tiny)
  if bad := int(counts[is_flushed].sum()):
    raise ValueError(
      f'{name}: found {bad} values of a magnitude below {np.finfo(np.float32).tiny:.3g}, which '
      'float32 arithmetic takes for 0, expected none'
    )
  cells = np.clip(grid.cell(np.abs(values)), 0, max(grid.levels - 1, 0))
  codes_again = np.where(values < 0, -1, 1) * (1 + cells)
  if moved := int(counts[codes_again != ALL_CODES].sum()):
    raise ValueError(
      f'{name}: found {moved} values that lie in another cell once they are {grid.dtype}, expected '
      f'none: step {float(grid.step)} is too fine for this dtype, or the grid is damaged'
    )
