"""Masks, codebooks and codes; and functions that make a training loop use them."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.compression.codes import apply_compression, decode, encode
  from opq_jax.compression.records import (
    CompressionState,
    LeafState,
    init_state,
    slice_of,
    stacked,
  )
  from opq_jax.compression.transforms import clip_to_grid, compressed, keep_compressed

__all__ = [
  'CompressionState',
  'LeafState',
  'apply_compression',
  'clip_to_grid',
  'compressed',
  'decode',
  'encode',
  'init_state',
  'keep_compressed',
  'slice_of',
  'stacked',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'CompressionState': 'records',
    'LeafState': 'records',
    'apply_compression': 'codes',
    'clip_to_grid': 'transforms',
    'compressed': 'transforms',
    'decode': 'codes',
    'encode': 'codes',
    'init_state': 'records',
    'keep_compressed': 'transforms',
    'slice_of': 'records',
    'stacked': 'records',
  },
)
