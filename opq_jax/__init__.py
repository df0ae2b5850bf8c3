"""opq_jax."""

from opq_jax.allocation import Allocation, LeafAllocation, allocate
from opq_jax.compression import (
  CompressionState,
  LeafState,
  apply_compression,
  decode,
  encode,
  init_state,
)

__version__ = '0.1.0'

__all__ = [
  'Allocation',
  'CompressionState',
  'LeafAllocation',
  'LeafState',
  'allocate',
  'apply_compression',
  'decode',
  'encode',
  'init_state',
]
