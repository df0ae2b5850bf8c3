"""Corrects a compressed network, without data or from unlabelled inputs, and prepares its file.

`correct_batch_norm` needs no data, `correct_on_images` a few unlabelled inputs; `natural_noise` and
`synthetic_inputs` make inputs from nothing.  `torch` corrects PyTorch modules; `from_nnx` and
`from_haiku` bring networks of these libraries into the form that the other corrections call.
`fold_batch_norm` and `round_uncompressed` make the uncompressed leaves of a network for inference
smaller in a file.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.correction.batch_norm import correct_batch_norm
  from opq_jax.correction.biases import correct_on_images
  from opq_jax.correction.frameworks import Functional, from_haiku, from_nnx
  from opq_jax.correction.inference import fold_batch_norm, round_uncompressed
  from opq_jax.correction.noise import natural_noise
  from opq_jax.correction.pytorch import torch
  from opq_jax.correction.synthetic import synthetic_inputs

__all__ = [
  'Functional',
  'correct_batch_norm',
  'correct_on_images',
  'fold_batch_norm',
  'from_haiku',
  'from_nnx',
  'natural_noise',
  'round_uncompressed',
  'synthetic_inputs',
  'torch',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'Functional': 'frameworks',
    'correct_batch_norm': 'batch_norm',
    'correct_on_images': 'biases',
    'fold_batch_norm': 'inference',
    'from_haiku': 'frameworks',
    'from_nnx': 'frameworks',
    'natural_noise': 'noise',
    'round_uncompressed': 'inference',
    'synthetic_inputs': 'synthetic',
    'torch': 'pytorch',
  },
)
