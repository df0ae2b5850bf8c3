"""Chooses how much of every leaf is pruned, and how finely the rest is quantized.

`allocate` reads a parameter tree once and answers with an `Allocation`.  The closed forms are in
`laplace`, the measurements in `leaf_statistics`, the searches in modules named by what they meet.
"""

from opq_jax.allocation.allocator import (
  DEFAULT_COMPRESSION_RATE,
  LAPLACE_FIT_BOUNDS,
  OBJECTIVES,
  Allocation,
  LeafAllocation,
  Objective,
  TooFewBitsError,
  allocate,
  is_compressible,
)
from opq_jax.allocation.statistics import LeafStatistics, leaf_statistics, merge_statistics

__all__ = [
  'DEFAULT_COMPRESSION_RATE',
  'LAPLACE_FIT_BOUNDS',
  'OBJECTIVES',
  'Allocation',
  'LeafAllocation',
  'LeafStatistics',
  'Objective',
  'TooFewBitsError',
  'allocate',
  'is_compressible',
  'leaf_statistics',
  'merge_statistics',
]
