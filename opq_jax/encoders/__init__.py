"""Chooses the code of every weight: by rounding, error feedback, a trellis, or layer by layer.

An encoder is a value that is handed to one verb:

    opq_jax.compress(params, compression_rate=16.0, encoder=opq_jax.encoders.Trellis())
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.encoders.encoder import Encoded, Encoder, LeafEncoder, Trial
  from opq_jax.encoders.factors import DAMPING
  from opq_jax.encoders.feedback import Feedback
  from opq_jax.encoders.layer_by_layer import SHARE, LayerByLayer
  from opq_jax.encoders.rounding import Rounding
  from opq_jax.encoders.search import CompressedNetwork, compress
  from opq_jax.encoders.trellis import TRELLIS_VERSION, Trellis

__all__ = [
  'DAMPING',
  'SHARE',
  'TRELLIS_VERSION',
  'CompressedNetwork',
  'Encoded',
  'Encoder',
  'Feedback',
  'LayerByLayer',
  'LeafEncoder',
  'Rounding',
  'Trellis',
  'Trial',
  'compress',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'DAMPING': 'factors',
    'SHARE': 'layer_by_layer',
    'TRELLIS_VERSION': 'trellis',
    'CompressedNetwork': 'search',
    'Encoded': 'encoder',
    'Encoder': 'encoder',
    'Feedback': 'feedback',
    'LayerByLayer': 'layer_by_layer',
    'LeafEncoder': 'encoder',
    'Rounding': 'rounding',
    'Trellis': 'trellis',
    'Trial': 'encoder',
    'compress': 'search',
  },
)
