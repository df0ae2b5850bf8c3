"""Masks, codebooks and codes; and what makes a training loop use them."""

from opq_jax.compression.codes import (
  CompressionState,
  LeafState,
  apply_compression,
  decode,
  encode,
  init_state,
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
]
