"""Networks of `opq_jax.models` as ONNX programs: their bytes, and their answers beside JAX's.

    python -m experiments.benchmarks.export.programs [NAME ...]

Weights are random, and drawn so that answers stay of moderate size.  The number of images, or of
sequences and tokens, is open in the program; three images, or two sequences, are run.
"""

import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

from experiments.benchmarks import harness
from opq_jax import importers, models
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.export import onnx_program
from opq_jax.importers import networks

MODULE = 'experiments.benchmarks.export.programs'
VISION = (
  *('alexnet', 'vgg16', 'vgg16_bn', 'mobilenet_v1', 'mobilenet_v2'),
  *('resnet18', 'resnet50', 'resnet20', 'resnet110'),
)
_SMALL = {'vocab_size': 1000, 'max_position_embeddings': 128, 'n_positions': 128}
LANGUAGE: dict[str, dict[str, Any]] = {
  'MiniLM-L6 (BERT)': {
    'model_type': 'bert',
    'vocab_size': 30522,
    'hidden_size': 384,
    'num_hidden_layers': 6,
    'num_attention_heads': 12,
    'intermediate_size': 1536,
  },
  **{
    f'{kind}, 4 layers of 256': {
      'model_type': kind,
      'hidden_size': 256,
      'num_hidden_layers': 4,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'intermediate_size': 640,
      'head_dim': 32,
      'n_embd': 256,
      'n_layer': 4,
      'n_head': 8,
      **_SMALL,
    }
    for kind in ('llama', 'mistral', 'qwen2', 'qwen3', 'gpt2')
  },
}


def drawn(model: Any) -> PyTree:
  """Returns random variables; residual branches are small, so that depth does not blow them up."""
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    kind = path[-1].key
    if kind in ('scale', 'var'):
      return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
    width = np.sqrt(np.prod(leaf.shape[-4:-1])) if kind == 'kernel' else 10
    return (rng.laplace(size=leaf.shape) / width / 2).astype(np.float32)

  return jax.tree.map_with_path(draw, models.variable_shapes(model))


def filled(program: Any, variables: PyTree, path: pathlib.Path) -> None:
  """Writes a program with weights in its places, in a file beside it."""
  leaves = trees.named_leaves(variables)
  for tensor in program.graph.initializer:
    if tensor.external_data:
      tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(leaves[tensor.name]), tensor.name))
  onnx.save(program, path, save_as_external_data=True, location=f'{path.name}.data')


def row_of(name: str) -> dict[str, object]:
  """Converts a network, and runs it in both; returns its sizes and the largest difference."""
  rng = np.random.default_rng(1)
  if name in LANGUAGE:
    model: Any = models.from_config(LANGUAGE[name])
    inputs = rng.integers(1, 1000, (2, 64)).astype(np.int32)
    shape = jax.export.symbolic_shape('n, length', constraints=['length <= 128'])
  else:
    model = models.create(name)
    _, *image = networks.noise_shape(importers.sources(name)[0])
    inputs = rng.uniform(-1, 1, (3, *image)).astype(np.float32)
    shape = jax.export.symbolic_shape(f'n, {", ".join(map(str, image))}')
  variables = drawn(model)
  start = time.perf_counter()
  spec = jax.ShapeDtypeStruct(shape, inputs.dtype)
  program = onnx_program(model.apply, variables, spec)
  seconds, size = time.perf_counter() - start, program.ByteSize()
  operations = len(program.graph.node)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'net.onnx')
    filled(program, variables, path)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {program.graph.input[0].name: inputs})
  expected = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(inputs)))
  return {
    'network': name,
    'weights': sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
    'program': size,
    'nodes': operations,
    'converted in, s': round(seconds, 1),
    'largest answer': f'{np.abs(expected).max():.3g}',
    'largest difference': f'{np.abs(found - expected).max():.1e}',
  }


def main(names: list[str]) -> None:
  # the converter's plugins are imported once
  onnx_program(lambda p, x: p['w'] * x, {'w': np.ones(1, np.float32)}, jnp.ones(1))
  rows = [row_of(name) for name in names or (*VISION, *LANGUAGE)]
  rows = harness.with_earlier('programs', rows, ['network'])
  harness.report('programs', 'Networks as ONNX programs', f'python -m {MODULE}', rows)


if __name__ == '__main__':
  main(sys.argv[1:])
