"""Measures what a network does with its leaves: the second moments of each layer's inputs."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.network.moments import MAX_INPUTS, layer_moments, mean_moments, second_moments

__all__ = ['MAX_INPUTS', 'layer_moments', 'mean_moments', 'second_moments']

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'MAX_INPUTS': 'moments',
    'layer_moments': 'moments',
    'mean_moments': 'moments',
    'second_moments': 'moments',
  },
)
