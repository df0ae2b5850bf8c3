"""Says what a network does with its leaves, and measures the second moments of their inputs."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.network.moments import MAX_INPUTS, layer_moments, mean_moments, second_moments
  from opq_jax.network.usage import LeafUsage, Use, usage

__all__ = [
  'MAX_INPUTS',
  'LeafUsage',
  'Use',
  'layer_moments',
  'mean_moments',
  'second_moments',
  'usage',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'LeafUsage': 'usage',
    'MAX_INPUTS': 'moments',
    'Use': 'usage',
    'layer_moments': 'moments',
    'mean_moments': 'moments',
    'second_moments': 'moments',
    'usage': 'usage',
  },
)
