"""Weights of other frameworks as variables of `opq_jax.models`; one module a framework."""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.importers import keras, language_files, language_models, tf_slim, torch
  from opq_jax.importers.layouts import Source
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
  'language_files',
  'language_models',
  'load',
  'sources',
  'tf_slim',
  'to_tensors',
  'torch',
]

_REGISTRY = ('Imported', 'from_tensors', 'from_variables', 'load', 'sources', 'to_tensors')

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {'Source': 'layouts', **dict.fromkeys(_REGISTRY, 'registry')},
  submodules=('keras', 'language_files', 'language_models', 'tf_slim', 'torch'),
)
