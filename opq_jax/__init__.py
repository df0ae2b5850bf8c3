"""One-shot pruning and quantization of JAX parameter trees, from the weights alone.

    allocation = opq_jax.allocate(params, compression_rate=16.0)
    state      = opq_jax.init_state(params, allocation)
    compressed = opq_jax.apply_compression(params, state)
    opq_jax.save('network.opq', params, state)
    params, state = opq_jax.load('network.opq')

The method is OPQ (Hu et al., AAAI 2021), with one joint target for pruning and quantization, a
data-free correction of BatchNorm and an entropy-coded file of our own.
"""

from opq_jax.allocation.allocator import Allocation, LeafAllocation, allocate, is_compressible
from opq_jax.allocation.statistics import LeafStatistics, leaf_statistics, merge_statistics
from opq_jax.compression.codes import (
  CompressionState,
  LeafState,
  apply_compression,
  decode,
  encode,
  init_state,
)
from opq_jax.compression.transforms import compressed, keep_compressed
from opq_jax.correction.batch_norm import correct_batch_norm, correct_on_images
from opq_jax.correction.inference import fold_batch_norm, round_uncompressed
from opq_jax.correction.noise import natural_noise
from opq_jax.correction.synthetic import synthetic_inputs
from opq_jax.encoders.feedback import allocate_with_feedback, encode_with_feedback
from opq_jax.encoders.layer_by_layer import encode_layer_by_layer
from opq_jax.encoders.trellis_codes import allocate_with_trellis, encode_with_trellis
from opq_jax.file.reader import OpqFile, load
from opq_jax.file.writer import save
from opq_jax.network.moments import mean_moments, second_moments
from opq_jax.report.sizes import SizeReport, file_report, size_report
from opq_jax.report.tables import summary
from opq_jax.weights.reading import read_weights
from opq_jax.weights.safetensors import write_safetensors

__version__ = '0.1.0'

__all__ = [
  'Allocation',
  'CompressionState',
  'LeafAllocation',
  'LeafState',
  'LeafStatistics',
  'OpqFile',
  'SizeReport',
  'allocate',
  'allocate_with_feedback',
  'allocate_with_trellis',
  'apply_compression',
  'compressed',
  'correct_batch_norm',
  'correct_on_images',
  'decode',
  'encode',
  'encode_layer_by_layer',
  'encode_with_feedback',
  'encode_with_trellis',
  'file_report',
  'fold_batch_norm',
  'init_state',
  'is_compressible',
  'keep_compressed',
  'leaf_statistics',
  'load',
  'mean_moments',
  'merge_statistics',
  'natural_noise',
  'read_weights',
  'round_uncompressed',
  'save',
  'second_moments',
  'size_report',
  'summary',
  'synthetic_inputs',
  'write_safetensors',
]
