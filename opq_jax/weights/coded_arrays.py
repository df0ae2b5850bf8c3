"""Codes of a tensor as named arrays, and back: what a work folder keeps of it."""

from collections.abc import Mapping

import numpy as np

from opq_jax.file.coded_leaves import CodedSlice, Rotation
from opq_jax.file.grids import Grid
from opq_jax.file.output_grids import OutputGrids

FIELDS = ('codes', 'escaped', 'grid', 'levels', 'output_scales', 'rotated')
"""Names of the arrays."""


def arrays_of(coded: CodedSlice) -> dict[str, np.ndarray]:
  """Returns the codes, escaped values, grid, levels, output scales and rotated axis of a tensor."""
  scales = coded.grids.over_weights(coded.codes.ndim)
  return {
    'codes': coded.codes,
    # as bytes: numpy's files do not know bfloat16
    'escaped': np.ascontiguousarray(coded.escaped).view(np.uint8),
    'grid': np.array(coded.grids.grid.row(), np.float32),
    'levels': np.asarray(coded.grids.grid.levels),
    # none where there are none
    'output_scales': np.zeros(0, np.float32) if scales is None else scales,
    'rotated': np.array([] if coded.rotation is None else [coded.rotation.axis], np.int64),
  }


def coded_slice(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> CodedSlice:
  """Returns the tensor of `arrays_of`, of this dtype."""
  threshold, first, step = arrays['grid']
  rotations = [Rotation(int(axis), dtype) for axis in arrays['rotated']]
  of_codes = np.dtype(np.float32) if rotations else dtype
  grid = Grid(threshold, first, step, int(arrays['levels']), of_codes)
  codes, scales = arrays['codes'], arrays['output_scales']
  grids = OutputGrids.of(grid, scales if scales.size else None, codes.shape)
  return CodedSlice(codes, arrays['escaped'].view(of_codes), grids, *rotations)
