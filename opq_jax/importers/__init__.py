"""Weights of other frameworks as variables of `opq_jax.models`; one module per source."""

from opq_jax.importers import tf_slim

__all__ = ['tf_slim']
