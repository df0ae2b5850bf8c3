"""Masks, codebooks and codes; and functions that make a training loop use them."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.compression.coded_trees import CodedLeaf, coded, decoded
  from opq_jax.compression.codes import apply_compression, decode, encode
  from opq_jax.compression.rate import bits_per_weight
  from opq_jax.compression.records import (
    CompressionState,
    LeafState,
    init_state,
    slice_of,
    stacked,
  )
  from opq_jax.compression.transforms import clip_to_grid, compressed, keep_compressed
  from opq_jax.compression.zero_cell import add_zero_cell

__all__ = [
  'CodedLeaf',
  'CompressionState',
  'LeafState',
  'add_zero_cell',
  'apply_compression',
  'bits_per_weight',
  'clip_to_grid',
  'coded',
  'compressed',
  'decode',
  'decoded',
  'encode',
  'init_state',
  'keep_compressed',
  'slice_of',
  'stacked',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'CodedLeaf': 'coded_trees',
    'CompressionState': 'records',
    'LeafState': 'records',
    'add_zero_cell': 'zero_cell',
    'apply_compression': 'codes',
    'bits_per_weight': 'rate',
    'clip_to_grid': 'transforms',
    'coded': 'coded_trees',
    'compressed': 'transforms',
    'decode': 'codes',
    'decoded': 'coded_trees',
    'encode': 'codes',
    'init_state': 'records',
    'keep_compressed': 'transforms',
    'slice_of': 'records',
    'stacked': 'records',
  },
)
