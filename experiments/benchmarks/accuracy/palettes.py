"""Accuracy over the size in memory: palettes, against affine codes with a scale a channel.

    pip install qwix
    python -m experiments.benchmarks.accuracy.palettes TFDS_FOLDER WEIGHTS.safetensors ...

All methods hold an index of b bits a weight.  Ours adds a table of 2^b - 1 values a leaf and, where
`palette_bits` gives it scales, a float32 an output; the others a float32 scale a channel, and a
zero point where they have one:

    qwix             `qwix.quantize`, symmetric, by the largest |w| of a channel; it has no 3 bits
    onnxruntime      `quantize_data` of its quantization tools, channel by channel, asymmetric
    least error      symmetric, with the scale of each channel that makes the least squared error
    GPTQ             asymmetric, the range of each channel by a search, with error feedback

The last two are short references of our own.  BatchNorm is corrected from noise for all
(`opq_jax.correction.correct_batch_norm`); GPTQ and our `feedback` read the same synthetic images.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import opq_jax
from configs import one_shot
from experiments.benchmarks import one_shot_images
from experiments.benchmarks.kernels import kernels_of, vectors_of
from experiments.benchmarks.language_models import gptq
from opq_jax import encoders
from opq_jax.compression import LeafState
from opq_jax.core import trees
from opq_jax.encoders import CompressedNetwork
from opq_jax.importers import networks
from opq_jax.network import InputMoments

BITS = 4, 3
_SCALES = np.linspace(0.3, 1.0, 71)  # of the scale that reaches the largest weight


def by_qwix(kernel: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
  """Returns the values of qwix's codes, and the bytes of its scales."""
  from qwix import dequantize, quantize

  found = quantize(jnp.asarray(kernel), f'int{bits}', channelwise_axes=[kernel.ndim - 1])
  return np.asarray(dequantize(found)), 4 * kernel.shape[-1]


