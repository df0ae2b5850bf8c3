"""Masks, codebooks and codes; and functions that make a training loop use them."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    **dict.fromkeys(
      ('CompressionState', 'LeafState', 'apply_compression', 'decode', 'encode', 'init_state'),
      'codes',
    ),
    **dict.fromkeys(('clip_to_grid', 'compressed', 'keep_compressed'), 'transforms'),
  },
)
