"""Programs of StableHLO that take codes: bytes, outputs and time against the float network.

    python -m experiments.benchmarks.export.stablehlo_programs FOLDER [NETWORK ...]

FOLDER holds `mobilenet_v1.safetensors` (TF-slim), `mobilenet_v2.safetensors` (torchvision) and
`minilm.safetensors` (all-MiniLM-L6-v2, under PyTorch's names); ResNet-50 has random weights.  A
process that does not import opq_jax reads the program and the codes, and runs a batch of four; the
same batch of the decoded network, compiled from Python, and of the same function exported with
floats as arguments, run in turn with it.  Times are processor time.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

import opq_jax
from experiments.benchmarks import harness
from opq_jax import importers, models
from opq_jax.export import program_arguments, write_stablehlo

MODULE = 'experiments.benchmarks.export.stablehlo_programs'
BITS = 4.0
BATCH, TOKENS = 4, 128
"""Of the batch that is run: images of 224 pixels, or texts of so many tokens."""

READER = """
import sys
import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file
with open(sys.argv[1] + '/net.stablehlo', 'rb') as file:
  program = export.deserialize(bytearray(file.read()))
codes = load_file(sys.argv[1] + '/codes.safetensors')
outputs = jax.jit(program.call)(codes, np.load(sys.argv[1] + '/inputs.npy'))
np.save(sys.argv[1] + '/outputs.npy', outputs)
assert 'opq_jax' not in sys.modules
"""
"""The process that knows nothing of the network."""


def network_of(name: str, folder: pathlib.Path) -> tuple[Callable[..., Any], Any, Any, Any]:
  """Returns a function of weights and a batch, its weights, the shape of a batch, and one."""
  rng = np.random.default_rng(0)
  (batch,) = export.symbolic_shape('batch')
  path = folder / f'{name}.safetensors'
  if name == 'minilm':
    model = models.SentenceEncoder()
    variables = importers.language_models.from_tensors(model, load_file(path)).variables
    tokens = rng.integers(1000, model.vocabulary, (BATCH, TOKENS)).astype(np.int32)
    return model.apply, variables, jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32), tokens
  if name == 'resnet50':
    model = models.create(name)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  else:
    model, variables, _ = importers.load(name, path)
  images = rng.normal(0, 0.5, (BATCH, 224, 224, 3)).astype(np.float32)
  apply_fn = lambda variables, x: model.apply(variables, x, train=False)
  return apply_fn, variables, jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32), images


def row_of(name: str, folder: pathlib.Path) -> dict[str, object]:
  """Returns bytes, the largest difference of outputs, and times over those of floats."""
  fn, variables, shape, batch = network_of(name, folder)
  params, state, _ = opq_jax.compress(variables, bits_per_weight=BITS)
  values = opq_jax.apply_compression(params, state)
  codes = program_arguments(params, state)
  with tempfile.TemporaryDirectory() as scratch:
    path = pathlib.Path(scratch)
    opq_jax.save(path / 'net.opq', params, state)
    written = write_stablehlo(path / 'net.stablehlo', fn, params, state, shape)
    save_file(
      {name: np.asarray(array) for name, array in codes.items()}, path / 'codes.safetensors'
    )
    np.save(path / 'inputs.npy', batch)
    subprocess.run([sys.executable, '-c', READER, scratch], check=True)
    outputs = np.load(path / 'outputs.npy')
    program = export.deserialize(bytearray((path / 'net.stablehlo').read_bytes()))
    size = (path / 'net.opq').stat().st_size
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)
  plain = export.export(jax.jit(fn), platforms=('cpu', 'cuda', 'tpu'))(shapes, shape)
  from_floats, from_codes, exported = jax.jit(fn), jax.jit(program.call), jax.jit(plain.call)
  expected = np.asarray(from_floats(values, batch))
  seconds = harness.in_turn(
    {
      'floats': lambda: from_floats(values, batch),
      'exported': lambda: exported(values, batch),
      'codes': lambda: from_codes(codes, batch),
    },
    clock=time.process_time,  # of all threads: other load on the machine does not change it
  )
  return {
    'network': name,
    'floats, bytes': sum(leaf.nbytes for leaf in jax.tree.leaves(values)),
    '.opq': size,
    'program': written.size,
    'codes in memory': written.arguments,
    'largest output': f'{np.abs(expected).max():.3g}',
    'largest difference': f'{np.abs(outputs - expected).max():.1g}',
    'time, codes over floats': round(seconds['codes'] / seconds['floats'], 2),
    'time, exported floats over floats': round(seconds['exported'] / seconds['floats'], 2),
  }


def main(arguments: list[str]) -> None:
  known = ('mobilenet_v1', 'mobilenet_v2', 'resnet50', 'minilm')
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('networks', nargs='*', default=known)
  options = parser.parse_args(arguments)
  for name in options.networks:
    rows = [row_of(name, options.folder)]
    rows = harness.with_earlier('stablehlo_programs', rows, ['network'])
    harness.report('stablehlo_programs', 'StableHLO', f'python -m {MODULE} FOLDER', rows)


if __name__ == '__main__':
  main(sys.argv[1:])
