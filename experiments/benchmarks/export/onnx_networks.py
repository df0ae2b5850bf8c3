"""Networks of `opq_jax.models` as ONNX files of indices: bytes, outputs and time beside floats.

    python -m experiments.benchmarks.export.onnx_networks FOLDER [NETWORK ...]

FOLDER holds `mobilenet_v1.safetensors` (TF-slim), `mobilenet_v2.safetensors` (torchvision),
`minilm.safetensors` (all-MiniLM-L6-v2, under PyTorch's names) and `smollm2/`, a model folder;
ResNet-50 has random weights.  Each is compressed to 4 bits per weight and exported without an ONNX
file of its own (`opq export net.opq small.onnx`).  onnxruntime runs it, and the same program with
float initializers, on one thread in turn; JAX runs the decoded network.
"""

import argparse
import json
import lzma
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from experiments.benchmarks import harness
from experiments.benchmarks.export.onnx_files import opened
from experiments.benchmarks.export.programs import LANGUAGE, drawn
from opq_jax import cli, importers, models
from opq_jax.core import trees
from opq_jax.export import network_program, write_onnx
from opq_jax.file.reader import OpqFile
from opq_jax.importers import language_models, networks

MODULE = 'experiments.benchmarks.export.onnx_networks'
NAMES = 'mobilenet_v1', 'mobilenet_v2', 'resnet50', 'minilm', 'smollm2'
BITS, BATCH, TOKENS, ROUNDS = 4, 4, 64, 9


def compressed(name: str, folder: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
  """Compresses a network; returns its `.opq` file."""
  path, arguments = folder / f'{name}.safetensors', ['--bits-per-weight', str(BITS)]
  if name == 'resnet50':
    path = scratch / 'resnet50.safetensors'
    save_file(trees.named_leaves(drawn(models.create(name))), path)
  if name == 'minilm':
    model_folder = scratch / 'minilm'
    model_folder.mkdir()
    shutil.copy(path, model_folder / 'model.safetensors')
    config = LANGUAGE['MiniLM-L6 (BERT)']
    (model_folder / 'config.json').write_text(json.dumps(config))
    path = model_folder
  elif name == 'smollm2':
    path = folder / name
  else:
    arguments += ['--model', name]
  output = scratch / f'{name}.opq'
  # the balanced objective: costs of a language model's leaves take minutes
  objective = ['--objective', 'balanced_error']
  if cli.main(['compress', str(path), str(output), *arguments, *objective]):
    raise SystemExit(f'{name} was not compressed')
  return output


def answer_of(path: pathlib.Path, name: str) -> tuple[Callable[[Any], Any], np.ndarray]:
  """Returns the decoded network as a function of a batch, and a batch."""
  rng = np.random.default_rng(1)
  if name in ('minilm', 'smollm2'):
    with OpqFile(path) as file:
      model: Any = models.from_config(json.loads(file.read_side_files()['config.json']))
      variables = language_models.from_tensors(model, {leaf: file[leaf] for leaf in file}).variables
    return lambda batch: model.apply(variables, batch), rng.integers(
      1, 1000, (BATCH, TOKENS)
    ).astype(np.int32)
  network = networks.load(path)
  _, *image = networks.noise_shape(importers.sources(name)[0])
  batch = rng.uniform(-1, 1, (BATCH, *image)).astype(np.float32)
  return lambda batch: network.model.apply(network.variables, batch), batch


def row_of(name: str, folder: pathlib.Path) -> dict[str, object]:
  with tempfile.TemporaryDirectory() as place:
    scratch = pathlib.Path(place)
    path = compressed(name, folder, scratch)
    program = network_program(path)
    small, floats = scratch / 'small.onnx', scratch / 'floats.onnx'
    with OpqFile(path) as file:
      write_onnx(small, file, program)
      write_onnx(floats, file, network_program(path), floats=True)
    answer, batch = answer_of(path, name)
    expected = np.asarray(jax.jit(answer)(batch))
    sessions = {kind: opened(file) for kind, file in (('small', small), ('floats', floats))}
    feed = {sessions['small'].get_inputs()[0].name: batch}
    found = {kind: session.run(None, feed)[0] for kind, session in sessions.items()}
    seconds = harness.in_turn(
      {kind: lambda session=session: session.run(None, feed) for kind, session in sessions.items()},
      ROUNDS,
    )
    data = small.read_bytes()
    return {
      'network': name,
      'floats, bytes': floats.stat().st_size,
      '.opq': path.stat().st_size,
      'small.onnx': len(data),
      'in xz': len(lzma.compress(data, preset=6)),
      'same answer as of floats': bool((found['small'] == found['floats']).all()),
      'largest answer': f'{np.abs(expected).max():.3g}',
      'largest difference to JAX': f'{np.abs(found["small"] - expected).max():.1e}',
      'time, indices over floats': round(seconds['small'] / seconds['floats'], 2),
    }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('networks', nargs='*', metavar='NETWORK', help=' '.join(NAMES))
  arguments = parser.parse_args()
  rows = []
  for name in arguments.networks or NAMES:
    rows.append(row_of(name, arguments.folder))
    print(*rows[-1].values(), sep='  ', file=sys.stderr, flush=True)
  rows = harness.with_earlier('onnx_networks', rows, ['network'])
  harness.report('onnx_networks', 'Networks as ONNX files', f'python -m {MODULE} FOLDER', rows)


if __name__ == '__main__':
  main()
