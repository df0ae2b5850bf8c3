"""Says what a network does with its leaves, what errors cost, and what moments inputs have."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.network.batch_mode import on_batch_statistics
  from opq_jax.network.costs import divergence_costs
  from opq_jax.network.moments import InputMoments, mean_moments, moment_bytes, second_moments
  from opq_jax.network.stored_moments import StoredMatrix
  from opq_jax.network.uses import LeafUsage, Use, usage

__all__ = [
  'InputMoments',
  'LeafUsage',
  'StoredMatrix',
  'Use',
  'divergence_costs',
  'mean_moments',
  'moment_bytes',
  'on_batch_statistics',
  'second_moments',
  'usage',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'InputMoments': 'moments',
    'LeafUsage': 'uses',
    'StoredMatrix': 'stored_moments',
    'Use': 'uses',
    'divergence_costs': 'costs',
    'mean_moments': 'moments',
    'moment_bytes': 'moments',
    'on_batch_statistics': 'batch_mode',
    'second_moments': 'moments',
    'usage': 'uses',
  },
)
