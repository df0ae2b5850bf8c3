"""LiteRT: the decoded MobileNet-V1 in floats, by litert-converter.

    pip install litert-converter ai-edge-litert
    python -m experiments.benchmarks.export.litert_floats mobilenet_v1.safetensors

JAX's StableHLO of the network is converted as it is, lowered for each platform, and one image runs
in LiteRT on one thread, in turn with the same network compiled by JAX.  litert-converter documents
none of its functions yet, so the package does not use it.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from jax import export
from litert_converter import converter_api_ext as converter
from litert_converter.mlir import ir, passmanager

import opq_jax
from experiments.benchmarks import harness
from opq_jax import importers

MODULE = 'experiments.benchmarks.export.litert_floats'
BITS = 4.0


def converted(text: str) -> bytes:
  """Returns the LiteRT file of a program of StableHLO."""
  context = ir.Context()
  converter.prepare_mlir_context(context)
  with context:
    module = ir.Module.parse(text)
    config = converter.ConvertToTFLConfig()
    converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
    return converter.export_flatbuffer_to_bytes(module.operation)


def main(path: pathlib.Path) -> None:
  model, variables, _ = importers.load('mobilenet_v1', path)
  network = opq_jax.compress(variables, bits_per_weight=BITS)
  values = opq_jax.apply_compression(network.params, network.state)
  fn = jax.jit(lambda image: model.apply(values, image, train=False))
  image = np.random.default_rng(0).normal(0, 0.5, (1, 224, 224, 3)).astype(np.float32)
  expected = np.asarray(fn(image))
  runs, rows = {'JAX': lambda: fn(image)}, []
  for platform in ('tpu', 'cpu'):
    shape = jax.ShapeDtypeStruct(image.shape, jnp.float32)
    data = converted(export.export(fn, platforms=[platform])(shape).mlir_module())
    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]['index'], image)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]['index'])
    runs[platform] = interpreter.invoke
    rows.append(
      {
        'lowered for': platform,
        'bytes': len(data),
        'largest output': f'{np.abs(expected).max():.3g}',
        'largest difference': f'{np.abs(found - expected).max():.1g}',
      }
    )
  seconds = harness.in_turn(runs)
  for row in rows:
    row['milliseconds'] = round(1000 * seconds[str(row['lowered for'])], 1)
  command = f'python -m {MODULE} mobilenet_v1.safetensors'
  harness.report('litert_floats', 'LiteRT in floats', command, rows)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