def by_onnxruntime(kernel: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
  """Returns the values of onnxruntime's asymmetric codes of 4 bits, and the bytes beside them."""
  from onnx import TensorProto
  from onnxruntime.quantization.quant_utils import quantize_data

  assert bits == 4
  values = np.empty_like(kernel)
  for channel in range(kernel.shape[-1]):
    zero, scale, codes = quantize_data(kernel[..., channel], TensorProto.INT4, symmetric=False)[-3:]
    codes = np.asarray(codes).astype(np.float32).reshape(kernel.shape[:-1])
    values[..., channel] = (codes - np.float32(zero)) * np.float32(scale)
  return values, 4 * kernel.shape[-1] + -(-kernel.shape[-1] // 2)


def by_least_error(kernel: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
  """Returns the values of symmetric codes with the best scale of each channel.

  >>> kernel = np.float32([[7.0, 14.0], [-3.0, 0.0], [0.0, 2.0]])
  >>> by_least_error(kernel, 4)[0].tolist() == kernel.tolist()
  True
  """
  most = 2 ** (bits - 1) - 1
  others = tuple(range(kernel.ndim - 1))
  largest = np.max(np.abs(kernel), axis=others, keepdims=True) / np.float32(most)
  best, least = np.zeros_like(kernel), np.full_like(largest, np.inf)
  for part in _SCALES.astype(np.float32):
    scale = np.where(largest > 0, largest * part, np.float32(1))
    values = np.clip(np.round(kernel / scale), -most, most) * scale
    error = np.sum(np.square(values - kernel), axis=others, keepdims=True)
    best = np.where(error < least, values, best)
    least = np.minimum(error, least)
  return best, 4 * kernel.shape[-1]


def by_gptq(kernel: np.ndarray, bits: int, moments: InputMoments) -> tuple[np.ndarray, int]:
  """Returns the values of GPTQ's codes, and the bytes of scales and zero points.

  Args:
    kernel: its outputs are the last axis.
    bits: of a code.
    moments: of its inputs; a group of outputs has moments of its own.
  """
  matrices = np.asarray(moments.matrix, np.float64)
  groups, width, _ = matrices.shape
  setting = gptq.Setting(bits, group=width, clip_search=True)
  columns = kernel.reshape(width, groups, -1)
  values = [
    gptq.quantized(columns[:, group].T, matrices[group], setting)[0].T for group in range(groups)
  ]
  beside = 4 * kernel.shape[-1] + -(-kernel.shape[-1] * bits // 8)
  return np.stack(values, axis=1).reshape(kernel.shape).astype(np.float32), beside


AFFINE: dict[str, tuple[Callable[[np.ndarray, int], tuple[np.ndarray, int]], tuple[int, ...]]] = {
  'qwix': (by_qwix, (4,)),
  'onnxruntime': (by_onnxruntime, (4,)),
  'least error': (by_least_error, BITS),
}


def palette_bytes(network: CompressedNetwork, bits: int) -> int:
  """Returns bytes of the tables and scales beside the indices of compressed leaves."""
  records = [
    leaf for leaf in jax.tree.leaves(network.state.tree, is_leaf=_is_record) if _is_record(leaf)
  ]
  tables = sum(4 * (2**bits - 1) for _ in records)
  return tables + sum(
    4 * record.output_scales.size for record in records if record.output_scales is not None
  )


def _is_record(node: Any) -> bool:
  return isinstance(node, LeafState)


def compare(name: str, path: pathlib.Path, data_dir: str) -> Iterator[dict[str, object]]:
  config = one_shot.get_config(name)
  network = networks.load(path, name=name, num_classes=config.num_classes)
  model, variables = network.model, network.variables
  batches_of = functools.partial(one_shot_images.batches_of, config, network, data_dir)
  judge = one_shot_images.Judge(network, batches_of(config.split))
  kernels = kernels_of(variables)
  weights = sum(kernel.size for kernel in kernels.values())
  vectors = sum(
    np.asarray(leaf).nbytes for leaf in vectors_of(trees.named_leaves(variables)).values()
  )
  original = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  moments = opq_jax.network.mean_moments(
    model.apply, variables, networks.synthetic_batches(network)
  )

  def row(method: str, bits: int, tree: Any, beside: int) -> dict[str, object]:
    size = weights * bits // 8 + beside + vectors
    corrected = networks.correct_batch_norm(network, tree)
    return {
      'network': name,
      'bits': bits,
      'codes': method,
      'bytes in memory': f'{size:,}',
      'times smaller': f'{original / size:.2f}',
    } | one_shot_images.cells(judge.scores(corrected))

  def affine(method: str, bits: int, pairs: dict[str, tuple[np.ndarray, int]]) -> dict[str, object]:
    tree = trees.replaced(variables, {leaf: values for leaf, (values, _) in pairs.items()})
    return row(method, bits, tree, sum(size for _, size in pairs.values()))

  of_leaves = dict(
    zip(trees.named_leaves(variables), trees.beside(variables, moments), strict=True)
  )
  ours: dict[str, dict[str, Any]] = {
    'palettes': {},
    'palettes, feedback': {'encoder': encoders.Feedback(moments)},
  }
  for bits in BITS:
    for method, options in ours.items():
      found = opq_jax.compress(variables, palette_bits=bits, **options)
      yield row(method, bits, found.params, palette_bytes(found, bits))
    for method, (values_of, widths) in AFFINE.items():
      if bits in widths:
        pairs = {leaf: values_of(kernel, bits) for leaf, kernel in kernels.items()}
        yield affine(method, bits, pairs)
    pairs = {leaf: by_gptq(kernel, bits, of_leaves[leaf]) for leaf, kernel in kernels.items()}
    yield affine('GPTQ', bits, pairs)


if __name__ == '__main__':
  one_shot_images.main('accuracy.palettes', 'indices of a fixed width', compare, __doc__)
