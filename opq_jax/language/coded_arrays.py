"""Codes of a tensor as named arrays, and back: what a work folder keeps of it."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from opq_jax.compression import LeafState
from opq_jax.compression.records import affine_codebook
from opq_jax.file.written_leaves import CodedSlice

FIELDS = ('codes', 'escaped', 'grid', 'levels')
"""Names of the arrays."""


def arrays_of(coded: CodedSlice) -> dict[str, np.ndarray]:
  """Returns the codes, escaped values, grid and number of levels of a tensor."""
  return {
    'codes': coded.codes,
    # as bytes: numpy's files do not know bfloat16
    'escaped': np.ascontiguousarray(coded.escaped).view(np.uint8),
    'grid': np.array(coded.grid, np.float32),
    'levels': np.asarray(coded.record.levels),
  }


def coded_slice(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> CodedSlice:
  """Returns the tensor of `arrays_of`, of this dtype; the kinds of its state are missing."""
  threshold, first, step = arrays['grid']
  levels = jnp.int32(arrays['levels'])
  record = LeafState(
    kinds=jnp.zeros(0, jnp.uint8),
    codebook=affine_codebook(jnp.float32(first), jnp.float32(step), levels),
    threshold=jnp.float32(threshold),
    step=jnp.float32(step),
    levels=levels,
    dtype=dtype,
  )
  return CodedSlice(arrays['codes'], arrays['escaped'].view(dtype), record, [*arrays['grid']])
