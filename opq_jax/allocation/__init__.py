"""Chooses how much of every leaf is pruned, and how finely the rest is quantized.

`allocate` reads a parameter tree once and answers with an `Allocation`.

    bins, shards, counts, statistics, merging,
      ranks, second_look                           numbers that are read off the weights
    laplace, histogram_sums, code_bits             errors and bits: by density, by histogram
    channels, newton, dual_search                  algorithms on all leaves at once
    sparsity, fixed_width                          the two targets of the paper
    laplace_rate; exponential_tails, palettes,
      choices, rate_search                         the joint target: by density, by histogram
    measured_leaves, parts                         leaves, and the slices that the solver knows
    joined_statistics, units, solver, description  one compiled program from statistics to records
    defaults, targets, objectives, selection,
      chosen_by_usage, answer_checks               arguments and answers, checked
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.allocation.allocator import allocate
  from opq_jax.allocation.answer_checks import LAPLACE_FIT_BOUNDS
  from opq_jax.allocation.defaults import DEFAULT_COMPRESSION_RATE, OBJECTIVES, Objective
  from opq_jax.allocation.merging import merge_statistics
  from opq_jax.allocation.records import Allocation, LeafAllocation
  from opq_jax.allocation.selection import axis_of, choose_leaves, is_compressible, slices_of
  from opq_jax.allocation.statistics import LeafStatistics, leaf_statistics
  from opq_jax.allocation.targets import (
    TARGET_NAMES,
    BitsPerWeight,
    SparsityAndBits,
    TooFewBitsError,
    check_file_rate,
    check_targets,
  )

__all__ = [
  'DEFAULT_COMPRESSION_RATE',
  'LAPLACE_FIT_BOUNDS',
  'OBJECTIVES',
  'TARGET_NAMES',
  'Allocation',
  'BitsPerWeight',
  'LeafAllocation',
  'LeafStatistics',
  'Objective',
  'SparsityAndBits',
  'TooFewBitsError',
  'allocate',
  'axis_of',
  'check_file_rate',
  'check_targets',
  'choose_leaves',
  'is_compressible',
  'leaf_statistics',
  'merge_statistics',
  'slices_of',
]

_MODULES = {
  'allocator': ('allocate',),
  'answer_checks': ('LAPLACE_FIT_BOUNDS',),
  'defaults': ('DEFAULT_COMPRESSION_RATE', 'OBJECTIVES', 'Objective'),
  'merging': ('merge_statistics',),
  'records': ('Allocation', 'LeafAllocation'),
  'selection': ('axis_of', 'choose_leaves', 'is_compressible', 'slices_of'),
  'statistics': ('LeafStatistics', 'leaf_statistics'),
  'targets': (
    *('TARGET_NAMES', 'BitsPerWeight', 'SparsityAndBits', 'TooFewBitsError'),
    *('check_file_rate', 'check_targets'),
  ),
}

__getattr__, __dir__ = lazy.attributes(
  __name__, {name: module for module, names in _MODULES.items() for name in names}
)
