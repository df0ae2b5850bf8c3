"""Codes of a tensor as named arrays, and back: what a work folder keeps of it."""

from collections.abc import Mapping

import numpy as np

from opq_jax.file.coded_leaves import CodedSlice
from opq_jax.file.grids import Grid

FIELDS = ('codes', 'escaped', 'grid', 'levels')
"""Names of the arrays."""


def arrays_of(coded: CodedSlice) -> dict[str, np.ndarray]:
  """Returns the codes, escaped values, grid and number of levels of a tensor."""
  return {
    'codes': coded.codes,
    # as bytes: numpy's files do not know bfloat16
    'escaped': np.ascontiguousarray(coded.escaped).view(np.uint8),
    'grid': np.array(coded.grid.row(), np.float32),
    'levels': np.asarray(coded.grid.levels),
  }


def coded_slice(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> CodedSlice:
  """Returns the tensor of `arrays_of`, of this dtype."""
  threshold, first, step = arrays['grid']
  grid = Grid(threshold, first, step, int(arrays['levels']), dtype)
  return CodedSlice(arrays['codes'], arrays['escaped'].view(dtype), grid)
