"""Weights of other frameworks as variables of `opq_jax.models`; one module per framework."""

from opq_jax.importers import keras, tf_slim, torch
from opq_jax.importers.conversion import Source
from opq_jax.importers.registry import (
  Imported,
  from_tensors,
  from_variables,
  load,
  sources,
  to_tensors,
)

__all__ = [
  'Imported',
  'Source',
  'from_tensors',
  'from_variables',
  'keras',
  'load',
  'sources',
  'tf_slim',
  'to_tensors',
  'torch',
]
