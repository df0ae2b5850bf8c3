"""Language models from disk to disk: calibration tokens, costs, codes block after block."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.language.calibration import Calibration, at_random, of_text, written_by
  from opq_jax.language.compression import compress_calibrated, costs
  from opq_jax.language.network import StoredNetwork, stored_network

__all__ = [
  'Calibration',
  'StoredNetwork',
  'at_random',
  'compress_calibrated',
  'costs',
  'of_text',
  'stored_network',
  'written_by',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'Calibration': 'calibration',
    'StoredNetwork': 'network',
    'at_random': 'calibration',
    'compress_calibrated': 'compression',
    'costs': 'compression',
    'of_text': 'calibration',
    'stored_network': 'network',
    'written_by': 'calibration',
  },
)
