"""Measures what a network does with its leaves: the second moments of each layer's inputs."""

from opq_jax.network.moments import MAX_INPUTS, layer_moments, mean_moments, second_moments

__all__ = ['MAX_INPUTS', 'layer_moments', 'mean_moments', 'second_moments']
